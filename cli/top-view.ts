/** What `tandem top` shows: a status and the size of the terminal in, lines out. */
import type { ActiveRequest__Output } from '../proto/generated/tandem/v1/ActiveRequest.js';
import type { Event__Output } from '../proto/generated/tandem/v1/Event.js';
import type { Percentiles__Output } from '../proto/generated/tandem/v1/Percentiles.js';
import type { Status__Output } from '../proto/generated/tandem/v1/Status.js';
import { formatBytes, formatCount, formatDuration, formatMs, formatPercent, formatWorkerState } from './format.js';
import { beside, lineWidth, piece, table, type Line, type Piece, type Style } from './terminal/line.js';

export interface TopState {
  readonly status: Status__Output;
  readonly address: string;
  readonly columns: number;
  /** Null: as many lines as there is to show. */
  readonly rows: number | null;
  /** How many of the requests are above the first that is shown. */
  readonly scroll: number;
  /** Milliseconds since the status came, where it should have been followed by another; null: it is fresh. */
  readonly silentMs: number | null;
}

export interface TopView {
  readonly lines: readonly Line[];
  /** As it was asked for, or where the list ends. */
  readonly scroll: number;
  /** Requests that are shown at once. */
  readonly pageRows: number;
}

const MOST_EVENTS = 6;
/** Title, header and one request. */
const LEAST_REQUEST_LINES = 3;
const SIDE_BY_SIDE_GAP = 4;
const BLANK: Line = [];

export function topView(state: TopState): TopView {
  const { status, columns, rows } = state;
  const blocks = {
    latencyAndStep: columns >= 90 ? beside(latencyBlock(status), stepBlock(status), SIDE_BY_SIDE_GAP) : latencyBlock(status),
    kv: kvBlock(status, columns),
    ranks: ranksBlock(status, columns),
  };
  const footer: Line = [piece('q', 'bold'), piece(' quit   '), piece('↑ ↓ PgUp PgDn', 'bold'), piece(' scroll the requests')];
  const lines = [...header(state), BLANK, ...totals(status)];
  if (rows === null) {
    for (const block of Object.values(blocks)) lines.push(BLANK, ...block);
    const requests = requestsBlock(state, Infinity);
    const events = eventLines(status.events, Infinity);
    lines.push(BLANK, ...requests.lines, ...(events.length > 0 ? [BLANK, ...events] : []));
    return { ...requests, lines };
  }
  // What there is no room for is left out, the requests last.
  let left = rows - lines.length - 1 - (1 + LEAST_REQUEST_LINES);
  const fits = (block: readonly Line[]): boolean => {
    if (block.length + 1 > left) return false;
    left -= block.length + 1;
    return true;
  };
  const shown = Object.values(blocks).filter(fits);
  const moreRequests = Math.max(0, 2 + status.active.length - LEAST_REQUEST_LINES);
  const events = eventLines(status.events, Math.min(MOST_EVENTS, Math.max(left - moreRequests, Math.floor(left / 3)) - 1));
  if (events.length > 0) left -= events.length + 1;
  const requests = requestsBlock(state, LEAST_REQUEST_LINES + Math.max(0, left));
  for (const block of shown) lines.push(BLANK, ...block);
  lines.push(BLANK, ...requests.lines);
  while (lines.length < rows - 1 - (events.length > 0 ? events.length + 1 : 0)) lines.push(BLANK);
  if (events.length > 0) lines.push(BLANK, ...events);
  return { ...requests, lines: [...lines.slice(0, rows - 1), footer] };
}

const STATE_STYLES: Readonly<Record<string, Style>> = { ready: 'green', failed: 'red', stopping: 'red' };

function header({ status, address, columns, silentMs }: TopState): Line[] {
  const { model } = status;
  const left = [
    piece('tandem ', 'bold'),
    piece(`${status.version}  `),
    silentMs === null
      ? piece(`● ${status.state}`, STATE_STYLES[status.state] ?? 'yellow')
      : piece(`● no answer for ${formatDuration(silentMs / 1000)}`, 'red'),
    piece(`  up ${formatDuration(status.uptimeSeconds)}  epoch ${status.epoch}`),
  ];
  const right = [piece(`${address}  ${clock(status.unixSeconds)}`, 'dim')];
  const gap = columns - lineWidth(left) - lineWidth(right);
  return [
    gap >= 2 ? [...left, { text: ' '.repeat(gap) }, ...right] : left,
    [
      piece(model!.name, 'bold'),
      piece(`  ${model!.weights}  ${model!.numLayers} layers, hidden ${model!.hiddenSize}, context ${model!.maxSequenceLength}`),
      piece(`  ${model!.path}`, 'dim'),
    ],
    ...(status.reason ? [[piece(status.reason, 'yellow')]] : []),
  ];
}

