/**
 * The greedy fill_blanks goldens without a model: a scripted engine checks that each Extend is what the original gave to its model (tokens,
 * mask position, visibility) and answers with the token that came back. Everything else is the strategy's own doing.
 */
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, test } from 'vitest';
import type { SpecialTokens } from '../../model/model-config.js';
import { buildContext } from '../../model/tokenizer/prompt.js';
import { loadTokenizer, type Tokenizer } from '../../model/tokenizer/tokenizer.js';
import { generate } from './blank-filling.js';
import { blankContext } from '../../model/tokenizer/blank-context.js';
import { type GenerationDelta, type GenerationRequest, type Mode, NO_PENALTIES } from './request.js';
import { score } from './scoring.js';
import type { ExtendOp, ExtendResult, Sequence, Sequences, Strategy } from './strategy.js';

interface Call {
  input: number[];
  mask_position: number;
  gmask: boolean;
  rows: number[][];
}
interface Case {
  text: string;
  strategy: string;
  end_tokens: number[];
  out_seq_length: number;
  answers: string[];
  answers_with_style: string[];
  blanks: string[][];
  calls: Call[];
}
interface Model {
  config: { vocabSize: number; maxSequenceLength: number; specialTokens: SpecialTokens };
  tokenizer: Tokenizer;
}

function readGolden<T>(path: string): T {
  return JSON.parse(readFileSync(new URL(`../../test/golden/${path}`, import.meta.url), 'utf8')) as T;
}

const tinyModel: Model['config'] = {
  vocabSize: 4096,
  maxSequenceLength: 512,
  specialTokens: { mask: 3740, gmask: 3741, smask: 3742, eod: 3743, sop: 3744, eop: 3745, enc: 3746, dblock: 3747, eos: 2 },
};

describe('tiny', () => {
  const { cases, end_tokens } = readGolden<{ cases: Case[]; end_tokens: number[] }>('tiny/generations.json');
  let model: Model;
  beforeAll(async () => {
    const path = fileURLToPath(new URL('../../model/tiny/tokenizer.model', import.meta.url));
    model = {
      config: tinyModel,
      tokenizer: await loadTokenizer(path, { file: 'tokenizer.model', imageTokenOffset: 0, numTextPieces: 3740 }),
    };
  });

  const greedy = cases.filter(({ strategy }) => strategy === 'greedy').map((each) => ({ ...each, end_tokens }));
  test('has 59 greedy cases', () => expect(greedy.length).toBe(59));
  test.each(greedy)('$text', (each) => replay(each, model));

  test('the first row of beam cases is the same', () => {
    for (const { text, calls } of cases.filter(({ strategy }) => strategy === 'beam')) expectFirstRow(text, calls[0]!, model);
  });
});

