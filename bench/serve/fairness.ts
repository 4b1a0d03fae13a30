import { createHash, randomBytes } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { LoadReport } from '../../cli/load/report.js';
import { median, type BenchContext, type Part } from './part.js';
import { tandemLoad, withCluster } from './processes.js';

const GREEDY_STREAMS = 256;
const MODEST = { rate: 4, seconds: 6, promptTokens: 32, outputTokens: 32 };
/** For the flood to fill the queue. */
const FLOOD_MS = 2000;

interface Run {
  readonly alone: LoadReport;
  readonly beside: LoadReport;
  readonly flood: LoadReport;
}

export const fairness: Part = {
  name: 'fairness',
  title: `A key with ${MODEST.rate} requests/s, alone and beside another key that keeps ${GREEDY_STREAMS} requests under way`,
  async run(context) {
    const runs: Run[] = [];
    for (let repeat = 0; repeat < context.repeats; repeat++) {
      runs.push(await runOnce(context, repeat));
      const { alone, beside } = runs.at(-1)!;
      context.progress(
        `fairness: p99 to the first token ${alone.latencyMs.ttft!.p99.toFixed(1)} ms, beside ${beside.latencyMs.ttft!.p99.toFixed(1)} ms`,
      );
    }
    const figures = (which: 'alone' | 'beside' | 'flood') => {
      const of = (figure: (report: LoadReport) => number): number => median(runs.map((run) => figure(run[which])));
      return {
        ttftP50Ms: of(({ latencyMs }) => latencyMs.ttft!.p50),
        ttftP99Ms: of(({ latencyMs }) => latencyMs.ttft!.p99),
        e2eP50Ms: of(({ latencyMs }) => latencyMs.e2e!.p50),
        e2eP99Ms: of(({ latencyMs }) => latencyMs.e2e!.p99),
        queueP99Ms: of(({ latencyMs }) => latencyMs.serverQueue!.p99),
      };
    };
    const measured = { alone: figures('alone'), beside: figures('beside'), flood: figures('flood') };
    const ratio = (metric: 'ttft' | 'e2e'): number =>
      median(runs.map(({ alone, beside }) => beside.latencyMs[metric]!.p99 / alone.latencyMs[metric]!.p99));
    return {
      header: ['milliseconds', 'first token p50', 'p99', 'end to end p50', 'p99', 'in the queue p99'],
      rows: [
        ['the modest key alone', ...cells(measured.alone)],
        ['the modest key beside the flood', ...cells(measured.beside)],
        ['the flooding key', ...cells(measured.flood)],
      ],
      notes: [
        `beside the flood the modest key's p99 is ${ratio('ttft').toFixed(2)} times (first token) and ${ratio('e2e').toFixed(2)} times (end to end) its p99 alone`,
        `without fairness it would wait as the flood does: ${measured.flood.queueP99Ms.toFixed(0)} ms in the queue`,
      ],
      data: { greedyStreams: GREEDY_STREAMS, modest: MODEST, measured, ratios: { ttftP99: ratio('ttft'), e2eP99: ratio('e2e') } },
      failures: [],
    };
  },
};

function cells(figures: { ttftP50Ms: number; ttftP99Ms: number; e2eP50Ms: number; e2eP99Ms: number; queueP99Ms: number }): string[] {
  const { ttftP50Ms, ttftP99Ms, e2eP50Ms, e2eP99Ms, queueP99Ms } = figures;
  return [ttftP50Ms, ttftP99Ms, e2eP50Ms, e2eP99Ms, queueP99Ms].map((ms) => ms.toFixed(1));
}

function runOnce({ scratch }: BenchContext, repeat: number): Promise<Run> {
  const keys = { modest: randomBytes(32).toString('base64url'), greedy: randomBytes(32).toString('base64url') };
  const file = join(scratch, 'api-keys.json');
  const entries = Object.entries(keys).map(([name, key]) => ({
    name,
    sha256: createHash('sha256').update(key).digest('hex'),
    roles: ['infer'],
  }));
  writeFileSync(file, JSON.stringify({ keys: entries }), { mode: 0o600 });
  const common = { 'token-range': '1000:3700' };
  return withCluster({ model: null, worldSize: 2, flags: [`--api-keys=${file}`] }, async ({ address }) => {
    const modest = (seed: number): Promise<LoadReport> =>
      tandemLoad(address, {
        ...common,
        'api-key': keys.modest,
        rate: MODEST.rate,
        'duration-s': MODEST.seconds,
        'prompt-tokens': MODEST.promptTokens,
        'output-tokens': MODEST.outputTokens,
        'warm-up': 16,
        seed,
      });
    const alone = await modest(1 + repeat);
    const flooding = tandemLoad(address, {
      ...common,
      'api-key': keys.greedy,
      concurrency: GREEDY_STREAMS,
      'duration-s': MODEST.seconds + (2 * FLOOD_MS) / 1000,
      'prompt-tokens': 64,
      'output-tokens': 64,
      seed: 100 + repeat,
    });
    await sleep(FLOOD_MS);
    const beside = await modest(1 + repeat); // the very same requests at the same times
    return { alone, beside, flood: await flooding };
  });
}