function totals({ rates, requests, totals }: Status__Output): Line[] {
  const counted = (count: number, what: string, style?: Style): Piece[] => [
    piece(formatCount(count), count > 0 ? (style ?? 'bold') : undefined),
    piece(` ${what}   `),
  ];
  const unlessZero = (...args: Parameters<typeof counted>): Piece[] => (args[0] === 0 ? [] : counted(...args));
  return [
    [
      ...[piece('per second  ', 'dim'), ...counted(rates!.generatedTokensPerSecond, 'tokens')],
      ...counted(rates!.promptTokensPerSecond, 'prompt tokens'),
      ...counted(rates!.requestsPerSecond, 'requests'),
      ...counted(rates!.stepsPerSecond, 'steps'),
    ],
    [
      ...[piece('in total    ', 'dim'), ...counted(totals!.generatedTokens, 'tokens')],
      ...counted(totals!.promptTokens, 'prompt tokens'),
      ...counted(requests!.finished, 'finished'),
      ...unlessZero(requests!.cancelled, 'cancelled'),
      ...unlessZero(requests!.failed, 'failed', 'red'),
      ...unlessZero(requests!.expired, 'expired', 'red'),
      ...unlessZero(requests!.rejected, 'rejected', 'yellow'),
      ...unlessZero(requests!.preemptions, 'preempted', 'yellow'),
    ],
  ];
}

function latencyBlock({ latency }: Status__Output): Line[] {
  const row = (name: string, { p50, p90, p99, count }: Percentiles__Output): Piece[] => [
    piece(name),
    ...[p50, p90, p99].map((ms) => (count === 0 ? piece('-', 'dim') : piece(formatMs(ms)))),
    piece(formatCount(count), 'dim'),
  ];
  const { timeToFirstToken, interToken, endToEnd, queue } = latency!;
  return table(
    [{ title: 'last minute' }, ...['p50', 'p90', 'p99', 'count'].map((title) => ({ title: title.padStart(8), side: 'right' as const }))],
    [row('first token', timeToFirstToken!), row('next token', interToken!), row('in queue', queue!), row('end to end', endToEnd!)],
  );
}

const STEP_BAR = 16;

function stepBlock({ step }: Status__Output): Line[] {
  const { total, batchTokens, batchExtends } = step!;
  const parts = [
    ['schedule', step!.schedule],
    ['wire', step!.wire],
    ['compute', step!.compute],
    ['all-reduce', step!.allReduce],
    ['sample', step!.sample],
    ['emit', step!.emit],
  ] as const;
  const share = (ms: number): number => (total > 0 ? ms / total : 0);
  return [
    [
      piece('step of '),
      piece(formatMs(total), 'bold'),
      piece(`, ${formatCount(batchTokens)} tokens in ${formatCount(batchExtends)} sequences`),
    ],
    ...table(
      [{ title: '' }, { title: '', side: 'right', minWidth: 7 }, { title: '', side: 'right', minWidth: 5 }, { title: '' }],
      parts.map(([name, ms]) => [
        piece(name),
        piece(formatMs(ms)),
        piece(formatPercent(share(ms))),
        piece(bar(share(ms), STEP_BAR), 'cyan'),
      ]),
    ).slice(1),
  ];
}

function kvBlock({ kv, contextCache }: Status__Output, columns: number): Line[] {
  const { usedBlocks, cachedBlocks, freeBlocks, totalBlocks, blockSize, peakUsedBlocks } = kv!;
  const share = (blocks: number): number => (totalBlocks > 0 ? blocks / totalBlocks : 0);
  const width = Math.max(10, Math.min(40, columns - 60));
  const used = Math.ceil(share(usedBlocks) * width);
  const cached = Math.min(width - used, Math.ceil(share(cachedBlocks) * width));
  const { contexts, hits, misses, hitTokens, evictions } = contextCache!;
  const line: Piece[] = [
    piece('KV  '),
    piece('█'.repeat(used), share(usedBlocks) > 0.95 ? 'red' : share(usedBlocks) > 0.8 ? 'yellow' : 'green'),
    piece('▒'.repeat(cached), 'cyan'),
    piece('░'.repeat(width - used - cached), 'dim'),
    piece(`  ${formatPercent(share(usedBlocks))} used`, 'bold'),
    piece(`  █ ${usedBlocks} used  ▒ ${cachedBlocks} cached  ░ ${freeBlocks} free of ${totalBlocks} blocks`),
    piece(`  ${blockSize} tokens each, peak ${peakUsedBlocks}`, 'dim'),
  ];
  if (hits + misses === 0) return [line];
  const hitShare = formatPercent(hits / (hits + misses));
  return [
    line,
    [
      piece(
        `    ${contexts} contexts cached, ${hitShare} of ${formatCount(hits + misses)} found, ${formatCount(hitTokens)} tokens not computed, ${formatCount(evictions)} evicted`,
        'dim',
      ),
    ],
  ];
}

