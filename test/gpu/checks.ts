/** What the CUDA backend has to show with the golden models: the same checks on the emulator (test/cuda.test.ts) and on a GPU (test/gpu/main.ts). */
import { isDeepStrictEqual } from 'node:util';
import { startLocalCluster } from '../../cli/local-cluster.js';
import type { StepExtend, StepExtendResult } from '../../common/step-codec.js';
import { EngineRanks, runOf, type Run } from '../support/engine-ranks.js';
import {
  argmax,
  floats,
  importRandomStore,
  readGolden,
  type GoldenFloats,
  type GoldenRow,
  type RandomModel,
} from '../support/golden-data.js';

/** Of the logits of a row, in fp16 arithmetic. */
export const RELATIVE_L2 = 2e-2;
/** Greedy tokens, of those that the original code generates. */
export const LEAST_AGREEMENT = 0.99;

interface ForwardCase extends GoldenRow {
  readonly logits: GoldenFloats;
}

interface QuantisedCase {
  readonly layout: string;
  readonly bits: 8 | 4;
  readonly inputs: (GoldenRow & { readonly float: { readonly last_logits: GoldenFloats } })[];
}

interface TextCase {
  readonly text: string;
  readonly strategy: 'greedy' | 'beam';
  readonly out_seq_length: number;
  readonly answers: string[];
}

export const ENGINE = { device: 'cuda', activations: 'float', kvDtype: 'fp16' } as const;

const GREEDY = { temperature: 0, topK: 0, topP: 0, bannedTokens: [], biasTokens: [], biases: [], repetitionPenalty: 1, repeatedTokens: [] };

const relativeL2 = (got: ArrayLike<number>, expected: ArrayLike<number>): number => {
  let [difference, norm] = [0, 0];
  for (let i = 0; i < expected.length; i++) {
    difference += (got[i]! - expected[i]!) ** 2;
    norm += expected[i]! ** 2;
  }
  return got.length === expected.length ? Math.sqrt(difference / norm) : Infinity;
};

/** @returns the largest relative L2 distance of a row of logits from the original code's; Infinity where a row is not there or NaN */
export async function forwardDistance(scratch: string, model: RandomModel, worldSize: number): Promise<number> {
  const ranks = await EngineRanks.load({ store: await importRandomStore(scratch, model), worldSize, engine: ENGINE });
  try {
    let largest = 0;
    for (const row of readGolden<{ cases: ForwardCase[] }>(`random/${model}/forward.json`).cases) {
      if (row.mask.type === 'rows') continue; // several Extends each: what test/fidelity.test.ts is about
      const expected = floats(row.logits);
      const vocab = row.logits.shape[1]!;
      for (const [i, got] of (await ranks.logits(runOf(row))).entries()) {
        largest = maxOrNaN(largest, relativeL2(got, expected.subarray(i * vocab, (i + 1) * vocab)));
      }
    }
    return largest;
  } finally {
    await ranks.dispose();
  }
}

/** The same of quantised weights. */
export async function quantisedDistance(scratch: string, model: RandomModel, worldSize: number): Promise<number> {
  let largest = 0;
  for (const { layout, bits, inputs } of readGolden<{ cases: QuantisedCase[] }>(`random/${model}/quantised.json`).cases) {
    const ranksOfScales = Number(/^tp(\d+)/.exec(layout)![1]);
    const store = await importRandomStore(scratch, model, { quantize: bits, ranks: ranksOfScales });
    const ranks = await EngineRanks.load({ store, worldSize, engine: ENGINE });
    try {
      for (const row of inputs) {
        const [got] = await ranks.logits(runOf(row), 1);
        largest = maxOrNaN(largest, relativeL2(got!, floats(row.float.last_logits)));
      }
    } finally {
      await ranks.dispose();
    }
  }
  return largest;
}

/**
 * The same tokens as one run and one by one, alone and among others, and once more: a step's rows have the same bits whatever else is in it, also
 * when it is recorded and played again.
 * @returns what differs; empty: nothing
 */
