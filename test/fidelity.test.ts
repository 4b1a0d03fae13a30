/**
 * The whole path (import, store, coordinator, workers, public API) against what the original code computed, with a KV cache in fp32,
 * at world sizes 1, 2 and 4. Tolerances are those of the model's specification, section 11.
 */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { TandemClient } from '../cli/client.js';
import { startLocalCluster, type LocalCluster } from '../cli/local-cluster.js';
import type { GenerateRequest } from '../proto/generated/tandem/v1/GenerateRequest.js';
import { EngineRanks, runOf } from './support/engine-ranks.js';
import {
  argmax,
  bidirectionalTokens,
  floats,
  logSoftmaxAt,
  logSumExp,
  maxDifference,
  positionsOf,
  RANDOM_HEADS,
  RANDOM_MODELS,
  randomStore,
  readGolden,
  spanPrompt,
  type GoldenFloats,
  type GoldenRow,
} from './support/golden.js';

/** The reference computes in floating point. */
const EXACT = { kvDtype: 'fp32', activations: 'float' } as const;
const EXACT_RANKS = { ...EXACT, device: 'cpu' } as const;
const LOGITS = 1e-3;
const LOGPROBS = 5e-4;
const RELATIVE_LOSS = 1e-5;
const SCORES = 2e-4;
const HALF_ROTARY = 2e-3;

interface ForwardCase extends GoldenRow {
  readonly name: string;
  readonly logits: GoldenFloats;
  readonly argmax: number[];
}
interface LongCase extends GoldenRow {
  readonly name: string;
  readonly last_logits: GoldenFloats;
  readonly argmax: number[];
  readonly logsumexp: number[];
  readonly next_token_logit: number[];
}
interface GreedyCase {
  readonly kind: 'gmask' | 'mask' | 'smask';
  readonly input: number[];
  readonly mask_position: number;
  readonly steps: number;
  readonly generated: number[];
  readonly with_end_tokens: { readonly end_tokens: number[]; readonly generated: number[] };
}
interface BeamCase {
  readonly input: number[];
  readonly mask_position: number;
  readonly gmask: boolean;
  readonly num_beams: number;
  readonly length_penalty: number;
  readonly no_repeat_ngram_size: number;
  readonly min_gen_length: number;
  readonly end_tokens: number[];
  readonly max_new: number;
  readonly lambada?: { readonly banned_prefix: number[][]; readonly invalid: number[] };
  readonly beams: number[][];
  readonly scores: number[];
}
interface FillCase {
  readonly text: string;
  readonly strategy: 'greedy' | 'beam';
  readonly num_beams: number;
  readonly length_penalty: number;
  readonly no_repeat_ngram_size: number;
  readonly end_tokens: number[];
  readonly out_seq_length: number;
  readonly answers: string[];
  readonly blanks: string[][];
}
interface ChoiceBatch {
  readonly use_task_mask: boolean;
  readonly unified_multitask_encoding: boolean;
  readonly samples: { readonly text: number[]; readonly choices: number[][] }[];
  readonly log_probs: number[][];
}
interface GenerationTask {
  readonly use_task_mask: boolean;
  readonly unidirectional: boolean;
  readonly texts: number[][];
  readonly max_gen_length: number;
  readonly min_gen_length?: number;
  readonly padded_context: number;
  readonly end_tokens: number[];
  /** 0: greedy. */
  readonly num_beams: number;
  readonly length_penalty?: number;
  readonly no_repeat_ngram_size?: number;
  /** Greedy: the tokens of each text; beams: all beams of each text. */
  readonly outputs: number[][] | number[][][];
  readonly scores?: number[][];
}
interface LanguageModelCase {
  readonly windows: {
    readonly tokens: number[];
    readonly targets: number[];
    /** Of the first and of the last token. */
    readonly position_ids: readonly [number, number];
    readonly visible_prefix: number;
    readonly loss_from: number;
    readonly loss_count: number;
    readonly loss: number;
  }[];
}

function logitsOf(client: TandemClient, { tokens, position_ids: positions, mask }: GoldenRow): Promise<Float32Array[]> {
  return client.logits({
    ids: tokens,
    positions: positionsOf(positions, tokens.length),
    bidirectionalTokens: bidirectionalTokens(mask),
    rows: tokens.length,
  });
}

/** Rows of a mask are `1` where a column is seen: a context that sees itself, then blocks that see it and, causally, themselves. */
function blocksOf(rows: readonly string[]): { context: number; blocks: { start: number; end: number }[] } {
  const context = rows[0]!.lastIndexOf('1') + 1;
  const blocks: { start: number; end: number }[] = [];
  for (let row = context; row < rows.length; row++) {
    const start = rows[row]!.indexOf('1', context);
    const open = blocks.at(-1);
    if (open?.start === start) open.end = row + 1;
    else blocks.push({ start, end: row + 1 });
  }
  return { context, blocks };
}