function ranksBlock({ workers }: Status__Output, columns: number): Line[] {
  const hasDevices = columns >= 100;
  const right = (title: string) => ({ title, side: 'right' as const });
  return table(
    [
      { title: 'rank' },
      { title: 'state' },
      ...(hasDevices ? [{ title: 'device', maxWidth: 32 }] : []),
      right('weights'),
      right('KV'),
      right('resident'),
      right('collectives'),
      right('heartbeat'),
      right('restarts'),
    ],
    workers.map((worker) => {
      const { rank, state, device, isa, threads, computeSeconds, collectiveSeconds, heartbeatAgeSeconds, restarts } = worker;
      const isOld = heartbeatAgeSeconds > 5;
      return [
        piece(String(rank)),
        piece(formatWorkerState(worker), state === 'ready' ? 'green' : 'yellow'),
        ...(hasDevices ? [piece(state === 'absent' ? '-' : `${device} ${isa} x${threads}`)] : []),
        ...[worker.weightBytes, worker.kvBytes, worker.rssBytes].map((bytes) => piece(formatBytes(bytes))),
        piece(computeSeconds > 0 ? formatPercent(collectiveSeconds / computeSeconds) : '-'),
        piece(state === 'absent' ? '-' : `${heartbeatAgeSeconds.toFixed(1)} s`, isOld ? 'red' : undefined),
        piece(String(restarts), restarts > 0 ? 'yellow' : undefined),
      ];
    }),
  );
}

const REQUEST_STYLES: Readonly<Record<string, Style>> = { decode: 'green', prefill: 'cyan', preempted: 'yellow', queued: 'dim' };

/** @param mostLines title and header included */
function requestsBlock({ status, scroll, columns }: TopState, mostLines: number): TopView {
  const { active, requests } = status;
  const pageRows = Math.max(1, mostLines - 2);
  const first = Math.max(0, Math.min(scroll, active.length - pageRows));
  const shown = active.slice(first, first + pageRows);
  const hasKeys = active.some(({ key }) => key !== '');
  const hasPriorities = active.some(({ priority }) => priority !== 0);
  const right = (title: string) => ({ title, side: 'right' as const, minWidth: 6 });
  const row = (request: ActiveRequest__Output): Piece[] => [
    piece(request.requestId),
    ...(hasKeys ? [piece(request.key)] : []),
    piece(request.state, REQUEST_STYLES[request.state]),
    ...[request.promptTokens, request.generatedTokens, request.kvBlocks].map((count) => piece(String(count))),
    ...(hasPriorities ? [piece(String(request.priority))] : []),
    piece(formatMs(request.ageSeconds * 1000)),
  ];
  const all = requests!.running + requests!.queued;
  const isPart = shown.length < all;
  const title: Line = [
    piece(`${requests!.running} running`, 'bold'),
    piece(`, ${requests!.queued} queued`, requests!.queued > 0 ? 'yellow' : undefined),
    piece(requests!.queued > 0 ? ` (${formatCount(requests!.queuedTokens)} prompt tokens)` : ''),
    piece(isPart && shown.length > 0 ? `   ${first + 1} to ${first + shown.length} of ${all}, oldest first` : '', 'dim'),
  ];
  if (active.length === 0) return { lines: [title], scroll: 0, pageRows };
  const columnsShown = [
    { title: 'request', minWidth: columns >= 100 ? 36 : 12, maxWidth: Math.max(12, Math.min(40, columns - 50)) },
    ...(hasKeys ? [{ title: 'key', maxWidth: 20 }] : []),
    { title: 'state', minWidth: 9 },
    ...['prompt', 'new', 'blocks'].map(right),
    ...(hasPriorities ? [right('priority')] : []),
    { ...right('age'), minWidth: 7 },
  ];
  return { lines: [title, ...table(columnsShown, shown.map(row))], scroll: first, pageRows };
}

function eventLines(events: readonly Event__Output[], most: number): Line[] {
  if (most <= 0) return [];
  const styles: Readonly<Record<string, Style>> = { error: 'red', warning: 'yellow' };
  return events
    .slice(-Math.min(most, events.length))
    .map(({ unixSeconds, severity, message }) => [piece(`${clock(unixSeconds)}  `, 'dim'), piece(message, styles[severity])]);
}

/** In the terminal's own time zone. */
function clock(unixSeconds: number): string {
  return new Date(unixSeconds * 1000).toTimeString().slice(0, 8);
}

const EIGHTHS = ['', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];

function bar(share: number, width: number): string {
  const eighths = Math.round(Math.min(1, share) * width * 8);
  return '█'.repeat(Math.floor(eighths / 8)) + EIGHTHS[eighths % 8]!;
}
