import { packageVersion } from '../../common/package-root.js';
import { formatTable } from '../format.js';
import type { ClientLoad, LoadResult } from './run-load.js';
import type { Slo } from './slo.js';
import type { LoadSummary, Percentiles } from './summary.js';

/** What `tandem load --json` prints (docs/load.md): fields are added under the same schema, never changed. */
export interface LoadReport extends LoadSummary {
  readonly schema: 'tandem.load/1';
  readonly version: string;
  readonly target: string;
  readonly load: string;
  readonly isInterrupted: boolean;
  readonly abandoned: number;
  readonly cutPrompts: number;
  readonly client: ClientLoad;
}

export function toReport(what: { readonly target: string; readonly load: string }, result: LoadResult, summary: LoadSummary): LoadReport {
  const { isInterrupted, abandoned, cutPrompts, client } = result;
  return { schema: 'tandem.load/1', version: packageVersion, ...what, isInterrupted, abandoned, cutPrompts, client, ...summary };
}

export function formatReport(report: LoadReport): string {
  const { requests, latencyMs, throughput, tokens, goodput, client, errors } = report;
  const rows = [
    row('time to first token', latencyMs.ttft),
    row('time per output token', latencyMs.tpot),
    row('between messages', latencyMs.interToken),
    row('end to end', latencyMs.e2e),
    row('in the queue of the server', latencyMs.serverQueue),
  ].filter((each) => each !== null);
  const ended = `${requests.finished} finished, ${requests.failed} failed, ${requests.cancelled} left by their client`;
  const lines = [
    `${report.load} to ${report.target}: ${requests.sent} requests in ${(report.durationMs / 1000).toFixed(1)} s (${ended})`,
    ...(report.isInterrupted ? [`interrupted: ${report.abandoned} requests that were under way are left out`] : []),
    '',
    ...(rows.length > 0 ? [formatTable(['milliseconds', 'p50', 'p90', 'p95', 'p99', 'max', 'mean'], rows), ''] : []),
    `throughput  ${throughput.requestsPerSecond.toFixed(2)} requests/s, ${throughput.outputTokensPerSecond.toFixed(1)} output tokens/s, ${throughput.totalTokensPerSecond.toFixed(1)} tokens/s with prompts`,
    `tokens      ${tokens.prompt} of prompts (${tokens.cachedPrompt} from the context cache), ${tokens.output} of outputs`,
    ...(goodput
      ? [
          `goodput     ${(goodput.share * 100).toFixed(1)} %, ${goodput.requestsPerSecond.toFixed(2)} requests/s within ${formatSlo(goodput.slo)}`,
        ]
      : []),
    ...errors.map(({ code, count, example }) => `errors      ${count} x ${code}: ${example}`),
    ...(report.cutPrompts > 0 ? [`prompts     ${report.cutPrompts} were cut to leave room for the output`] : []),
    `client      event loop ${(client.eventLoopUtilization * 100).toFixed(0)} % busy and ${client.eventLoopDelayMs.p99.toFixed(1)} ms late (p99), requests sent up to ${(report.sendDelayMs?.max ?? 0).toFixed(1)} ms late`,
    ...(client.isSaturated
      ? [
          '            THE CLIENT WAS SHORT OF PROCESSOR TIME: latencies are partly its own; lower the load, or run it elsewhere or several times',
        ]
      : []),
  ];
  return `${lines.join('\n')}\n`;
}

function row(name: string, values: Percentiles | null): string[] | null {
  if (values === null) return null;
  return [name, ...[values.p50, values.p90, values.p95, values.p99, values.max, values.mean].map((ms) => ms.toFixed(2))];
}

function formatSlo(slo: Slo): string {
  const parts = [
    ['first token', slo.ttftMs],
    ['output token', slo.tpotMs],
    ['end', slo.e2eMs],
  ] as const;
  return parts.flatMap(([name, ms]) => (ms === null ? [] : [`${name} ${ms} ms`])).join(', ');
}