describe.each(
  RANDOM_MODELS.flatMap((model) =>
    [1, 2, 4].filter((worldSize) => worldSize <= RANDOM_HEADS[model]).map((worldSize) => ({ model, worldSize })),
  ),
)('random model $model with $worldSize worker(s)', ({ model, worldSize }) => {
  let cluster: LocalCluster;
  let client: TandemClient;
  beforeAll(async () => {
    cluster = await startLocalCluster({ model: await randomStore(model), worldSize, engine: EXACT });
    client = cluster.client;
  });
  afterAll(() => cluster?.close());
  const golden = <T>(file: string): T => readGolden<T>(`random/${model}/${file}.json`);

  test('logits of all positions', async () => {
    for (const row of golden<{ cases: ForwardCase[] }>('forward').cases) {
      const expected = floats(row.logits);
      const vocab = row.logits.shape[1]!;
      if (row.mask.type !== 'rows') {
        const got = await logitsOf(client, row);
        got.forEach((logits, i) =>
          expect(maxDifference(logits, expected.subarray(i * vocab, (i + 1) * vocab)), `${row.name}[${i}]`).toBeLessThan(LOGITS),
        );
        expect(got.map(argmax)).toEqual(row.argmax);
        continue;
      }
      // Packed choices do not see each other: each is the context and its own block.
      const { context, blocks } = blocksOf(row.mask.rows!);
      expect(blocks.length).toBeGreaterThan(1);
      for (const { start, end } of blocks) {
        const take = <T>(values: readonly T[]): T[] => [...values.slice(0, context), ...values.slice(start, end)];
        const got = await client.logits({
          ids: take(row.tokens),
          positions: take(positionsOf(row.position_ids, row.tokens.length)),
          bidirectionalTokens: context,
          rows: end - start,
        });
        got.forEach((logits, i) => {
          expect(
            maxDifference(logits, expected.subarray((start + i) * vocab, (start + i + 1) * vocab)),
            `${row.name}[${start + i}]`,
          ).toBeLessThan(LOGITS);
        });
      }
    }
  });

  test('long rows', async () => {
    for (const row of golden<{ cases: LongCase[] }>('forward-long').cases) {
      const got = await logitsOf(client, row);
      expect(maxDifference(got.at(-1)!, floats(row.last_logits)), row.name).toBeLessThan(LOGITS);
      expect(got.map(argmax)).toEqual(row.argmax);
      expect(maxDifference(got.map(logSumExp), row.logsumexp)).toBeLessThan(LOGITS);
      const next = row.next_token_logit.map((_, i) => got[i]![row.tokens[i + 1]!]!);
      expect(maxDifference(next, row.next_token_logit)).toBeLessThan(LOGITS);
    }
  });

  test('greedy generation, token for token', async () => {
    for (const { kind, input, mask_position: maskPosition, steps, generated, with_end_tokens: withEnd } of golden<{ greedy: GreedyCase[] }>(
      'greedy',
    ).greedy) {
      const request: GenerateRequest = {
        ...spanPrompt(input, maskPosition, kind),
        temperature: 0,
        maxNewTokens: steps,
      };
      const free = await client.generate({ ...request, endTokens: { ids: [] } });
      expect(free.outputs[0]!.blanks[0]).toMatchObject({ tokens: generated, maskPosition });
      const ended = await client.generate({ ...request, endTokens: { ids: withEnd.end_tokens } });
      const isEnded = withEnd.end_tokens.includes(withEnd.generated.at(-1)!);
      expect(ended.outputs[0]!.blanks[0]!.tokens).toEqual(isEnded ? withEnd.generated.slice(0, -1) : withEnd.generated);
      expect(ended.outputs[0]!.blanks[0]!.reason).toBe(isEnded ? 'FINISH_REASON_END' : 'FINISH_REASON_LENGTH');
    }
  });

  test('beam search, token for token and with the same scores', async () => {
    const { cases } = golden<{ cases: BeamCase[] }>('beam');
    const { special } = golden<{ special: Record<string, number> }>('config');
    await Promise.all(
      cases.map(async (each) => {
        const finish = await client.generate({
          ...spanPrompt(each.input, each.mask_position, each.gmask ? 'gmask' : 'mask'),
          maxNewTokens: each.max_new,
          minNewTokens: each.min_gen_length,
          endTokens: { ids: each.end_tokens },
          bannedTokens: each.lambada?.invalid ?? [],
          beamSearch: {
            numBeams: each.num_beams,
            lengthPenalty: each.length_penalty,
            noRepeatNgramSize: each.no_repeat_ngram_size,
            deterministic: true,
            bannedPrefixes: (each.lambada?.banned_prefix ?? []).map((ids) => ({ ids })),
          },
        });
        const { beams } = finish.outputs[0]!;
        // A beam's ids are the row with the blank in the mask's place, without end token, <sop> and a final </s>.
        const expected = each.beams.map((row) => {
          const generated = row.slice(each.input.length);
          if (each.end_tokens.includes(generated.at(-1)!)) generated.pop();
          const filled = [...each.input.slice(0, each.mask_position), ...generated, ...each.input.slice(each.mask_position + 1, -1)];
          return filled.at(-1) === special['eos'] ? filled.slice(0, -1) : filled;
        });
        expect(beams.map(({ ids }) => ids)).toEqual(expected);
        expect(
          maxDifference(
            beams.map(({ score }) => score),
            each.scores,
          ),
        ).toBeLessThan(SCORES);
      }),
    );
  });

  test('several blanks in one text', async () => {
    const { special } = golden<{ special: Record<string, number> }>('config');
    for (const each of golden<{ cases: FillCase[] }>('fill-blanks').cases) {
      const words = each.text.split(' ');
      const ids = words.map((word) => special[word] ?? Number(word));
      const hasMask = words.some((word) => word.endsWith('MASK]'));
      if (hasMask && !words.at(-1)!.endsWith('MASK]')) ids.push(special['eos']!);
      const finish = await client.generate({
        ids: { ids },
        temperature: 0,
        maxRowTokens: each.out_seq_length,
        endTokens: { ids: each.end_tokens },
        ...(each.strategy === 'beam'
          ? {
              beamSearch: {
                numBeams: each.num_beams,
                lengthPenalty: each.length_penalty,
                noRepeatNgramSize: each.no_repeat_ngram_size,
                deterministic: true,
              },
            }
          : {}),
      });
      const [output] = finish.outputs;
      expect(output!.ids.join(' ')).toBe(each.answers[0]);
      expect(output!.blanks.map(({ tokens }) => tokens.join(' '))).toEqual(each.blanks[0]);
    }
  });

  test('log-probabilities of choices', async () => {
    for (const batch of golden<{ batches: ChoiceBatch[] }>('multichoice').batches) {
      if (batch.unified_multitask_encoding) continue; // positions of their own: the evaluation harness' affair
      for (const [i, { text, choices }] of batch.samples.entries()) {
        const response = await client.score({
          ids: { ids: text },
          mode: batch.use_task_mask ? 'MODE_GMASK' : 'MODE_MASK',
          multitaskEncoding: batch.unified_multitask_encoding,
          choices: choices.map((ids) => ({ ids: { ids } })),
        });
        expect(
          maxDifference(
            response.choices.map(({ logprob }) => logprob),
            batch.log_probs[i]!,
          ),
        ).toBeLessThan(LOGPROBS);
      }
    }
  });

  test('generation tasks, beams measured with their padding', async () => {
    const run = async (task: GenerationTask, i: number): Promise<void> => {
      const finish = await client.generate({
        ids: { ids: task.texts[i]! },
        mode: task.unidirectional ? 'MODE_UNIDIRECTIONAL' : task.use_task_mask ? 'MODE_GMASK' : 'MODE_MASK',
        maxNewTokens: task.max_gen_length,
        endTokens: { ids: task.end_tokens },
        ...(task.num_beams === 0
          ? { topK: 1 }
          : {
              minNewTokens: task.min_gen_length!,
              beamSearch: {
                numBeams: task.num_beams,
                lengthPenalty: task.length_penalty!,
                noRepeatNgramSize: task.no_repeat_ngram_size!,
                deterministic: true,
                paddedLength: task.padded_context,
              },
            }),
      });
      const [output] = finish.outputs;
      const expected = task.num_beams === 0 ? (task.outputs[i] as number[]) : (task.outputs[i] as number[][])[0];
      expect(output!.blanks[0]!.tokens).toEqual(expected);
      if (task.scores)
        expect(
          maxDifference(
            output!.beams.map(({ score }) => score),
            task.scores[i]!,
          ),
        ).toBeLessThan(SCORES);
    };
    const { cases } = golden<{ cases: GenerationTask[] }>('generation-task');
    await Promise.all(cases.flatMap((task) => task.texts.map((_, i) => run(task, i))));
  });

  test('losses of language-model windows', async () => {
    for (const { windows } of golden<{ cases: LanguageModelCase[] }>('language-model').cases) {
      for (const window of windows) await checkWindow(client, window);
    }
  });
});