describe.each(['A', 'B', 'E'])('random %s', (name) => {
  const { config, cases } = readGolden<{ config: RandomConfig; cases: Case[] }>(`random/${name}/fill-blanks.json`);
  const model: Model = { config: modelOf(config), tokenizer: decimalTokenizer(config.special) };

  test.each(cases.filter(({ strategy }) => strategy === 'greedy'))('$text', (each) => replay(each, model));

  test('the first row of beam cases is the same', () => {
    for (const { text, calls } of cases.filter(({ strategy }) => strategy === 'beam')) expectFirstRow(text, calls[0]!, model);
  });

  test('rows and positions of generation tasks are those of the original', () => {
    const { cases: tasks } = readGolden<{ cases: GenerationTask[] }>(`random/${name}/generation-task.json`);
    for (const task of tasks) {
      const mode: Mode = task.unidirectional ? 'unidirectional' : task.use_task_mask ? 'gmask' : 'mask';
      for (const [i, sample] of task.samples.entries()) {
        const context = buildContext({ kind: 'ids', ids: task.texts[i]! }, mode, model);
        const maskPosition = context.bidirectional ? context.row.indexOf(context.maskToken) : context.row.length;
        const blank = blankContext(context.row, maskPosition, context, model.config.specialTokens.sop);
        expect(blank.tokens).toEqual(sample.token);
        expect(blank.positions).toEqual(sample.position_id);
        expect(sample.target_position_id.map((_, j) => blank.positionOf(j))).toEqual(sample.target_position_id);
        const rows = blank.tokens.map((_, q) =>
          blank.tokens.map((__, k) => (k <= q || k < blank.bidirectionalTokens ? '1' : '0')).join(''),
        );
        expect(rows).toEqual(sample.mask_rows);
      }
    }
  });

  test('rows and positions of multiple choice are those of the original', () => {
    const { batches } = readGolden<{ batches: MultichoiceBatch[] }>(`random/${name}/multichoice.json`);
    for (const batch of batches) {
      for (const sample of batch.samples) {
        const request = {
          prompt: { kind: 'ids', ids: sample.text } as const,
          mode: batch.use_task_mask ? ('gmask' as const) : ('mask' as const),
          choices: sample.choices.map((ids) => ({ kind: 'ids', ids }) as const),
          multitaskEncoding: batch.unified_multitask_encoding,
        };
        const recorder = new Recorder();
        recorder.run(score(request, model, recorder), (op) =>
          op.want.kind === 'targets' ? { kind: 'targets', logprobs: op.want.tokens.map(() => -1) } : { kind: 'none' },
        );
        const [prefill, ...choices] = recorder.ops;
        // The original packs the choices behind the context, one after another; of single-token ones the <sop> once for all.
        const packed = batch.single_token ? choices.slice(0, 1) : choices;
        expect([prefill!, ...packed].flatMap(({ tokens }) => tokens)).toEqual(sample.token);
        expect([prefill!, ...packed].flatMap(({ positions }) => positions)).toEqual(sample.position_id);
        expect(prefill!.bidirectionalTokens).toBe(prefill!.tokens.length);
        expect(choices.map(({ want }) => want)).toEqual(sample.choices.map((tokens) => ({ kind: 'targets', tokens })));
        if (batch.single_token) for (const choice of choices) expect(choice.tokens).toEqual(choices[0]!.tokens);
      }
    }
  });
});

interface RandomConfig {
  vocab_size: number;
  max_sequence_length: number;
  special: Record<string, number>;
}
interface GenerationTask {
  use_task_mask: boolean;
  unidirectional: boolean;
  texts: number[][];
  samples: { token: number[]; position_id: number[]; target_position_id: number[]; mask_rows: string[] }[];
}
interface MultichoiceBatch {
  single_token: boolean;
  use_task_mask: boolean;
  unified_multitask_encoding: boolean;
  samples: { text: number[]; choices: number[][]; token: number[]; position_id: number[] }[];
}

function replay(each: Case, model: Model): void {
  const { calls } = each;
  const deltas: GenerationDelta[] = [];
  const recorder = new Recorder();
  let call = -1;
  let made = 0; // generated tokens of the call that have been given out
  const result = recorder.run(
    generate(requestOf(each), model, recorder, (delta) => deltas.push(delta)),
    (op) => {
      if (op.sequence.length === 0) {
        call++;
        made = 0;
      }
      const { input, mask_position, gmask, rows } = calls[call]!;
      const generated = rows[0]!.slice(input.length);
      if (made === 0) {
        expect(op.tokens).toEqual(input);
        expect(op.positions).toEqual(input.map((_, i) => (i === input.length - 1 && !gmask ? mask_position : i)));
        expect(op.bidirectionalTokens).toBe(input.length - 1);
      } else {
        expect([op.tokens, op.positions, op.bidirectionalTokens]).toEqual([
          [generated[made - 1]],
          [gmask ? input.length + made - 1 : mask_position],
          0,
        ]);
      }
      const token = generated[made++];
      if (token === undefined) throw new Error(`call ${call} asks for token ${made} of ${generated.length}`);
      return { kind: 'sample', token, logprob: -1, topTokens: [], topLogprobs: [] };
    },
  );
  expect(call).toBe(calls.length - 1);
  expect(made).toBe(calls.at(-1)!.rows[0]!.length - calls.at(-1)!.input.length);

  const output = result.outputs[0]!;
  expect(output.text).toBe(each.answers[0]);
  expect(output.styledText).toBe(each.answers_with_style[0]);
  expect(output.blanks.map(({ text }) => text)).toEqual(each.blanks[0]);
  expect(output.blanks.map(({ maskPosition }) => maskPosition)).toEqual(calls.map((each_) => each_.mask_position));
  expect(result.generatedTokens).toBe(calls.reduce((sum, { input, rows }) => sum + rows[0]!.length - input.length, 0));
  for (const [i, blank] of output.blanks.entries()) {
    const own = deltas.filter((delta) => delta.blank === i);
    expect(own.flatMap(({ tokens }) => tokens)).toEqual(blank.tokens);
    expect(own.map(({ text }) => text).join('')).toBe(model.tokenizer.decode(blank.tokens));
  }
}

