import { setTimeout as sleep } from 'node:timers/promises';
import type { TandemClient } from '../../cli/client.js';
import type { Status__Output } from '../../proto/generated/tandem/v1/Status.js';
import type { BenchContext, Part } from './part.js';
import { runProcess, withCluster } from './processes.js';
import type { VanishResult } from './vanish-request.js';

const CLIENTS = 1000;
const PROCESSES = 2;
/** How long the server may take to see that they are gone. */
const SETTLE_MS = 10_000;

export interface VanishRun extends VanishResult {
  readonly peak: { readonly running: number; readonly queued: number; readonly usedBlocks: number };
  /** Of the server, once everybody was gone. */
  readonly end: {
    readonly running: number;
    readonly queued: number;
    readonly cancelled: number;
    readonly totalBlocks: number;
    readonly usedBlocks: number;
    readonly cachedBlocks: number;
    readonly freeBlocks: number;
  };
  readonly settledMs: number;
}

export const vanish: Part = {
  name: 'vanish',
  title: `${CLIENTS} clients with a connection each, every second of which destroys it in mid-stream`,
  async run(context) {
    const { vanished, finished, failures, peak, end, settledMs } = await vanishRun(context);
    const wrong = [
      ...(end.running > 0 || end.queued > 0 ? [`${end.running} requests still run and ${end.queued} wait`] : []),
      ...(end.usedBlocks > 0 ? [`${end.usedBlocks} KV blocks are still used`] : []),
      ...(end.freeBlocks + end.cachedBlocks !== end.totalBlocks
        ? [`${end.freeBlocks} free and ${end.cachedBlocks} cached blocks are not the ${end.totalBlocks} that there are`]
        : []),
      ...(vanished + finished.length !== CLIENTS ? [`${vanished} vanished and ${finished.length} were answered of ${CLIENTS}`] : []),
      ...failures.slice(0, 3).map(({ client, error }) => `client ${client}: ${error}`),
    ];
    return {
      header: ['', 'running', 'queued', 'used blocks', 'cached', 'free', 'total'],
      rows: [
        ['at most, as seen', String(peak.running), String(peak.queued), String(peak.usedBlocks), '', '', String(end.totalBlocks)],
        [
          'at the end',
          ...[end.running, end.queued, end.usedBlocks, end.cachedBlocks, end.freeBlocks, end.totalBlocks].map((count) => String(count)),
        ],
      ],
      notes: [
        `${finished.length} clients were answered, ${vanished} vanished (${end.cancelled} requests cancelled by the server), ${failures.length} failed; all was free ${settledMs.toFixed(0)} ms after the last one`,
      ],
      data: { clients: CLIENTS, vanished, answered: finished.length, failures, peak, end, settledMs },
      failures: wrong,
    };
  },
};

let lastRun: VanishRun | null = null;

/** Once for all parts that look at it. */
export async function vanishRun(context: BenchContext): Promise<VanishRun> {
  lastRun ??= await withCluster({ model: null, worldSize: 2 }, async ({ address, client }) => {
    const share = CLIENTS / PROCESSES;
    const running = Array.from({ length: PROCESSES }, (_, i) =>
      runProcess<VanishResult>('vanish-clients.js', [address, String(i * share), String(share)]),
    );
    const { results, peak } = await watch(client, Promise.all(running));
    context.progress(`vanish: ${results.reduce((sum, { finished }) => sum + finished.length, 0)} answered`);
    const startMs = performance.now();
    let status = await client.status();
    while (!isIdle(status) && performance.now() - startMs < SETTLE_MS) {
      await sleep(20);
      status = await client.status();
    }
    const { kv, requests } = status;
    const { totalBlocks, usedBlocks, cachedBlocks, freeBlocks } = kv!;
    return {
      vanished: results.reduce((sum, result) => sum + result.vanished, 0),
      finished: results.flatMap(({ finished }) => finished),
      failures: results.flatMap(({ failures }) => failures),
      peak,
      settledMs: performance.now() - startMs,
      end: {
        ...{ running: requests!.running, queued: requests!.queued, cancelled: requests!.cancelled },
        ...{ totalBlocks, usedBlocks, cachedBlocks, freeBlocks },
      },
    };
  });
  return lastRun;
}

function isIdle({ kv, requests }: Status__Output): boolean {
  return requests!.running === 0 && requests!.queued === 0 && kv!.usedBlocks === 0;
}

async function watch<T>(client: TandemClient, work: Promise<T>): Promise<{ results: T; peak: VanishRun['peak'] }> {
  const peak = { running: 0, queued: 0, usedBlocks: 0 };
  const look = async (): Promise<void> => {
    const { kv, requests } = await client.status();
    peak.running = Math.max(peak.running, requests!.running);
    peak.queued = Math.max(peak.queued, requests!.queued);
    peak.usedBlocks = Math.max(peak.usedBlocks, kv!.usedBlocks);
  };
  const timer = setInterval(() => void look().catch(() => {}), 50); // a missed look is no error
  try {
    return { results: await work, peak };
  } finally {
    clearInterval(timer);
  }
}
