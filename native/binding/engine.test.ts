import { spawnSync } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { CheckpointError, ConfigError, EngineError } from '../../common/errors.js';
import { decodeResultBody, encodeStepBody, type StepExtend, type StepWant } from '../../common/step-codec.js';
import { kvBlockBytes } from '../../model/kv-blocks.js';
import {
  loadAddon,
  nativeErrorCode,
  type LoadProgress,
  type NativeEngine,
  type NativeIsa,
  type NativeEngineOptions,
  type NativeSamplingParams,
  type NativeStepResult,
} from './addon.js';
import {
  logProbabilities,
  randomNumbers,
  type RandomModel,
  referenceLogits,
  type ReferenceRun,
  smallConfig,
  type WeightFormat,
  writeRandomModel,
} from './random-model.js';

const blockSize = 4;
const folder = mkdtempSync(path.join(os.tmpdir(), 'tandem-engine-test-'));
const models = new Map<WeightFormat, RandomModel>();
const native = loadAddon();
/** Each has the ones before it that are of its family of processors. */
const ISAS = ['generic', 'avx2', 'avx512', 'avx512vnni', 'neon'] as const;
const FAMILY = native.build.isa === 'neon' ? (['generic', 'neon'] as const) : (['generic', 'avx2', 'avx512', 'avx512vnni'] as const);
const SUPPORTED_ISAS: readonly NativeIsa[] = FAMILY.slice(0, [...FAMILY].findIndex((isa) => isa === native.build.isa) + 1);