export async function varianceOf(store: string): Promise<string[]> {
  const ranks = await EngineRanks.load({ store, worldSize: 1, engine: ENGINE });
  const differences: string[] = [];
  const equal = (what: string, a: Float32Array, b: Float32Array): void => {
    if (Buffer.compare(Buffer.from(a.buffer, a.byteOffset, a.byteLength), Buffer.from(b.buffer, b.byteOffset, b.byteLength)) !== 0)
      differences.push(what);
  };
  try {
    const context = 21;
    const tokens = Array.from({ length: 40 }, (_, i) => (i * 37 + 11) % 100);
    const whole: Run = { tokens, positions: tokens.map((_, i) => i), bidirectionalTokens: context };
    const expected = await ranks.logits(whole, tokens.length - context + 1);
    const part = (from: number, to: number, bidirectional: number): Run => ({
      tokens: tokens.slice(from, to),
      positions: whole.positions.slice(from, to),
      bidirectionalTokens: bidirectional,
    });
    const others = Array.from({ length: 9 }, (_, i): Run => ({ ...part(0, 3 + i, 3 + i), tokens: tokens.slice(i, 3 + 2 * i) })).map(
      (run) => ({
        ...run,
        positions: run.tokens.map((_, i) => i),
      }),
    );
    for (const neighbours of [0, 9]) {
      const beside = others.slice(0, neighbours).map((run, i) => ranks.extend(run, 0, { kind: 'logits', rows: 1 }, 100 + 8 * i));
      const [prefill] = await ranks.step([ranks.extend(part(0, context, context), 0, { kind: 'logits', rows: 1 }), ...beside]);
      if (prefill?.kind === 'logits') equal(`context among ${neighbours}`, prefill.logits, expected[0]!);
      for (let i = context; i < tokens.length; i++) {
        const decoding = others.slice(0, neighbours).map((run, j) => {
          const next: Run = { tokens: [tokens[i]!], positions: [run.tokens.length], bidirectionalTokens: 0 };
          return ranks.extend(next, run.tokens.length, { kind: 'logits', rows: 1 }, 100 + 8 * j);
        });
        const before = decoding.slice(0, 4);
        const results = await ranks.step([
          ...before,
          ranks.extend(part(i, i + 1, 0), i, { kind: 'logits', rows: 1 }),
          ...decoding.slice(4),
        ]);
        const result = results[before.length];
        if (result?.kind === 'logits') equal(`token ${i} among ${neighbours}`, result.logits, expected[i - context + 1]!);
        else differences.push(`token ${i}: ${JSON.stringify(result)}`);
      }
    }
  } finally {
    await ranks.dispose();
  }
  return differences;
}

/**
 * Steps that are sent before the ones that they go on from have ended, against the same ones sent one by one with their tokens. Sequences change places from step
 * to step; some steps want what is for the host, so that they are no part of the pipeline.
 * @returns what differs; empty: nothing
 */
export async function queuedSteps(store: string, worldSize: number): Promise<string[]> {
  const ranks = await EngineRanks.load({ store, worldSize, engine: ENGINE });
  const sequences = 4;
  const steps = 14;
  const contexts = Array.from({ length: sequences }, (_, sequence): Run => {
    const tokens = Array.from({ length: 9 + 11 * sequence }, (_, i) => (i * 31 + sequence * 17 + 5) % 100);
    return { tokens, positions: tokens.map((_, i) => i), bidirectionalTokens: tokens.length - 1 };
  });
  const want = (sequence: number, step: number): StepExtend['want'] => ({
    kind: 'sample',
    params: { ...GREEDY, temperature: 1.5, topK: 40 },
    noise: { seed: 7n, stream: sequence, position: step },
    topLogprobs: 2,
  });
  /** Where each sequence is among the Extends of a step. */
  const place = (sequence: number, step: number): number => (sequence + step) % sequences;
  const extendsOf = (step: number, tokenOf: (sequence: number) => { token: number; sampledBy: number }): StepExtend[] => {
    const all = new Array<StepExtend>(sequences);
    for (const [sequence, context] of contexts.entries()) {
      const cached = step === 0 ? 0 : context.tokens.length + step - 1;
      const { token, sampledBy } = step === 0 ? { token: 0, sampledBy: -1 } : tokenOf(sequence);
      const run = step === 0 ? context : { tokens: [token], positions: [cached], bidirectionalTokens: 0 };
      all[place(sequence, step)] = { ...ranks.extend(run, cached, want(sequence, step), 8 * sequence), sampledBy };
    }
    if (step % 7 === 5) all.push(ranks.extend(contexts[0]!, 0, { kind: 'logits', rows: 1 }, 8 * sequences));
    return all;
  };
  try {
    const known: (readonly StepExtendResult[])[] = [];
    for (let step = 0; step < steps; step++) {
      const tokenOf = (sequence: number): { token: number; sampledBy: number } => {
        const result = known[step - 1]![place(sequence, step - 1)]!;
        return { token: result.kind === 'sample' ? result.token : 0, sampledBy: -1 };
      };
      known.push(await ranks.step(extendsOf(step, tokenOf)));
    }
    const queued = await Promise.all(
      known.map((_, step) => ranks.step(extendsOf(step, (sequence) => ({ token: 0, sampledBy: place(sequence, step - 1) })))),
    );
    const drawn = new Set(known.flat().map((result) => (result.kind === 'sample' ? result.token : -1)));
    const differing = known.flatMap((results, step) => (isDeepStrictEqual(queued[step], results) ? [] : [`step ${step}`]));
    return drawn.size > steps / 2 ? differing : [`only ${drawn.size} different tokens were drawn`, ...differing];
  } finally {
    await ranks.dispose();
  }
}

