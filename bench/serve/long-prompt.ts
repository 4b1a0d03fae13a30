import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { percentiles, type Percentiles } from '../../cli/load/summary.js';
import type { ModelConfig } from '../../model/model-config.js';
import { SYNTHETIC_CONFIG, writeSyntheticStore } from '../synthetic-store.js';
import { median, type BenchContext, type Part } from './part.js';
import { tandemLoad, withCluster } from './processes.js';

const STREAMS = 8;
const STREAM_SECONDS = 5;

/** Small enough that a prompt of full length takes about a second, with as many layers as to slice well. */
const DEEP_CONFIG: ModelConfig = {
  ...SYNTHETIC_CONFIG,
  numLayers: 24,
  hiddenSize: 512,
  numAttentionHeads: 8,
  innerHiddenSize: 1376,
  vocabSize: 8192,
  maxSequenceLength: 1024,
  specialTokens: { mask: 8180, gmask: 8181, smask: 8182, eod: 8183, sop: 8184, eop: 8185, enc: 8186, dblock: 8187, eos: 2 },
};

interface ModelCase {
  readonly name: string;
  /** Null: tiny. */
  readonly dir: string | null;
  readonly maxTokens: number;
  readonly layers: number;
  /** Prompts of full length in a second. */
  readonly rate: number;
}

const WAYS = [
  { name: 'whole prompts', maxStepTokens: '0' },
  { name: 'sliced, 256 tokens a step', maxStepTokens: '256' },
] as const;

interface Run {
  /** Between tokens of the streams, where any of it lies between the arrival of a long prompt and its first token. */
  readonly interToken: Percentiles;
  /** Of the long prompts. */
  readonly ttft: Percentiles;
}

export const longPrompt: Part = {
  name: 'longprompt',
  title: `Milliseconds between the tokens of ${STREAMS} running streams while a prompt of full length is under way (2 workers)`,
  async run(context) {
    const measured = [];
    for (const model of await cases(context)) {
      const runs: Run[][] = [];
      for (let repeat = 0; repeat < context.repeats; repeat++) {
        const row: Run[] = [];
        for (const way of WAYS) {
          row.push(await measure(context, model, way.maxStepTokens, repeat));
          context.progress(`longprompt: ${model.name}, ${way.name}: p99 ${row.at(-1)!.interToken.p99.toFixed(1)} ms`);
        }
        runs.push(row);
      }
      measured.push({
        model: model.name,
        layers: model.layers,
        promptTokens: model.maxTokens,
        ways: WAYS.map(({ name, maxStepTokens }, i) => ({
          name,
          maxStepTokens: Number(maxStepTokens),
          p50Ms: median(runs.map((row) => row[i]!.interToken.p50)),
          p99Ms: median(runs.map((row) => row[i]!.interToken.p99)),
          maxMs: median(runs.map((row) => row[i]!.interToken.max)),
          promptTtftMs: median(runs.map((row) => row[i]!.ttft.p50)),
          // Within one run: how much better than with whole prompts.
          ratios: {
            p99: median(runs.map((row) => row[0]!.interToken.p99 / row[i]!.interToken.p99)),
            max: median(runs.map((row) => row[0]!.interToken.max / row[i]!.interToken.max)),
          },
        })),
        runs,
      });
    }
    return {
      header: ['model', 'long prompts', 'between tokens p50', 'p99', 'max', 'first token of a long prompt p50'],
      rows: measured.flatMap(({ model, ways }) =>
        ways.map((way) => [model, way.name, ...[way.p50Ms, way.p99Ms, way.maxMs, way.promptTtftMs].map((ms) => ms.toFixed(1))]),
      ),
      notes: measured.flatMap(({ model, ways }) =>
        ways
          .slice(1)
          .map(
            ({ name, ratios }) =>
              `${model}: whole prompts make p99 ${ratios.p99.toFixed(2)} times and the longest ${ratios.max.toFixed(2)} times that of ${name}`,
          ),
      ),
      data: { streams: STREAMS, measured },
      failures: [],
    };
  },
};

async function cases({ scratch, progress }: BenchContext): Promise<ModelCase[]> {
  progress('longprompt: writing the synthetic model');
  const dir = join(scratch, 'deep');
  await writeSyntheticStore(dir, DEEP_CONFIG);
  return [
    { name: 'tiny, 6 layers, 500 tokens', dir: null, maxTokens: 500, layers: 6, rate: 4 },
    { name: 'synthetic INT4, 24 layers, 1000 tokens', dir, maxTokens: 1000, layers: DEEP_CONFIG.numLayers, rate: 0.5 },
  ];
}

function measure({ scratch }: BenchContext, model: ModelCase, maxStepTokens: string, repeat: number): Promise<Run> {
  return withCluster({ model: model.dir, worldSize: 2, flags: [`--max-step-tokens=${maxStepTokens}`] }, async ({ address }) => {
    const seed = 1 + repeat;
    const records = { streams: join(scratch, 'streams.jsonl'), prompts: join(scratch, 'prompts.jsonl') };
    await tandemLoad(address, { concurrency: STREAMS, requests: 2 * STREAMS, 'output-tokens': 16, seed: 100 + seed });
    const streams = tandemLoad(address, {
      concurrency: STREAMS,
      'duration-s': STREAM_SECONDS,
      'prompt-tokens': 16,
      'output-tokens': Math.min(400, model.maxTokens - 20),
      seed,
      record: records.streams,
    });
    const prompts = tandemLoad(address, {
      rate: model.rate,
      arrivals: 'constant',
      'duration-s': STREAM_SECONDS,
      'prompt-tokens': model.maxTokens,
      'output-tokens': 1,
      seed: 200 + seed,
      record: records.prompts,
    });
    const [running, long] = await Promise.all([streams, prompts]);
    if (running.requests.failed + long.requests.failed > 0) throw new Error([...running.errors, ...long.errors][0]!.example);
    const interToken = percentiles(gapsDuring(readRecord(records.streams), readRecord(records.prompts)));
    if (interToken === null) throw new Error('no stream got a token while a long prompt was under way');
    return { interToken, ttft: long.latencyMs.ttft! };
  });
}

/** A line of `tandem load --record`, as far as it is looked at. */
interface Recorded {
  readonly intendedUnixMs: number;
  readonly tokenTimesMs: readonly number[];
}

function readRecord(path: string): Recorded[] {
  const lines = readFileSync(path, 'utf8').trim().split('\n');
  return lines.map((line) => JSON.parse(line) as Recorded);
}

/** Most gaps of a run have nothing to do with the few long prompts: over all of them, a percentile says how rare stalls are, not how long. */
function gapsDuring(streams: readonly Recorded[], prompts: readonly Recorded[]): number[] {
  const windows = prompts.map(({ intendedUnixMs, tokenTimesMs }) => [intendedUnixMs, intendedUnixMs + tokenTimesMs[0]!] as const);
  return streams.flatMap(({ intendedUnixMs, tokenTimesMs }) =>
    tokenTimesMs.slice(1).flatMap((endMs, i) => {
      const [from, to] = [intendedUnixMs + tokenTimesMs[i]!, intendedUnixMs + endMs];
      return windows.some(([begin, end]) => from < end && to > begin) ? [to - from] : [];
    }),
  );
}