async function checkWindow(client: TandemClient, window: LanguageModelCase['windows'][number]): Promise<void> {
  const { tokens, targets, position_ids: positions, visible_prefix: visible, loss_from: from, loss_count: count, loss } = window;
  expect(positions).toEqual([0, tokens.length - 1]);
  const rows = await client.logits({ ids: tokens, bidirectionalTokens: visible, rows: tokens.length });
  const got = rows.slice(from, from + count).reduce((sum, logits, i) => sum - logSoftmaxAt(logits, targets[from + i]!), 0);
  expect(Math.abs(got - loss) / Math.abs(loss)).toBeLessThan(RELATIVE_LOSS);
}

describe.each(RANDOM_MODELS)('random model %s: rotary precision', (model) => {
  interface RotaryCase extends GoldenRow {
    readonly fp32: GoldenFloats;
    readonly half: GoldenFloats;
    readonly half_freq: GoldenFloats;
  }
  test.each([
    { precision: 'fp32', tolerance: LOGITS },
    { precision: 'half_freq', tolerance: LOGITS },
    { precision: 'half', tolerance: HALF_ROTARY },
  ] as const)('$precision', async ({ precision, tolerance }) => {
    const ranks = await EngineRanks.load({
      store: await randomStore(model, { rotaryPrecision: precision }),
      worldSize: 2,
      engine: EXACT_RANKS,
    });
    try {
      for (const row of readGolden<{ cases: RotaryCase[] }>(`random/${model}/rotary-variants.json`).cases) {
        const [got] = await ranks.logits(runOf(row), 1);
        expect(maxDifference(got!, floats(row[precision]))).toBeLessThan(tolerance);
      }
    } finally {
      await ranks.dispose();
    }
  });
});