/** An engine that is aborted with steps under way. @returns what became of the steps: all that had begun give their results, the others end */
export async function abortedSteps(store: string): Promise<string[]> {
  const ranks = await EngineRanks.load({ store, worldSize: 1, engine: ENGINE });
  const run: Run = { tokens: [5, 6, 7], positions: [0, 1, 2], bidirectionalTokens: 2 };
  const want = { kind: 'sample', params: GREEDY, noise: { seed: 0n, stream: 0, position: 0 }, topLogprobs: 0 } as const;
  const outcomes = Array.from({ length: 12 }, () =>
    ranks.step([ranks.extend(run, 0, want)]).then(
      ([result]) => result!.kind,
      (error: unknown) => (error as Error).message,
    ),
  );
  await outcomes[0];
  ranks.abort();
  const all = await Promise.all(outcomes);
  await ranks.dispose();
  return all;
}

/** Texts of the tiny model through a whole server. @returns how many of them are the original code's, letter for letter */
export async function equalTexts(limit: number, worldSize: number): Promise<{ equal: number; of: number; differing: string[] }> {
  const cases = readGolden<{ cases: TextCase[] }>('tiny/generations.json').cases.slice(0, limit);
  const cluster = await startLocalCluster({ model: null, worldSize, kvBlocks: 2048, engine: { device: 'cuda' } });
  try {
    const differing: string[] = [];
    await Promise.all(
      cases.map(async ({ text, strategy, out_seq_length: maxRowTokens, answers }) => {
        const how =
          strategy === 'greedy'
            ? { temperature: 0 }
            : { beamSearch: { numBeams: 4, lengthPenalty: 1, noRepeatNgramSize: 3, deterministic: true } };
        const finish = await cluster.client.generate({ text, maxRowTokens, ...how });
        if (finish.outputs[0]!.text !== answers[0]) differing.push(`${strategy}: ${finish.outputs[0]!.text} | ${answers[0]}`);
      }),
    );
    return { equal: cases.length - differing.length, of: cases.length, differing };
  } finally {
    await cluster.close();
  }
}

/** Logits of the tiny model's last positions. @returns the largest relative L2 distance, and the share of rows with the same best token */
export async function tinyLogits(store: string): Promise<{ distance: number; agreement: number }> {
  const ranks = await EngineRanks.load({ store, worldSize: 1, engine: ENGINE });
  try {
    const { cases } = readGolden<{ cases: { tokens: number[]; position_ids: number[]; logits: GoldenFloats }[] }>('tiny/logits.json');
    let [distance, same, rows] = [0, 0, 0];
    for (const { tokens, position_ids: positions, logits } of cases) {
      const expected = floats(logits);
      const got = await ranks.logits({ tokens, positions, bidirectionalTokens: tokens.length - 1 }, 4);
      for (const [i, row] of got.entries()) {
        const golden = expected.subarray(i * row.length, (i + 1) * row.length);
        distance = maxOrNaN(distance, relativeL2(row, golden));
        same += argmax(row) === argmax(golden) ? 1 : 0;
        rows += 1;
      }
    }
    return { distance, agreement: same / rows };
  } finally {
    await ranks.dispose();
  }
}

/** NaN stays: a comparison with it is never fulfilled. */
function maxOrNaN(a: number, b: number): number {
  return a >= b ? a : b > a ? b : NaN;
}
