/**
 * A server for the dashboard's tests: it serves the page as the real one does, and says what the test tells it to say. What happens when is
 * decided by the test alone: nothing here waits or repeats by itself.
 */
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { packageRoot } from '../../common/package-root.js';
import type { Status } from '../../proto/generated/tandem/v1/Status.js';

export interface StandIn {
  readonly url: string;
  /** Method and path of each request that came, with the query. */
  readonly requests: readonly string[];
  /** Ids that were asked to be aborted. */
  readonly aborted: readonly string[];
  /** What the status is from now on; streams get it at once. */
  show(status: Status): void;
  /** Ends the streams. `isDown`: whether further ones are refused. */
  endStreams(isDown: boolean): void;
  /** From now on calls need one of these keys, of which each has roles; null: none is needed. */
  requireKeys(keys: Readonly<Record<string, readonly string[]>> | null): void;
  /** The answer to the next aborts; null: they succeed. */
  refuseAborts(refusal: Refusal | null): void;
  /** The answer to the next completions; null: the test writes it. */
  refuseCompletions(refusal: Refusal | null): void;
  /** Resolves with the next completion that is asked for. */
  nextCompletion(): Promise<CompletionCall>;
  close(): Promise<void>;
}

export interface Refusal {
  readonly status: number;
  readonly error: { readonly message: string; readonly type: string; readonly param: string | null; readonly code: string | null };
  readonly headers?: Readonly<Record<string, string>>;
}

export interface CompletionCall {
  readonly headers: IncomingMessage['headers'];
  readonly body: Record<string, unknown>;
  /** Writes one chunk; a string goes as it is. */
  send(chunk: object | string): void;
  end(): void;
  /** Resolves when the client has closed the connection before the end. */
  readonly aborted: Promise<void>;
}