interface QuantisedCase {
  readonly layout: string;
  readonly bits: 8 | 4;
  readonly inputs: (GoldenRow & {
    readonly case: string;
    readonly float: { readonly last_logits: GoldenFloats; readonly argmax: number[]; readonly logsumexp: number[] };
  })[];
  readonly greedy: { readonly input: number[]; readonly mask_position: number; readonly gmask: boolean; readonly generated: number[] };
}

describe.each(
  RANDOM_MODELS.flatMap((model) =>
    readGolden<{ cases: QuantisedCase[] }>(`random/${model}/quantised.json`).cases.map((quantised) => ({
      model,
      layout: quantised.layout,
      quantised,
    })),
  ),
)('random model $model quantised as $layout', ({ model, layout, quantised }) => {
  // The scales belong to the layout's ranks; how many workers compute with them is another matter.
  const ranksOfScales = Number(/^tp(\d+)/.exec(layout)![1]);
  test.each([1, 2, 4].filter((worldSize) => worldSize <= RANDOM_HEADS[model]))('with %i rank(s)', async (worldSize) => {
    const store = await randomStore(model, { quantize: quantised.bits, ranks: ranksOfScales });
    const ranks = await EngineRanks.load({ store, worldSize, engine: EXACT_RANKS });
    try {
      for (const row of quantised.inputs) {
        const got = await ranks.logits(runOf(row));
        expect(maxDifference(got.at(-1)!, floats(row.float.last_logits)), row.case).toBeLessThan(LOGITS);
        expect(got.map(argmax)).toEqual(row.float.argmax);
        expect(maxDifference(got.map(logSumExp), row.float.logsumexp)).toBeLessThan(LOGITS);
      }
    } finally {
      await ranks.dispose();
    }
  });
});

/** The start of a server takes seconds: one layout of each precision. */
const GENERATING = RANDOM_MODELS.flatMap((model) => {
  const { cases } = readGolden<{ cases: QuantisedCase[] }>(`random/${model}/quantised.json`);
  return ([8, 4] as const).map((bits) => ({ model, bits, quantised: cases.find((quantised) => quantised.bits === bits)! }));
});

test.each(GENERATING)(
  'random model $model in INT$bits generates through the server',
  async ({ model, bits, quantised: { layout, greedy } }) => {
    const store = await randomStore(model, { quantize: bits, ranks: Number(/^tp(\d+)/.exec(layout)![1]) });
    const cluster = await startLocalCluster({ model: store, worldSize: 2, engine: EXACT });
    try {
      const { input, mask_position: maskPosition, gmask, generated } = greedy;
      const finish = await cluster.client.generate({
        ...spanPrompt(input, maskPosition, gmask ? 'gmask' : 'mask'),
        temperature: 0,
        maxNewTokens: generated.length,
        endTokens: { ids: [] },
      });
      expect(finish.outputs[0]!.blanks[0]!.tokens).toEqual(generated);
    } finally {
      await cluster.close();
    }
  },
);
