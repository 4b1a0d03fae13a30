import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { formatBytes } from '../../cli/format.js';
import type { LocalCluster } from '../../cli/local-cluster.js';
import type { CoordinatorRun } from './coordinator-run.js';
import type { BenchContext, Part } from './part.js';
import { runProcess, tandemLoad, withCluster } from './processes.js';

const REQUESTS = 10_000;
const WARM_UP_REQUESTS = 2_000;
const OUTPUT_TOKENS = 4;
const PIECES = 5;

interface Resident {
  readonly requests: number;
  readonly coordinatorBytes: number;
  readonly workersBytes: number;
}

export const memory: Part = {
  name: 'memory',
  title: `Memory over ${REQUESTS} requests, after ${WARM_UP_REQUESTS} others`,
  async run(context) {
    const server = await throughServer(context);
    context.progress('memory: the coordinator alone');
    const total = WARM_UP_REQUESTS + REQUESTS;
    const args = ['--requests', String(total), '--new-tokens', String(OUTPUT_TOKENS), '--prompt-tokens', '16'];
    const alone = (await runProcess<CoordinatorRun>('coordinator-process.js', args, ['--expose-gc'])).memory.filter(
      ({ requests }) => requests >= WARM_UP_REQUESTS,
    );
    const heap = alone.map(({ requests, heapBytes }) => [requests, heapBytes] as const);
    const aloneRss = alone.map(({ requests, rssBytes }) => [requests, rssBytes] as const);
    const coordinator = server.map(({ requests, coordinatorBytes }) => [requests, coordinatorBytes] as const);
    const workers = server.map(({ requests, workersBytes }) => [requests, workersBytes] as const);
    const rows = [
      { what: 'server: coordinator, resident', points: coordinator },
      { what: 'server: both workers, resident', points: workers },
      { what: 'coordinator alone: heap after collection', points: heap },
      { what: 'coordinator alone: resident', points: aloneRss },
    ].map(({ what, points }) => ({ what, beforeBytes: points[0]![1], afterBytes: points.at(-1)![1], bytesPerRequest: slope(points) }));
    return {
      header: ['memory', 'before', 'after', 'bytes per request'],
      rows: rows.map(({ what, beforeBytes, afterBytes, bytesPerRequest }) => [
        what,
        formatBytes(beforeBytes),
        formatBytes(afterBytes),
        bytesPerRequest.toFixed(0),
      ]),
      notes: [
        'the slope is that of the straight line through all samples; the heap of the server itself cannot be collected from outside, so the',
        'heap is that of the coordinator over the echo engine, which serves the same requests without workers and network',
      ],
      data: { requests: REQUESTS, warmUpRequests: WARM_UP_REQUESTS, rows, server, alone },
      failures: [],
    };
  },
};

function throughServer({ progress }: BenchContext): Promise<Resident[]> {
  return withCluster({ model: null, worldSize: 2 }, async (cluster) => {
    const send = async (requests: number, seed: number): Promise<void> => {
      const flags = { concurrency: 64, requests, seed, 'prompt-tokens': 16, 'output-tokens': OUTPUT_TOKENS };
      const load = await tandemLoad(cluster.address, flags);
      if (load.requests.finished !== requests) throw new Error(`${load.requests.finished} of ${requests} requests were answered`);
    };
    await send(WARM_UP_REQUESTS, 1);
    const samples = [await residentOf(cluster, 0)];
    for (let piece = 1; piece <= PIECES; piece++) {
      await send(REQUESTS / PIECES, 1 + piece);
      samples.push(await residentOf(cluster, (piece * REQUESTS) / PIECES));
      progress(`memory: ${samples.at(-1)!.requests} requests, ${formatBytes(samples.at(-1)!.coordinatorBytes)}`);
    }
    return samples;
  });
}

async function residentOf({ client, pid }: LocalCluster, requests: number): Promise<Resident> {
  await sleep(1500); // a heartbeat brings the workers' figures
  const { workers } = await client.status();
  const kibibytes = Number(/^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))![1]);
  return { requests, coordinatorBytes: kibibytes * 1024, workersBytes: workers.reduce((sum, { rssBytes }) => sum + rssBytes, 0) };
}

/** Least squares. */
function slope(points: readonly (readonly [number, number])[]): number {
  const mean = (i: 0 | 1): number => points.reduce((sum, point) => sum + point[i], 0) / points.length;
  const [x, y] = [mean(0), mean(1)];
  const covariance = points.reduce((sum, [px, py]) => sum + (px - x) * (py - y), 0);
  return covariance / points.reduce((sum, [px]) => sum + (px - x) ** 2, 0);
}