const ROLE_OF: readonly (readonly [RegExp, string])[] = [
  [/^\/status/, 'observe'],
  [/^\/v1\/requests\//, 'operate'],
  [/^\/v1\//, 'infer'],
];

export async function startStandIn(first: Status): Promise<StandIn> {
  const page = readFileSync(join(packageRoot, 'dashboard', 'index.html'), 'utf8');
  const policy = contentSecurityPolicy(page);
  const requests: string[] = [];
  const aborted: string[] = [];
  const streams = new Set<ServerResponse>();
  const completions: CompletionCall[] = [];
  const awaited: ((call: CompletionCall) => void)[] = [];
  let status = first;
  let isDown = false;
  let keys: Readonly<Record<string, readonly string[]>> | null = null;
  let abortRefusal: Refusal | null = null;
  let completionRefusal: Refusal | null = null;

  const server = createServer((request, response) => {
    const { pathname } = new URL(request.url!, 'http://stand-in');
    requests.push(`${request.method} ${request.url}`);
    if (pathname === '/') {
      response.writeHead(200, { 'content-type': 'text/html; charset=utf-8', 'content-security-policy': policy }).end(page);
      return;
    }
    const refusal = refusalOf(pathname, request.headers.authorization, keys);
    if (refusal) return refuse(response, refusal);
    if (pathname === '/status/stream') {
      if (isDown) return void request.socket.destroy();
      response.writeHead(200, { 'content-type': 'text/event-stream' });
      response.write(`data: ${JSON.stringify(status)}\n\n`);
      streams.add(response);
      response.once('close', () => streams.delete(response));
    } else if (pathname === '/v1/models') {
      json(response, 200, { object: 'list', data: [{ id: 'glm-tiny', object: 'model' }] });
    } else if (pathname === '/v1/completions') {
      if (completionRefusal) return refuse(response, completionRefusal);
      void completionCall(request, response).then((call) => (awaited.shift() ?? ((next) => completions.push(next)))(call));
    } else if (pathname.startsWith('/v1/requests/')) {
      if (abortRefusal) return refuse(response, abortRefusal);
      aborted.push(decodeURIComponent(pathname.split('/')[3]!));
      json(response, 200, {});
    } else refuse(response, { status: 404, error: { message: `no route ${pathname}`, type: 'not_found', param: null, code: null } });
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');

  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/`,
    requests,
    aborted,
    show(next) {
      status = next;
      for (const stream of streams) stream.write(`data: ${JSON.stringify(status)}\n\n`);
    },
    endStreams(down) {
      isDown = down;
      for (const stream of streams) stream.end();
    },
    requireKeys: (next) => (keys = next),
    refuseAborts: (refusal) => (abortRefusal = refusal),
    refuseCompletions: (refusal) => (completionRefusal = refusal),
    nextCompletion: () => {
      const call = completions.shift();
      return call ? Promise.resolve(call) : new Promise((resolve) => awaited.push(resolve));
    },
    async close() {
      server.close();
      server.closeAllConnections();
      await once(server, 'close');
    },
  };
}

/** The page's own script and style and nothing else; markup can not be made from strings either. */
function contentSecurityPolicy(page: string): string {
  const hash = (tag: string): string => {
    const [, content] = new RegExp(`<${tag}>([^]*?)</${tag}>`).exec(page)!;
    return `'sha256-${createHash('sha256').update(content!).digest('base64')}'`;
  };
  return [
    `default-src 'none'`,
    `script-src ${hash('script')}`,
    `style-src ${hash('style')}`,
    `connect-src 'self'`,
    `img-src data:`,
    `base-uri 'none'`,
    `form-action 'none'`,
    `frame-ancestors 'none'`,
    `require-trusted-types-for 'script'`,
    `trusted-types 'none'`,
  ].join('; ');
}

function refusalOf(
  pathname: string,
  authorization: string | undefined,
  keys: Readonly<Record<string, readonly string[]>> | null,
): Refusal | null {
  const role = ROLE_OF.find(([pattern]) => pattern.test(pathname))?.[1];
  if (keys === null || role === undefined) return null;
  const roles = keys[/^Bearer (.+)$/.exec(authorization ?? '')?.[1] ?? ''];
  const error = { type: 'authentication_error', param: null, code: null };
  if (!roles) return { status: 401, error: { ...error, message: 'no API key, or one that is not known' } };
  if (roles.includes(role)) return null;
  return { status: 403, error: { ...error, message: `the API key has no role ${role}`, type: 'permission_error' } };
}

async function completionCall(request: IncomingMessage, response: ServerResponse): Promise<CompletionCall> {
  const parts: Buffer[] = [];
  for await (const part of request) parts.push(part as Buffer);
  response.writeHead(200, { 'content-type': 'text/event-stream' });
  response.flushHeaders();
  return {
    headers: request.headers,
    body: JSON.parse(Buffer.concat(parts).toString()) as Record<string, unknown>,
    send: (chunk) => void response.write(`data: ${typeof chunk === 'string' ? chunk : JSON.stringify(chunk)}\n\n`),
    end: () => void response.end(),
    aborted: new Promise((resolve) => response.once('close', () => response.writableFinished || resolve())),
  };
}

function refuse(response: ServerResponse, { status, error, headers = {} }: Refusal): void {
  json(response, status, { error }, headers);
}

function json(response: ServerResponse, status: number, body: object, headers: Readonly<Record<string, string>> = {}): void {
  response.writeHead(status, { 'content-type': 'application/json', ...headers }).end(JSON.stringify(body));
}

// --- What it may say

const START_UNIX_SECONDS = 1_760_000_000;
const MIB = 2 ** 20;
export const HOSTILE = '<img src=x onerror="document.title=1">';

/**
 * The status of a server of four ranks, `tick` seconds after its start: rank 1 is lost at 200 and back at 230, and the queue then holds
 * what has come meanwhile. The same tick gives the same status.
 */
export function scriptedStatus(tick: number): Status {
  const isRecovering = tick >= 200 && tick < 230;
  const wave = Math.sin(tick / 17) + 0.5 * Math.sin(tick / 5.3) + 0.3 * Math.sin(tick * 1.9);
  const load = isRecovering ? 0 : Math.max(0.05, 0.6 + 0.25 * wave);
  const running = isRecovering ? 48 : Math.round(64 * Math.min(1, load));
  const queued = isRecovering ? (tick - 200) * 4 : Math.max(0, tick >= 230 ? 120 - (tick - 230) * 3 : Math.round(6 * wave));
  const used = Math.round(3000 * Math.min(1, load + 0.1));
  const cached = Math.min(4096 - used, 420);
  const epoch = tick < 200 ? 1 : 2;
  const states = ['decode', 'decode', 'decode', 'prefill', 'preempted'];
  return {
    schema: 'tandem.status/1',
    version: '0.1.0',
    state: isRecovering ? 'recovering' : 'ready',
    reason: isRecovering ? 'rank 1 was lost (exit status 137); it is started again' : '',
    unixSeconds: START_UNIX_SECONDS + tick,
    uptimeSeconds: 93_784 + tick,
    epoch,
    model: {
      path: '/var/lib/tandem/models/glm-130b-int4',
      name: 'glm-130b',
      numLayers: 70,
      hiddenSize: 12_288,
      numAttentionHeads: 96,
      vocabSize: 150_528,
      maxSequenceLength: 2048,
      weights: 'INT4',
      hasTokenizer: true,
    },
    workers: [0, 1, 2, 3].map((rank) => {
      const isLost = isRecovering && rank === 1;
      return {
        rank,
        pid: isLost ? 0 : 4100 + rank + (rank === 1 ? epoch - 1 : 0),
        state: isLost ? (tick < 210 ? 'absent' : 'loading') : 'ready',
        device: 'cpu',
        isa: 'avx512',
        threads: 8,
        weightBytes: isLost ? 0 : 16_900 * MIB,
        kvBytes: isLost ? 0 : 3520 * MIB,
        workspaceBytes: isLost ? 0 : 212 * MIB,
        rssBytes: isLost ? 0 : 20_800 * MIB + rank * 31 * MIB,
        heartbeatAgeSeconds: 0.1 + ((tick + rank * 3) % 9) / 10,
        restarts: rank === 1 ? epoch - 1 : 0,
        computeSeconds: tick * 0.8,
        collectiveSeconds: tick * 0.8 * (0.18 + rank * 0.02),
      };
    }),
    kv: {
      blockSize: 16,
      totalBlocks: 4096,
      usedBlocks: used,
      peakUsedBlocks: 3391,
      cachedBlocks: cached,
      freeBlocks: 4096 - used - cached,
    },
    contextCache: { contexts: 37, maxBlocks: 512, hits: 900 + tick, misses: 310, hitTokens: 1_240_000 + tick * 900, evictions: 12 },
    requests: {
      running,
      queued,
      finished: 18_200 + tick * 5,
      failed: 2,
      cancelled: 41,
      rejected: 7,
      preemptions: 19,
      queuedTokens: queued * 310,
      expired: 3,
    },
    totals: {
      steps: 910_000 + tick * 40,
      promptTokens: 8_100_000,
      generatedTokens: 3_900_000 + tick * 1400,
      stepSeconds: 71_000 + tick * 0.8,
      collectiveSeconds: 14_900,
    },
    rates: {
      generatedTokensPerSecond: 1420 * load,
      promptTokensPerSecond: 3100 * Math.max(0, load + 0.2 * Math.sin(tick / 3)),
      requestsPerSecond: 5.2 * load,
      stepsPerSecond: isRecovering ? 0 : 41 - 9 * load,
    },
    latency: {
      timeToFirstToken: { p50: 180 + 60 * load, p90: 420 + 200 * load, p99: isRecovering ? 14_200 : 900 + 700 * load, count: 311 },
      interToken: { p50: 24 + 9 * load, p90: 31 + 12 * load, p99: 58 + 20 * load, count: 84_211 },
      endToEnd: { p50: 3400, p90: 9800, p99: 21_400, count: 298 },
      queue: { p50: 0.4, p90: 12, p99: 310, count: 311 },
    },
    step: isRecovering
      ? {}
      : {
          total: 27.4 + 2 * load,
          schedule: 0.06,
          wire: 0.48,
          compute: 20.5 + 2 * load,
          allReduce: 5.3,
          sample: 0.9,
          emit: 0.16,
          batchTokens: 34 * load + 12,
          batchExtends: 40 * load,
        },
    active: Array.from({ length: Math.min(200, running + queued) }, (_, i) => ({
      requestId: i === 1 ? HOSTILE : i === 2 ? '请求-小红喜欢牛奶' : `req-${String(7_100 + i)}`,
      key: ['team-search', 'batch', '研究组', ''][i % 4]!,
      state: i >= running ? 'queued' : states[i % states.length]!,
      promptTokens: 40 + ((i * 397) % 1900),
      generatedTokens: i >= running ? 0 : (i * 31 + tick) % 256,
      kvBlocks: i >= running ? 0 : 3 + ((i * 7) % 120),
      priority: i % 7 === 0 ? 10 : 0,
      ageSeconds: Math.max(0.2, 75 - i * 0.8),
    })),
    events: [
      { unixSeconds: START_UNIX_SECONDS - 93_784, severity: 'info', message: 'epoch 1 is ready: 4 ranks' },
      { unixSeconds: START_UNIX_SECONDS - 300, severity: 'warning', message: `key ${HOSTILE} was refused: 12 times within a minute` },
      { unixSeconds: START_UNIX_SECONDS - 120, severity: 'info', message: '密钥文件已重新加载：3 个密钥' },
      ...(tick >= 200
        ? [{ unixSeconds: START_UNIX_SECONDS + 200, severity: 'error', message: 'epoch 1 ended: rank 1 was lost (exit status 137)' }]
        : []),
      ...(tick >= 230 ? [{ unixSeconds: START_UNIX_SECONDS + 230, severity: 'info', message: 'epoch 2 is ready: 4 ranks' }] : []),
    ],
  };
}