beforeAll(() => {
  for (const format of ['fp32', 'fp16', 'int8', 'int4'] as const) {
    const modelFolder = mkdtempSync(path.join(folder, `${format}-`));
    models.set(format, writeRandomModel(modelFolder, format, 7));
  }
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

interface GroupOptions {
  readonly format?: WeightFormat;
  readonly worldSize?: number;
  readonly kvDtype?: 'fp16' | 'fp32';
  readonly isa?: NativeEngineOptions['isa'];
  readonly activations?: NativeEngineOptions['activations'];
  readonly quantizeEmbedding?: NativeEngineOptions['quantizeEmbedding'];
  readonly threads?: number;
  readonly maxBatchTokens?: number;
  readonly timeoutMs?: number;
}

function engineOptions(options: GroupOptions, rank: number, name: string): NativeEngineOptions {
  const model = models.get(options.format ?? 'fp32')!;
  const worldSize = options.worldSize ?? 1;
  return {
    model: model.config,
    tensors: model.tensors,
    rank,
    worldSize,
    device: 'cpu',
    gpu: 0,
    threads: options.threads ?? 1,
    cpus: [],
    isa: options.isa ?? null,
    activations: options.activations ?? 'float',
    quantizeEmbedding: options.quantizeEmbedding ?? 'none',
    kv: { numBlocks: 200, blockSize, dtype: options.kvDtype ?? 'fp32' },
    maxBatchTokens: options.maxBatchTokens ?? 512,
    communicator: worldSize === 1 ? null : { name, timeoutMs: options.timeoutMs ?? 20_000 },
  };
}

/** All ranks of one model in this process, each on its own thread. */
async function withGroup(options: GroupOptions, body: (run: (step: StepInput) => Promise<DecodedResult>, ranks: NativeEngine[]) => Promise<void>) {
  const name = `test-${randomUUID()}`;
  const ranks = await Promise.all(
    Array.from({ length: options.worldSize ?? 1 }, (_, rank) => native.createEngine(engineOptions(options, rank, name))),
  );
  let steps = 0;
  const run = async (input: StepInput): Promise<DecodedResult> => {
    const body = bodyOf(input);
    const stepId = ++steps;
    const [first, ...others] = await Promise.all(ranks.map((rank) => decoded(rank.step(stepId, body))));
    for (const other of others) expect(other.results).toEqual([]);
    expect(first!.stepId).toBe(stepId);
    return first!;
  };
  try {
    await body(run, ranks);
  } finally {
    await Promise.all(ranks.map((rank) => rank.dispose()));
  }
}

interface StepInput {
  readonly extends: readonly StepExtend[];
  readonly blockCopies?: readonly number[] | undefined;
}

function bodyOf({ extends: all, blockCopies = [] }: StepInput): Uint8Array {
  return encodeStepBody({ blockCopies, extends: all });
}

type DecodedResult = Omit<NativeStepResult, 'body'> & { readonly results: ReturnType<typeof decodeResultBody> };

async function decoded(step: Promise<NativeStepResult>): Promise<DecodedResult> {
  const { body, ...rest } = await step;
  return { ...rest, results: decodeResultBody(body) };
}

function extend(run: ReferenceRun, blockTable: readonly number[], cachedTokens: number, want: StepWant): StepExtend {
  return {
    tokens: Uint32Array.from(run.tokens),
    positions: Uint32Array.from(run.positions),
    blockTable: Uint32Array.from(blockTable),
    cachedTokens,
    bidirectionalTokens: run.bidirectionalTokens,
    firstLayer: 0,
    endLayer: smallConfig.numLayers,
    want,
    sampledBy: -1,
  };
}

/** A context of `context` tokens, the last one `<sop>`, then `generated` tokens one by one, continuing positions. */
function randomRuns(seed: number, context: number, generated: number): ReferenceRun[] {
  const random = randomNumbers(seed);
  const token = (): number => Math.floor(random() * smallConfig.vocabSize);
  const range = (from: number, count: number): number[] => Array.from({ length: count }, (_, i) => from + i);
  const prefill = { tokens: range(0, context).map(token), positions: range(0, context), bidirectionalTokens: context - 1 };
  return [prefill, ...range(context, generated).map((position) => ({ tokens: [token()], positions: [position], bidirectionalTokens: 0 }))];
}

/** The same as one run: what recovery sends. */
function joined(runs: readonly ReferenceRun[]): ReferenceRun {
  return {
    tokens: runs.flatMap((run) => run.tokens),
    positions: runs.flatMap((run) => run.positions),
    bidirectionalTokens: runs[0]!.bidirectionalTokens,
  };
}

const blocks = (first: number, tokens: number): number[] => Array.from({ length: Math.ceil(tokens / blockSize) }, (_, i) => first + i);
const allLogits = (run: ReferenceRun): StepWant => ({ kind: 'logits', rows: run.tokens.length });
const params: NativeSamplingParams = {
  temperature: 0,
  topK: 0,
  topP: 0,
  bannedTokens: new Uint32Array(),
  biasTokens: new Uint32Array(),
  biases: new Float32Array(),
  repetitionPenalty: 1,
  repeatedTokens: new Uint32Array(),
};
const noise = { seed: 12345678901234567890n, stream: 1, position: 3 };

function logitsOf(result: DecodedResult, index = 0): Float32Array {
  const extended = result.results[index]!;
  if (extended.kind !== 'logits') throw new Error(`expected logits, got ${extended.kind}`);
  return extended.logits;
}

function maxDifference(seen: Float32Array, expected: readonly Float64Array[]): number {
  expect(seen.length).toBe(expected.length * smallConfig.vocabSize);
  return expected.flatMap((row) => [...row]).reduce((max, value, i) => {
    const difference = Math.abs(value - seen[i]!);
    return Number.isNaN(difference) ? Infinity : Math.max(max, difference);
  }, 0);
}

async function runAll(run: (step: StepInput) => Promise<DecodedResult>, runs: readonly ReferenceRun[], table: readonly number[]): Promise<Float32Array> {
  const rows: number[] = [];
  let cached = 0;
  for (const next of runs) {
    rows.push(...logitsOf(await run({ extends: [extend(next, table, cached, allLogits(next))] })));
    cached += next.tokens.length;
  }
  return Float32Array.from(rows);
}

describe('forward pass', () => {
  const runs = randomRuns(1, 11, 4);

  test.each(
    (['fp32', 'fp16', 'int8', 'int4'] as const).flatMap((format) => [1, 2, 4].map((worldSize) => ({ format, worldSize }))),
  )('is the specification in double precision: $format, world size $worldSize', async ({ format, worldSize }) => {
    const expected = referenceLogits(models.get(format)!, runs);
    expect(Math.max(...expected[0]!) - Math.min(...expected[0]!)).toBeGreaterThan(1); // not a degenerate model
    await withGroup({ format, worldSize }, async (run) => {
      expect(maxDifference(await runAll(run, runs, blocks(3, 15)), expected)).toBeLessThan(1e-4);
    });
  });

  test.each(ISAS)('is the same with %s kernels', async (isa) => {
    if (!SUPPORTED_ISAS.includes(isa)) {
      await expect(native.createEngine(engineOptions({ isa }, 0, ''))).rejects.toThrow(/^isa: /);
      return;
    }
    await withGroup({ isa, threads: 2 }, async (run) => {
      expect(maxDifference(await runAll(run, runs, blocks(3, 15)), referenceLogits(models.get('fp32')!, runs))).toBeLessThan(1e-4);
    });
  });

  test('a fully bidirectional, a causal and a partly bidirectional run with repeated positions', async () => {
    const [{ tokens }] = randomRuns(2, 13, 0) as [ReferenceRun];
    const positions = tokens.map((_, i) => Math.min(i, 9));
    await withGroup({}, async (run) => {
      for (const bidirectionalTokens of [13, 0, 1, 5]) {
        const only = { tokens, positions, bidirectionalTokens };
        const seen = logitsOf(await run({ extends: [extend(only, blocks(0, 13), 0, allLogits(only))] }));
        expect(maxDifference(seen, referenceLogits(models.get('fp32')!, [only]))).toBeLessThan(1e-4);
      }
    });
  });

  test('logits of more rows than one gather takes', async () => {
    const [long] = randomRuns(3, 100, 0) as [ReferenceRun];
    await withGroup({ worldSize: 2 }, async (run) => {
      const seen = logitsOf(await run({ extends: [extend(long, blocks(0, 100), 0, allLogits(long))] }));
      expect(maxDifference(seen, referenceLogits(models.get('fp32')!, [long]))).toBeLessThan(1e-4);
    });
  });
});

describe('the same bits', () => {
  test.each([
    { format: 'fp16', worldSize: 1, kvDtype: 'fp16' },
    { format: 'fp32', worldSize: 2, kvDtype: 'fp32' },
    { format: 'int4', worldSize: 4, kvDtype: 'fp16' },
    { format: 'int4', worldSize: 2, kvDtype: 'fp16', activations: 'int8', quantizeEmbedding: 'int8' },
    { format: 'int8', worldSize: 1, kvDtype: 'fp32', activations: 'int8' },
  ] as const)('one token at a time, or recomputed as one run: $format, world size $worldSize, KV $kvDtype, $activations', async (options) => {
    const runs = randomRuns(4, 9, 12);
    const next = { tokens: [5], positions: [21], bidirectionalTokens: 0 };
    await withGroup(options, async (run) => {
      const incremental = await runAll(run, [...runs, next], blocks(0, 22));
      const whole = joined(runs);
      const recomputed = logitsOf(await run({ extends: [extend(whole, blocks(50, 22), 0, allLogits(whole))] }));
      expect(recomputed).toEqual(incremental.slice(0, recomputed.length));
      // The keys and values must be the same too: the next token reads them.
      const after = logitsOf(await run({ extends: [extend(next, blocks(50, 22), 21, allLogits(next))] }));
      expect(after).toEqual(incremental.slice(recomputed.length));
    });
  });

  test.each([
    { format: 'fp16', worldSize: 1 },
    { format: 'fp16', worldSize: 2 },
    { format: 'int4', worldSize: 2, activations: 'int8', quantizeEmbedding: 'int8' },
  ] as const)('alone, or with 32 others: $format, world size $worldSize, $activations', async (options) => {
    const [prefill, decode] = randomRuns(5, 10, 1) as [ReferenceRun, ReferenceRun];
    await withGroup({ ...options, kvDtype: 'fp16', threads: 2 }, async (run) => {
      const alone = await runAll(run, [prefill, decode], blocks(0, 11));
      const others = Array.from({ length: 32 }, (_, i) => {
        const [other] = randomRuns(100 + i, 1 + (i % 17), 0) as [ReferenceRun];
        return extend(other, blocks(20 + 5 * i, other.tokens.length), 0, i % 3 === 0 ? allLogits(other) : { kind: 'none' });
      });
      for (const place of [0, 16, 32]) {
        const together = async (mine: StepExtend): Promise<Float32Array> =>
          logitsOf(await run({ extends: [...others.slice(0, place), mine, ...others.slice(place)] }), place);
        const first = await together(extend(prefill, blocks(10, 11), 0, allLogits(prefill)));
        const second = await together(extend(decode, blocks(10, 11), 10, allLogits(decode)));
        expect(Float32Array.from([...first, ...second])).toEqual(alone);
      }
    });
  });

  test('a fork with a copied block, and the parent unharmed', async () => {
    const runs = randomRuns(6, 10, 3); // the context fills two blocks and half of the third
    const other = { tokens: [9], positions: [10], bidirectionalTokens: 0 };
    await withGroup({ kvDtype: 'fp16' }, async (run) => {
      const [prefill, first, second, third] = runs as [ReferenceRun, ReferenceRun, ReferenceRun, ReferenceRun];
      const parentAlone = await runAll(run, runs, blocks(0, 13));
      const forkAlone = await runAll(run, [prefill, other], blocks(10, 11));

      await run({ extends: [extend(prefill, [20, 21, 22], 0, { kind: 'none' })] });
      const step = { blockCopies: [22, 30], extends: [extend(first, [20, 21, 22], 10, allLogits(first)), extend(other, [20, 21, 30], 10, allLogits(other))] };
      const both = await run(step);
      const rest = [
        logitsOf(await run({ extends: [extend(second, [20, 21, 22], 11, allLogits(second))] })),
        logitsOf(await run({ extends: [extend(third, [20, 21, 22, 23], 12, allLogits(third))] })),
      ];
      const row = smallConfig.vocabSize;
      expect(logitsOf(both, 1)).toEqual(forkAlone.slice(10 * row));
      expect(Float32Array.from([...logitsOf(both, 0), ...rest[0]!, ...rest[1]!])).toEqual(parentAlone.slice(10 * row));
    });
  });
});

describe('int8', () => {
  const runs = randomRuns(25, 12, 4);
  const logitsWith = async (options: GroupOptions): Promise<Float32Array> => {
    let logits = new Float32Array();
    await withGroup(options, async (run) => {
      logits = Float32Array.from(await runAll(run, runs, blocks(0, 16)));
    });
    return logits;
  };
  /** The largest difference, over the root mean square. */
  const relativeError = (seen: Float32Array, exact: Float32Array): number => {
    const meanSquare = exact.reduce((sum, value) => sum + value * value, 0) / exact.length;
    return seen.reduce((max, value, i) => Math.max(max, Math.abs(value - exact[i]!)), 0) / Math.sqrt(meanSquare);
  };

  test.each([
    { format: 'int4', worldSize: 1 },
    { format: 'int4', worldSize: 4 }, // columns of a rank begin within a scale group
    { format: 'int8', worldSize: 2 },
  ] as const)('activations change the logits of $format weights a little: world size $worldSize', async (options) => {
    const exact = await logitsWith(options);
    const rounded = await logitsWith({ ...options, activations: 'int8' });
    expect(relativeError(rounded, exact)).toBeGreaterThan(0);
    expect(relativeError(rounded, exact)).toBeLessThan(0.05);
  });

  test('activations are for quantised weights: those of fp16 meet floats', async () => {
    expect(await logitsWith({ format: 'fp16', activations: 'int8' })).toEqual(await logitsWith({ format: 'fp16' }));
  });

  test.each(['float', 'int8'] as const)('word embeddings change the logits a little, with %s activations', async (activations) => {
    const options = { format: 'int4', worldSize: 2, activations } as const;
    const exact = await logitsWith(options);
    const rounded = await logitsWith({ ...options, quantizeEmbedding: 'int8' });
    expect(relativeError(rounded, exact)).toBeGreaterThan(0);
    expect(relativeError(rounded, exact)).toBeLessThan(0.05);
  });
});

describe('wants', () => {
  test.each([1, 2])('agree with the logits: world size %i', async (worldSize) => {
    const [prefill] = randomRuns(8, 12, 0) as [ReferenceRun];
    const targets = Uint32Array.from([3, 131, 0]);
    const cut = { ...params, temperature: 1, topK: 3, topP: 0.9, bannedTokens: Uint32Array.from([1]) };
    const wants: StepWant[] = [
      { kind: 'none' },
      { kind: 'logits', rows: 3 },
      { kind: 'sample', params, noise, topLogprobs: 5 },
      { kind: 'sample', params: cut, noise, topLogprobs: 0 },
      { kind: 'candidates', count: 4, bannedTokens: new Uint32Array(), noise: null },
      { kind: 'candidates', count: 4, bannedTokens: new Uint32Array(), noise },
      { kind: 'targets', tokens: targets },
    ];
    await withGroup({ worldSize }, async (run) => {
      const { results, computeMicros, collectiveMicros, evaluateMicros } = await run({
        extends: wants.map((want, i) => extend(prefill, blocks(3 * i, 12), 0, want)),
      });
      expect(computeMicros).toBeGreaterThan(0);
      expect(evaluateMicros).toBeGreaterThan(0);
      expect(collectiveMicros + evaluateMicros).toBeLessThanOrEqual(computeMicros);
      const [none, logits, greedy, sampled, candidates, drawn, scored] = results;
      expect(none).toEqual({ kind: 'none' });
      if (logits?.kind !== 'logits' || greedy?.kind !== 'sample' || sampled?.kind !== 'sample') throw new Error('wrong kinds');
      if (candidates?.kind !== 'candidates' || drawn?.kind !== 'candidates' || scored?.kind !== 'targets') throw new Error('wrong kinds');
      const row = (i: number): Float64Array => logProbabilities(logits.logits.slice(i * smallConfig.vocabSize, (i + 1) * smallConfig.vocabSize));
      const last = row(2);
      const order = [...last.keys()].sort((a, b) => last[b]! - last[a]!);

      expect(greedy.token).toBe(order[0]);
      expect(greedy.logprob).toBeCloseTo(last[order[0]!]!, 5);
      expect([...greedy.topTokens]).toEqual(order.slice(0, 5));
      expect(greedy.topLogprobs[0]).toBe(greedy.logprob);
      greedy.topLogprobs.forEach((logprob, i) => expect(logprob).toBeCloseTo(last[order[i]!]!, 5));

      const allowed = native.distribution(logits.logits.slice(2 * smallConfig.vocabSize), cut);
      expect(allowed[sampled.token]).toBeGreaterThan(0);
      expect(sampled.logprob).toBeCloseTo(last[sampled.token]!, 5);
      expect(sampled.topTokens.length).toBe(0);

      expect([...candidates.tokens]).toEqual(order.slice(0, 4));
      expect(candidates.keys).toEqual(candidates.logprobs);
      expect(new Set(drawn.tokens).size).toBe(4);
      drawn.tokens.forEach((token, i) => expect(drawn.logprobs[i]).toBeCloseTo(last[token]!, 5));
      expect([...drawn.keys]).toEqual([...drawn.keys].sort((a, b) => b - a));
      scored.logprobs.forEach((logprob, i) => expect(logprob).toBeCloseTo(row(i)[targets[i]!]!, 5));
    });
  });

  test('the distribution is pure and checked', () => {
    const logits = Float32Array.from([1, 3, 2, 0]);
    const one = native.distribution(logits, { ...params, temperature: 1, topK: 2 });
    expect([...one].map((p) => p > 0)).toEqual([false, true, true, false]);
    expect([...one].reduce((a, b) => a + b)).toBeCloseTo(1, 6);
    expect([...logits]).toEqual([1, 3, 2, 0]);
    expect(() => native.distribution(logits, { ...params, topK: 5 })).toThrow(EngineError);
    expect(() => native.distribution([1] as unknown as Float32Array, params)).toThrow('logits: is not a Float32Array');
  });
});

describe('changes of the logits', () => {
  const change = {
    bannedTokens: Uint32Array.from([7]),
    biasTokens: Uint32Array.from([7, 90, 12]),
    biases: Float32Array.from([50, 9, 5]),
    repetitionPenalty: 1.5,
    repeatedTokens: Uint32Array.from([0, 1, 2, 3, 41, 90, 90, 131]),
  };
  /** Biases, then the penalty, then bans; each step rounded to fp32, as the engine's logits are. */
  const changed = (logits: Float32Array): Float32Array => {
    const all = Float32Array.from(logits);
    change.biasTokens.forEach((token, i) => (all[token]! += change.biases[i]!));
    const { repetitionPenalty } = change;
    for (const token of new Set(change.repeatedTokens)) all[token]! *= all[token]! > 0 ? 1 / repetitionPenalty : repetitionPenalty;
    all[7] = -Infinity;
    return all;
  };

  test('are what the draw is from, and not in the log-probabilities that are told', async () => {
    const [prefill] = randomRuns(15, 12, 0) as [ReferenceRun];
    const wants: StepWant[] = [
      { kind: 'logits', rows: 1 },
      { kind: 'sample', params, noise, topLogprobs: 5 },
      { kind: 'sample', params: { ...params, ...change }, noise, topLogprobs: 5 },
      ...Array.from({ length: 30 }, (_, stream): StepWant => {
        return { kind: 'sample', params: { ...params, ...change, temperature: 0.7, topK: 2 }, noise: { ...noise, stream }, topLogprobs: 5 };
      }),
    ];
    await withGroup({}, async (run) => {
      const result = await run({ extends: wants.map((want, i) => extend(prefill, blocks(3 * i, 12), 0, want)) });
      const logits = logitsOf(result);
      const samples = result.results.slice(1).map((each) => {
        if (each.kind !== 'sample') throw new Error(`expected a sample, got ${each.kind}`);
        return each;
      });
      const [plain, greedy, ...drawn] = samples;
      const own = logProbabilities(logits);
      const order = [...changed(logits).entries()].sort(([, a], [, b]) => b - a).map(([token]) => token);
      expect(order[0]).not.toBe(plain!.token); // or the changes show nothing
      expect(greedy!.token).toBe(order[0]);
      expect(new Set(drawn.map(({ token }) => token))).toEqual(new Set(order.slice(0, 2)));
      for (const sample of samples) {
        expect(sample.logprob).toBeCloseTo(own[sample.token]!, 5);
        expect(sample.topTokens).toEqual(plain!.topTokens);
        expect(sample.topLogprobs).toEqual(plain!.topLogprobs);
      }

      const seen = native.distribution(logits, { ...params, ...change, temperature: 0.7 });
      const expected = logProbabilities(changed(logits).map((logit) => logit / 0.7)).map(Math.exp);
      seen.forEach((probability, token) => expect(Math.abs(probability - expected[token]!), `token ${token}`).toBeLessThan(1e-6));
    });
  });
});

describe('layer slices', () => {
  const { numLayers } = smallConfig;

  test.each([
    { worldSize: 1, cuts: [1, 2] },
    { worldSize: 1, cuts: [2] },
    { worldSize: 2, cuts: [1, 2] },
  ])('of a run give the bits of the whole one, and hold up nobody: world size $worldSize, cuts at $cuts', async ({ worldSize, cuts }) => {
    const [prefill, ...decodes] = randomRuns(20, 11, 1 + numLayers) as [ReferenceRun, ...ReferenceRun[]];
    const [other, next] = randomRuns(21, 30, 1) as [ReferenceRun, ReferenceRun];
    await withGroup({ worldSize, kvDtype: 'fp16' }, async (run) => {
      const decodedAlone = await runAll(run, [prefill, ...decodes], blocks(0, 11 + decodes.length));
      const otherAlone = await runAll(run, [other, next], blocks(20, 31));

      await run({ extends: [extend(prefill, blocks(50, 15), 0, { kind: 'none' })] });
      const decoded: number[] = [...decodedAlone.slice(0, 11 * smallConfig.vocabSize)];
      const decode = (): StepExtend => {
        const at = decoded.length / smallConfig.vocabSize;
        return extend(decodes[at - 11]!, blocks(50, 15), at, { kind: 'logits', rows: 1 });
      };
      const sliced: number[] = [];
      for (const [i, endLayer] of [...cuts, numLayers].entries()) {
        const part = { ...extend(other, blocks(70, 31), 0, allLogits(other)), firstLayer: i === 0 ? 0 : cuts[i - 1]!, endLayer };
        const result = await run({ extends: [part, decode()] });
        decoded.push(...logitsOf(result, 1));
        if (endLayer === numLayers) sliced.push(...logitsOf(result, 0));
        else expect(result.results[0]).toEqual({ kind: 'none' });
      }
      while (decoded.length < decodedAlone.length) decoded.push(...logitsOf(await run({ extends: [decode()] })));
      sliced.push(...logitsOf(await run({ extends: [extend(next, blocks(70, 31), 30, allLogits(next))] })));
      expect(Float32Array.from(decoded)).toEqual(decodedAlone);
      expect(Float32Array.from(sliced)).toEqual(otherAlone);
    });
  });

  test('that do not go on where the run stopped are refused on every rank, and the run can still go on', async () => {
    const [whole] = randomRuns(22, 9, 0) as [ReferenceRun];
    const all = extend(whole, blocks(0, 9), 0, allLogits(whole));
    const part = (firstLayer: number, endLayer: number): StepExtend => ({ ...all, firstLayer, endLayer });
    await withGroup({ worldSize: 2 }, async (run, ranks) => {
      const refused = async (extended: StepExtend, message: string): Promise<void> => {
        for (const rank of ranks) {
          const error: unknown = await rank.step(1, bodyOf({ extends: [extended] })).catch((reason: unknown) => reason);
          expect(error).toBeInstanceOf(EngineError);
          expect((error as Error).message).toBe(message);
          expect(nativeErrorCode(error)).toBe('INVALID_ARGUMENT');
        }
      };
      const expected = logitsOf(await run({ extends: [part(0, numLayers)] }));
      await refused(part(1, 2), 'extends[0].firstLayer: 1, but no run is under way; begin one at layer 0');
      await run({ extends: [part(0, 1)] });
      await refused(part(2, 3), 'extends[0].firstLayer: 2, the run under way goes on at layer 1');
      expect(logitsOf(await run({ extends: [part(1, numLayers)] }))).toEqual(expected);
      await refused(part(1, 2), 'extends[0].firstLayer: 1, but no run is under way; begin one at layer 0');
    });
  });
});

describe('a token that the step before samples', () => {
  const sample = (position: number): StepWant => ({ kind: 'sample', params: { ...params, temperature: 8 }, noise: { ...noise, position }, topLogprobs: 2 });
  const contexts = [24, 25].map((seed) => randomRuns(seed, 7, 0)[0]!);
  const next = (sequence: number, step: number, token: number, sampledBy: number): StepExtend => {
    const run = { tokens: [token], positions: [contexts[sequence]!.positions.at(-1)! + step], bidirectionalTokens: 0 };
    return { ...extend(run, blocks(4 * sequence, 7 + step), 6 + step, sample(2 * step + sequence)), sampledBy };
  };
  const first: StepInput = { extends: contexts.map((context, sequence) => extend(context, blocks(4 * sequence, 7), 0, sample(sequence))) };
  /** Of three steps behind the first, the sequences in another order each time. */
  const orders = [
    [0, 1],
    [1, 0],
    [0, 1],
  ];

  test.each([1, 2])('is the one that it drew, whether the step is sent before or after: world size %i', async (worldSize) => {
    await withGroup({ worldSize }, async (run) => {
      const known = [await run(first)];
      for (const [i, order] of orders.entries()) {
        const token = (sequence: number): number => {
          const result = known[i]!.results[i === 0 ? sequence : orders[i - 1]!.indexOf(sequence)]!;
          return result.kind === 'sample' ? result.token : -1;
        };
        known.push(await run({ extends: order.map((sequence) => next(sequence, i + 1, token(sequence), -1)) }));
      }
      const ahead = await Promise.all([
        run(first),
        ...orders.map((order, i) =>
          run({ extends: order.map((sequence) => next(sequence, i + 1, 0, i === 0 ? sequence : orders[i - 1]!.indexOf(sequence))) }),
        ),
      ]);
      expect(ahead.map(({ results }) => results)).toEqual(known.map(({ results }) => results));
      expect(new Set(ahead.flatMap(({ results }) => results.map((each) => each.kind === 'sample' && each.token))).size).toBeGreaterThan(2);
    });
  });

  test('is refused where there is none, on every rank', async () => {
    const none = { ...first, extends: [{ ...first.extends[0]!, want: { kind: 'none' as const } }, first.extends[1]!] };
    const two = { ...next(0, 1, 0, 1), tokens: Uint32Array.of(1, 2), positions: Uint32Array.of(1, 2) };
    await withGroup({ worldSize: 2 }, async (run, ranks) => {
      const refused = async (extended: StepExtend, message: string): Promise<void> => {
        for (const rank of ranks) {
          const error: unknown = await rank.step(1, bodyOf({ extends: [extended] })).catch((reason: unknown) => reason);
          expect((error as Error).message).toBe(message);
          expect(nativeErrorCode(error)).toBe('INVALID_ARGUMENT');
        }
      };
      await refused(next(0, 1, 0, 0), 'extends[0].sampledBy: 0, the step before had 0 Extends');
      await run(none);
      await refused(next(0, 1, 0, 0), 'extends[0].sampledBy: 0, which drew no sample in the step before');
      await refused(next(1, 1, 0, 1), 'extends[0].sampledBy: 1, the step before had 0 Extends'); // it was refused
      await run(none);
      await refused(two, 'extends[0].sampledBy: is given for a run of 2 tokens, a sample is one');
      await run(none);
      expect((await run({ extends: [next(1, 1, 0, 1)] })).results).toMatchObject([{ kind: 'sample' }]);
    });
  });
});

test('logits that are not numbers are an error of the Extends that look at them, and of these alone', async () => {
  const bias = models.get('fp32')!.tensors.find(({ name }) => name === 'transformer.final_layernorm.bias')!;
  const file = path.join(folder, 'nan.bin');
  writeFileSync(file, new Float32Array(smallConfig.hiddenSize).fill(NaN));
  const options = engineOptions({}, 0, '');
  const engine = await native.createEngine({
    ...options,
    tensors: options.tensors.map((tensor) => (tensor === bias ? { ...tensor, file, offset: 0 } : tensor)),
  });
  const wants: StepWant[] = [{ kind: 'sample', params, noise, topLogprobs: 0 }, { kind: 'none' }, { kind: 'logits', rows: 2 }];
  const [run] = randomRuns(23, 4, 0) as [ReferenceRun];
  const body = bodyOf({ extends: wants.map((want, i) => extend(run, blocks(i, 4), 0, want)) });
  const error = { kind: 'error', message: 'a logit is NaN: the weights or the KV cache are damaged' };
  for (const stepId of [1, 2]) expect((await decoded(engine.step(stepId, body))).results).toEqual([error, { kind: 'none' }, error]);
  await engine.dispose();
});

describe('a step that cannot run', () => {
  const valid = extend(randomRuns(9, 6, 0)[0]!, blocks(0, 6), 0, { kind: 'none' });
  const bad = (change: object): StepExtend[] => [valid, { ...valid, blockTable: Uint32Array.from([9, 10]), ...change }];
  const u32 = (...values: number[]): Uint32Array => Uint32Array.from(values);

  test.each([
    { name: 'no tokens', extends: bad({ tokens: u32(), positions: u32() }), message: 'extends[1].tokens: is empty' },
    { name: 'a token outside the vocabulary', extends: bad({ tokens: u32(1, 2, 132, 4, 5, 6) }), message: 'extends[1].tokens[2]: token 132' },
    { name: 'too few positions', extends: bad({ positions: u32(0, 1) }), message: 'extends[1].positions: has 2 elements for 6 tokens' },
    { name: 'a position beyond the table', extends: bad({ positions: u32(0, 1, 2, 3, 4, 128) }), message: 'extends[1].positions[5]: 128' },
    { name: 'a short block table', extends: bad({ cachedTokens: 3 }), message: 'extends[1].blockTable: has 2 blocks of 4 tokens, 9 tokens need 3' },
    { name: 'a block that is not there', extends: bad({ blockTable: u32(9, 200) }), message: 'extends[1].blockTable[1]: block 200' },
    { name: 'two runs that write one block', extends: bad({ blockTable: u32(9, 1) }), message: 'extends[1].blockTable[1]: block 1 is written by extends[0]' },
    { name: 'more bidirectional tokens than tokens', extends: bad({ bidirectionalTokens: 7 }), message: 'extends[1].bidirectionalTokens: 7' },
    { name: 'too many targets', extends: bad({ want: { kind: 'targets', tokens: u32(1, 2, 3, 4, 5, 6, 7) } }), message: 'extends[1].want.tokens: has 7' },
    { name: 'a target outside the vocabulary', extends: bad({ want: { kind: 'targets', tokens: u32(999) } }), message: 'extends[1].want.tokens[0]: token 999' },
    { name: 'too many logits', extends: bad({ want: { kind: 'logits', rows: 7 } }), message: 'extends[1].want.rows: 7' },
    { name: 'no candidates', extends: bad({ want: { kind: 'candidates', count: 0, bannedTokens: u32(), noise: null } }), message: 'extends[1].want.count: 0' },
    {
      name: 'a negative temperature',
      extends: bad({ want: { kind: 'sample', params: { ...params, temperature: -1 }, noise, topLogprobs: 0 } }),
      message: 'extends[1].want.params.temperature',
    },
    {
      name: 'top-k above the vocabulary',
      extends: bad({ want: { kind: 'sample', params: { ...params, topK: 133 }, noise, topLogprobs: 0 } }),
      message: 'extends[1].want.params.topK: 133',
    },
    {
      name: 'fewer biases than tokens',
      extends: bad({ want: { kind: 'sample', params: { ...params, biasTokens: u32(1, 2), biases: Float32Array.of(1) }, noise, topLogprobs: 0 } }),
      message: 'extends[1].want.params.biases: has 1 elements for 2 biasTokens',
    },
    {
      name: 'a bias that is no number',
      extends: bad({ want: { kind: 'sample', params: { ...params, biasTokens: u32(1, 2), biases: Float32Array.of(1, NaN) }, noise, topLogprobs: 0 } }),
      message: 'extends[1].want.params.biases[1]: must be a finite number',
    },
    {
      name: 'a bias of a token outside the vocabulary',
      extends: bad({ want: { kind: 'sample', params: { ...params, biasTokens: u32(132), biases: Float32Array.of(1) }, noise, topLogprobs: 0 } }),
      message: 'extends[1].want.params.biasTokens[0]: token 132',
    },
    {
      name: 'a repetition penalty of 0',
      extends: bad({ want: { kind: 'sample', params: { ...params, repetitionPenalty: 0 }, noise, topLogprobs: 0 } }),
      message: 'extends[1].want.params.repetitionPenalty: must be a finite number > 0',
    },
    {
      name: 'a repeated token outside the vocabulary',
      extends: bad({ want: { kind: 'sample', params: { ...params, repeatedTokens: u32(3, 132) }, noise, topLogprobs: 0 } }),
      message: 'extends[1].want.params.repeatedTokens[1]: token 132',
    },
    { name: 'no layers', extends: bad({ endLayer: 0 }), message: 'extends[1].endLayer: 0 is not in 1 .. 3' },
    { name: 'more layers than there are', extends: bad({ endLayer: 4 }), message: 'extends[1].endLayer: 4 is not in 1 .. 3' },
    { name: 'layers from behind to front', extends: bad({ firstLayer: 2, endLayer: 1 }), message: 'extends[1].firstLayer: 2, the run ends before layer 1' },
    {
      name: 'two partial runs',
      extends: [
        { ...valid, endLayer: 2 },
        { ...valid, blockTable: u32(9, 10), endLayer: 1 },
      ],
      message: 'extends[1].firstLayer: a part of the layers, as of extends[0] already',
    },
    { name: 'an odd number of block copies', extends: [], blockCopies: [1], message: 'blockCopies: has 1 elements' },
    { name: 'a copy from outside the cache', extends: [], blockCopies: [1, 2, 200, 3], message: 'blockCopies[2]: block 200' },
    { name: 'a copy onto itself', extends: [], blockCopies: [4, 4], message: 'blockCopies[0]: copies block 4 onto itself' },
    { name: 'more tokens than the workspace', extends: Array.from({ length: 4 }, () => valid), message: 'extends: have 24 tokens together, maxBatchTokens is 20' },
  ])('$name is refused by name, on every rank', async ({ extends: runs, blockCopies, message }) => {
    await withGroup({ worldSize: 2, maxBatchTokens: 20 }, async (run, ranks) => {
      const body = bodyOf({ extends: runs, blockCopies });
      for (const rank of ranks) {
        const error = await rank.step(1, body).then(
          () => null,
          (reason: unknown) => reason,
        );
        expect(error).toBeInstanceOf(EngineError);
        expect((error as Error).message).toContain(message);
        expect(((error as Error).cause as { code: string }).code).toBe('INVALID_ARGUMENT');
      }
      expect((await run({ extends: [valid] })).results).toEqual([{ kind: 'none' }]); // the engine goes on
    });
  });

  test('a damaged body is an error that is no refusal: the ranks may have got different ones', async () => {
    const sample = extend(randomRuns(9, 6, 0)[0]!, blocks(0, 6), 0, { kind: 'sample', params, noise, topLogprobs: 0 });
    const whole = bodyOf({ extends: [sample, { ...valid, blockTable: u32(9, 10) }], blockCopies: [20, 21] });
    const changed = Uint8Array.from(whole);
    new DataView(changed.buffer).setUint32(whole.length - 4, 5, true); // an error is no want
    await withGroup({}, async (run, [engine]) => {
      const refused = async (bytes: Uint8Array, message: RegExp): Promise<void> => {
        const error: unknown = await engine!.step(1, bytes).catch((reason: unknown) => reason);
        expect(error).toMatchObject({ message: expect.stringMatching(message) as string });
        expect(nativeErrorCode(error)).toBe('INTERNAL');
      };
      for (let bytes = 0; bytes < whole.length; bytes++) {
        await refused(whole.subarray(0, bytes), bytes % 4 === 0 ? /^a step body of \d+ words ends too early$/ : /no whole words/);
      }
      await refused(Uint8Array.of(...whole, 0, 0, 0, 0), /^a step body with 1 words left over$/);
      await refused(changed, /^a step body with an unknown kind in word \d+$/);
      await refused(Uint8Array.of(0, 0, 0, 0, 255, 255, 255, 255), /ends too early/);
      const shifted = Uint8Array.of(0, ...whole).subarray(1); // not aligned
      expect(decodeResultBody((await engine!.step(1, shifted)).body).map(({ kind }) => kind)).toEqual(['sample', 'none']);
      expect((await run({ extends: [valid] })).results).toEqual([{ kind: 'none' }]);
    });
    await expect(native.createEngine(engineOptions({}, 0, '')).then((engine) => engine.step(1, [1] as unknown as Uint8Array))).rejects.toThrow(
      'body: is not a Uint8Array',
    );
  });

  test('an empty step and one of block copies alone are legal', async () => {
    await withGroup({ worldSize: 2 }, async (run) => {
      expect((await run({ extends: [] })).results).toEqual([]);
      expect((await run({ extends: [], blockCopies: [1, 2] })).results).toEqual([]);
    });
  });
});

describe('an engine that cannot be made', () => {
  const base = (change: (options: NativeEngineOptions) => object = () => ({})): NativeEngineOptions => {
    const options = engineOptions({ format: 'int4' }, 0, '');
    return { ...options, ...change(options) };
  };
  const tensor = (name: string, change: object | null): NativeEngineOptions =>
    base(({ tensors }) => ({ tensors: tensors.flatMap((t) => (t.name !== name ? [t] : change === null ? [] : [{ ...t, ...change }])) }));
  const layer = 'transformer.layers.2';

  test.each([
    { name: 'a missing tensor', options: () => tensor(`${layer}.mlp.dense_4h_to_h.bias`, null), message: `tensor ${layer}.mlp.dense_4h_to_h.bias: is missing` },
    { name: 'a missing weight', options: () => tensor(`${layer}.attention.dense.qweight`, null), message: `tensor ${layer}.attention.dense.weight: is missing` },
    {
      name: 'a wrong shape',
      options: () => tensor(`${layer}.input_layernorm.weight`, { shape: [47] }),
      message: `tensor ${layer}.input_layernorm.weight: is F16 [47], expected F16 [48] or F32`,
    },
    {
      name: 'a wrong dtype',
      options: () => tensor(`${layer}.mlp.dense_h_to_4h.qweight`, { dtype: 'I8' }),
      message: `tensor ${layer}.mlp.dense_h_to_4h.qweight: is I8 [112, 24], expected I8 [112, 48] or U8 [112, 24]`,
    },
    {
      name: 'groups that do not divide',
      options: () => tensor(`${layer}.mlp.dense_h_to_4h.scales`, { shape: [112, 5] }),
      message: `tensor ${layer}.mlp.dense_h_to_4h.scales: is F16 [112, 5], expected F16 [112, groups]`,
    },
    {
      name: 'a tensor beyond its file',
      options: () => tensor('transformer.final_layernorm.bias', { offset: 1e6 }),
      message: 'tensor transformer.final_layernorm.bias: F16 [48] at byte 1000000 does not fit',
    },
    {
      name: 'an offset near 2^53',
      options: () => tensor('transformer.final_layernorm.bias', { offset: Number.MAX_SAFE_INTEGER }),
      message: 'tensor transformer.final_layernorm.bias: F16 [48] at byte 9007199254740991 does not fit',
    },
    {
      name: 'a shape that overflows',
      options: () => tensor('transformer.final_layernorm.bias', { shape: [2 ** 50, 2 ** 50] }),
      message: 'tensor transformer.final_layernorm.bias: shape',
    },
    {
      name: 'a missing file',
      options: () => tensor('transformer.final_layernorm.bias', { file: path.join(folder, 'nothing.bin') }),
      message: 'tensor transformer.final_layernorm.bias: file',
    },
  ])('$name is a CheckpointError', async ({ options, message }) => {
    const error = await native.createEngine(options()).then(
      () => null,
      (reason: unknown) => reason,
    );
    expect(error).toBeInstanceOf(CheckpointError);
    expect((error as Error).message).toContain(message);
  });

  test.each([
    { name: 'a world size that does not divide', options: () => base(() => ({ worldSize: 3 })), message: 'worldSize: 3 does not divide' },
    { name: 'no communicator', options: () => base(() => ({ worldSize: 2 })), message: 'communicator: world size 2 needs one' },
    { name: 'a rank outside the world', options: () => base(() => ({ rank: 1 })), message: 'rank: 1 of world size 1' },
    { name: 'a communicator with a path', options: () => base(() => ({ worldSize: 2, communicator: { name: '../x', timeoutMs: 10 } })), message: 'communicator.name' },
    { name: 'no KV blocks', options: () => base(() => ({ kv: { numBlocks: 0, blockSize: 4, dtype: 'fp16' } })), message: 'kv.numBlocks: is not an integer from 1' },
    { name: 'an impossible cache', options: () => base(() => ({ kv: { numBlocks: 2 ** 31 - 1, blockSize: 2 ** 20, dtype: 'fp16' } })), message: 'KV cache' },
    { name: 'CPUs that are not there', options: () => base(() => ({ threads: 2, cpus: [1022, 1023] })), message: 'cpus: threads cannot be put on 1022, allowed are ' },
    { name: 'half a thread', options: () => base(() => ({ threads: 0.5 })), message: 'threads: is not an integer' },
    { name: 'an unknown dtype', options: () => base(() => ({ kv: { numBlocks: 1, blockSize: 4, dtype: 'int2' } })), message: 'kv.dtype: is not one of fp16 fp32' },
  ])('$name is a ConfigError', async ({ options, message }) => {
    const error = await native.createEngine(options()).then(
      () => null,
      (reason: unknown) => reason,
    );
    expect(error).toBeInstanceOf(ConfigError);
    expect((error as Error).message).toContain(message);
  });
});

describe('life', () => {
  const body = bodyOf({ extends: [extend(randomRuns(10, 9, 0)[0]!, blocks(0, 9), 0, { kind: 'sample', params, noise, topLogprobs: 0 })] });

  test('steps resolve in order, memory is reported, dispose waits and may be called twice', async () => {
    const engine = await native.createEngine(engineOptions({}, 0, ''));
    expect(engine.memory.kvBytes).toBe(200 * kvBlockBytes({ config: smallConfig, share: { localHeads: smallConfig.numAttentionHeads }, blockSize, dtype: 'fp32' }));
    expect(engine.memory.weightBytes).toBeGreaterThan(132 * 48 * 4);
    expect(engine.memory.workspaceBytes).toBeGreaterThan(0);
    const order: number[] = [];
    const running = Array.from({ length: 20 }, (_, i) => engine.step(i, body).then((result) => order.push(result.stepId)));
    const disposed = engine.dispose();
    await disposed;
    expect(order).toEqual(Array.from({ length: 20 }, (_, i) => i));
    await Promise.all(running);
    await engine.dispose();
    engine.abort();
    await expect(engine.step(1, body)).rejects.toThrow('the engine was disposed of');
  });

  test('loading says how far it is', async () => {
    let progress = (): LoadProgress => ({ doneBytes: -1, totalBytes: -1 });
    const loading = native.createEngine(engineOptions({ format: 'int8', activations: 'int8' }, 0, ''), (of) => (progress = of));
    expect(progress().doneBytes).toBeGreaterThanOrEqual(0);
    const engine = await loading;
    const { doneBytes, totalBytes } = progress();
    expect(totalBytes).toBeGreaterThan(0);
    expect(doneBytes).toBe(totalBytes);
    await engine.dispose();
  });

  test('a rank that never attaches is named, and nothing is left in shared memory', async () => {
    const name = `test-${randomUUID()}`;
    const lonely = native.createEngine(engineOptions({ worldSize: 2, timeoutMs: 200 }, 0, name));
    await expect(lonely).rejects.toThrow('attach: rank 1 did not arrive within 200 ms');
    await expect(lonely).rejects.toBeInstanceOf(EngineError);
    await expect(native.createEngine(engineOptions({ worldSize: 2, timeoutMs: 100 }, 1, name))).rejects.toThrow('rank 0 did not create');
    if (process.platform === 'linux') expect(readdirSync('/dev/shm').filter((file) => file.includes(name))).toEqual([]);
  });

  test('a silent rank is named at the deadline, and everything after fails at once', async () => {
    await withGroup({ worldSize: 2, timeoutMs: 300 }, async (_run, ranks) => {
      const [first, second] = ranks as [NativeEngine, NativeEngine];
      const begin = Date.now();
      await expect(first.step(1, body)).rejects.toThrow('all-reduce: rank 1 did not arrive within 300 ms');
      expect(Date.now() - begin).toBeGreaterThanOrEqual(290);
      await expect(first.step(1, body)).rejects.toThrow('all-reduce: ended by rank 0');
      await expect(second.step(1, body)).rejects.toThrow('all-reduce: ended by rank 0: a peer did not arrive there in time');
    });
  });

  test('abort wakes a waiting rank, ends its queue, and dispose then returns quickly', async () => {
    await withGroup({ worldSize: 2, timeoutMs: 60_000 }, async (_run, ranks) => {
      const [first, second] = ranks as [NativeEngine, NativeEngine];
      const waiting = first.step(1, body);
      const queued = first.step(1, body);
      waiting.catch(() => {});
      queued.catch(() => {});
      await new Promise((resolve) => setTimeout(resolve, 100));
      const begin = Date.now();
      first.abort();
      await expect(waiting).rejects.toThrow('all-reduce: ended by rank 0: it was told to abort');
      await expect(queued).rejects.toThrow('abort');
      await expect(second.step(1, body)).rejects.toThrow('ended by rank 0');
      await first.dispose();
      expect(Date.now() - begin).toBeLessThan(5000);
    });
  });

  test('ranks that run different steps find out', async () => {
    await withGroup({ worldSize: 2 }, async (_run, ranks) => {
      const [first, second] = ranks as [NativeEngine, NativeEngine];
      const longer = bodyOf({ extends: [extend(randomRuns(10, 10, 0)[0]!, blocks(0, 10), 0, { kind: 'none' })] });
      const results = await Promise.allSettled([first.step(1, body), second.step(1, longer)]);
      expect(results.map((result) => result.status)).toEqual(['rejected', 'rejected']);
      expect(results.map((result) => String((result as PromiseRejectedResult).reason)).join()).toMatch(/different (steps|collectives)/);
    });
  });

  test('read bandwidth is a positive figure', async () => {
    expect(await native.measureReadBandwidth({ bytes: 8 << 20, threads: 2, repeats: 2 })).toBeGreaterThan(1e6);
    await expect(native.measureReadBandwidth({ bytes: 10, threads: 1, repeats: 1 })).rejects.toThrow('bytes: 10');
  });

  test('how many products are made in registers is measured for every instruction set that the CPU has', async () => {
    for (const isa of ISAS) {
      const peak = native.measureProductPeak({ isa, threads: 2 });
      if (SUPPORTED_ISAS.includes(isa)) expect(await peak).toBeGreaterThan(1e7);
      else await peak.catch((error: unknown) => expect(String(error)).toContain(`isa: this CPU has no ${isa}`)); // it may: TANDEM_ISA forces one
    }
    await expect(native.measureProductPeak({ isa: 'generic', threads: 0 })).rejects.toThrow('threads: is not');
    await expect(native.measureProductPeak({ isa: 'sse' as 'avx2', threads: 1 })).rejects.toThrow('isa');
  });

  // Each script runs in a process of its own, with the addon, options of an engine and the bodies of two steps as globals.
  test.each([
    { name: 'an idle engine does not keep the process alive', script: `globalThis.engine = await create(); console.log('done');` },
    { name: 'pending work does', script: `create().then((e) => e.step(1, body)).then((r) => console.log(r.body[4] === 1 /* a sample */ ? 'done' : r));` },
    {
      name: 'the process may exit with steps queued',
      script: `const e = await create(); for (let i = 0; i < 500; i++) e.step(1, body); await e.step(1, empty).catch(() => {});
        for (let i = 0; i < 500; i++) e.step(1, body); console.log('done'); process.exit(0);`,
    },
    {
      name: 'the process may exit while an engine loads, waits for another rank, or measures',
      script: `create({ worldSize: 2, communicator: { name: 'exit-' + process.pid, timeoutMs: 60000 } }).catch(() => {}); create();
        native.measureReadBandwidth({ bytes: 64 << 20, threads: 1, repeats: 1000 }); setTimeout(() => { console.log('done'); process.exit(0); }, 100);`,
    },
    {
      name: 'an engine may be collected while its steps run',
      script: `const results = []; { let e = await create(); for (let i = 0; i < 50; i++) results.push(e.step(1, body)); e = null; }
        gc(); await new Promise((r) => setTimeout(r, 1)); gc(); await Promise.all(results); gc(); await new Promise((r) => setTimeout(r, 20)); gc(); console.log('done');`,
    },
    {
      name: 'a worker thread may be terminated with steps queued',
      script: `import { Worker } from 'node:worker_threads';
        const source = \`const { parentPort, workerData } = require('node:worker_threads'); const native = require(workerData.addon);
          native.createEngine(workerData.options).then((e) => { for (let i = 0; i < 300; i++) e.step(1, workerData.body); parentPort.postMessage('queued'); });\`;
        for (let i = 0; i < 3; i++) {
          const worker = new Worker(source, { eval: true, execArgv: [], workerData: { addon: process.argv[1], options, body } });
          await new Promise((r) => worker.once('message', r)); await worker.terminate();
        }
        console.log('done');`,
    },
  ])('$name', ({ script }) => {
    const addon = path.join(import.meta.dirname, '..', 'build', 'Release', 'tandem_addon.node');
    const base64 = (bytes: Uint8Array): string => Buffer.from(bytes).toString('base64');
    const json = JSON.stringify({ options: engineOptions({}, 0, ''), body: base64(body), empty: base64(bodyOf({ extends: [] })) });
    const prelude = `import { createRequire } from 'node:module'; const native = createRequire(process.argv[1])(process.argv[1]);
      const given = JSON.parse(process.argv[2]); const { options } = given;
      const [body, empty] = [given.body, given.empty].map((base64) => new Uint8Array(Buffer.from(base64, 'base64')));
      const create = (change) => native.createEngine({ ...options, ...change });\n`;
    const child = spawnSync(process.execPath, ['--expose-gc', '--input-type=module', '-e', prelude + script, addon, json], {
      encoding: 'utf8',
      timeout: 30_000,
    });
    expect({ stdout: child.stdout, stderr: child.stderr, status: child.status, signal: child.signal }).toEqual({
      stdout: 'done\n',
      stderr: '',
      status: 0,
      signal: null,
    });
  });
});
