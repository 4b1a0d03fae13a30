import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { BenchContext, Part } from './part.js';
import { tandemLoad, withCluster } from './processes.js';
import { vanishRequest } from './vanish-request.js';
import { vanishRun } from './vanish.js';

const STREAMS = 64;
const REQUESTS = 128;

interface Comparison {
  readonly load: string;
  readonly compared: number;
  readonly tokens: number;
  readonly different: readonly number[];
}

export const equal: Part = {
  name: 'equal',
  title: 'Greedy outputs under load, compared token by token with those of the same requests alone',
  async run(context) {
    const comparisons = [await streams(context), await survivors(context)];
    return {
      header: ['load', 'requests compared', 'tokens', 'different'],
      rows: comparisons.map(({ load, compared, tokens, different }) => [load, String(compared), String(tokens), String(different.length)]),
      notes: [],
      data: { comparisons },
      failures: comparisons
        .filter(({ different }) => different.length > 0)
        .map(({ load, different }) => `${load}: ${different.length} outputs differ, of requests ${different.slice(0, 10).join(', ')}`),
    };
  },
};

/** `tandem load` sends the same requests for the same seed. */
async function streams({ scratch, progress }: BenchContext): Promise<Comparison> {
  const outputs = async (concurrency: number): Promise<Map<number, string>> =>
    withCluster({ model: null, worldSize: 2 }, async ({ address }) => {
      const record = join(scratch, `equal-${concurrency}.jsonl`);
      const lengths = { 'prompt-tokens': 'uniform:8:120', 'output-tokens': 'uniform:16:96' };
      const load = await tandemLoad(address, { concurrency, requests: REQUESTS, seed: 5, record, ...lengths });
      progress(`equal: ${load.requests.finished} requests, ${concurrency} at once`);
      const lines = readFileSync(record, 'utf8').trim().split('\n');
      return new Map(
        lines.map((line) => {
          const { index, tokens } = JSON.parse(line) as { index: number; tokens: number[] };
          return [index, tokens.join(' ')] as const;
        }),
      );
    });
  return compare(`${STREAMS} streams of mixed lengths`, await outputs(STREAMS), await outputs(1));
}

async function survivors(context: BenchContext): Promise<Comparison> {
  const { finished } = await vanishRun(context);
  const alone = new Map<number, string>();
  await withCluster({ model: null, worldSize: 2 }, async ({ client }) => {
    for (const { client: number } of finished) {
      const { outputs } = await client.generate(vanishRequest(number));
      alone.set(number, outputs[0]!.blanks[0]!.tokens.join(' '));
    }
  });
  context.progress(`equal: ${alone.size} requests alone`);
  const underLoad = new Map(finished.map(({ client, tokens }) => [client, tokens.join(' ')]));
  return compare('1000 clients, half of which vanish', underLoad, alone);
}

function compare(load: string, underLoad: ReadonlyMap<number, string>, alone: ReadonlyMap<number, string>): Comparison {
  if (underLoad.size !== alone.size || underLoad.size === 0) throw new Error(`${underLoad.size} outputs under load, ${alone.size} alone`);
  const different = [...underLoad].filter(([index, tokens]) => alone.get(index) !== tokens).map(([index]) => index);
  const tokens = [...underLoad.values()].reduce((sum, text) => sum + text.split(' ').length, 0);
  return { load, compared: underLoad.size, tokens, different };
}