function expectFirstRow(text: string, call: Call, model: Model): void {
  const context = buildContext({ kind: 'text', text }, 'fill-blanks', model);
  expect([...context.row, model.config.specialTokens.sop]).toEqual(call.input);
  expect([context.row.indexOf(context.maskToken), context.positions]).toEqual([call.mask_position, call.gmask ? 'running' : 'mask']);
}

function requestOf({ text, end_tokens, out_seq_length }: Case): GenerationRequest {
  return {
    prompt: { kind: 'text', text },
    mode: 'fill-blanks',
    maxNewTokens: null,
    maxRowTokens: out_seq_length,
    minNewTokens: 0,
    sampling: { temperature: 0, topK: 0, topP: 0 },
    beams: null,
    n: 1,
    seed: 0n,
    endTokens: end_tokens,
    bannedTokens: [],
    logitBias: [],
    penalties: NO_PENALTIES,
    stopStrings: [],
    topLogprobs: null,
  };
}

/** Sequences that count their tokens, and a driver that hands each Extend to a function before it counts. */
class Recorder implements Sequences {
  readonly ops: ExtendOp[] = [];
  private nextId = 1;

  create(): Sequence {
    return { id: this.nextId++, length: 0 };
  }
  fork(parent: Sequence): Sequence {
    return { id: this.nextId++, length: parent.length };
  }
  release(): void {}

  run<R>(strategy: Strategy<R>, answer: (op: ExtendOp) => ExtendResult): R {
    let state = strategy.next();
    while (!state.done) {
      const ops = state.value;
      const results = ops.map(answer);
      this.ops.push(...ops);
      for (const { sequence, tokens } of ops) (sequence as { length: number }).length += tokens.length;
      state = strategy.next(results);
    }
    return state.value;
  }
}

function modelOf({ vocab_size, max_sequence_length, special }: RandomConfig): Model['config'] {
  const [mask, gmask, smask] = [special['[MASK]']!, special['[gMASK]']!, special['[sMASK]']!];
  const rest = { eod: special.eod!, sop: special.sop!, eop: special.eop!, enc: special.ENC!, dblock: special.dBLOCK!, eos: special.eos! };
  return { vocabSize: vocab_size, maxSequenceLength: max_sequence_length, specialTokens: { mask, gmask, smask, ...rest } };
}

/** The tokenizer of the random goldens: text is decimal ids. */
function decimalTokenizer(special: Record<string, number>): Tokenizer {
  const encode = (text: string): number[] => text.split(/\s+/).filter(Boolean).map(Number);
  const decode = (ids: readonly number[]): string => ids.join(' ');
  return {
    numTokens: 1000,
    encode,
    encodePrompt: (text) => text.split(/(\[[gs]?MASK\])/).flatMap((part, i) => (i % 2 === 1 ? [special[part]!] : encode(part))),
    decode,
    detokenize: decode,
    command: (name) => special[name]!,
    stream: () => {
      let isFirst = true;
      return {
        isHolding: false,
        flush: () => '',
        push: (id) => {
          const text = isFirst ? decode([id]) : ` ${decode([id])}`;
          isFirst = false;
          return text;
        },
      };
    },
  };
}
