import { describe, expect, test } from 'vitest';
import { InvalidRequestError, PromptTooLongError } from '../../common/errors.js';
import { generate } from './blank-filling.js';
import { FakeModel } from './fake-model.js';
import { letterModel, LETTERS, requestOf } from './letter-model.js';
import type { BeamParams, GenerationDelta, GenerationRequest, GenerationResult } from './request.js';
import { MAX_BLANKS } from './row-limit.js';

const { vocabSize, mask, gmask, smask, sop, eop, eos } = LETTERS;
const notLetters = [mask, gmask, smask, sop, eop, eos, 16, 17, 18, 19];
const sampled = { temperature: 1, topK: 0, topP: 0 };
const beams: BeamParams = {
  numBeams: 3,
  lengthPenalty: 1,
  noRepeatNgramSize: 0,
  deterministic: true,
  considerEnd: true,
  bannedPrefixes: [],
};

function run(
  request: GenerationRequest,
  fake = new FakeModel(vocabSize),
): { result: GenerationResult; deltas: GenerationDelta[]; fake: FakeModel } {
  const deltas: GenerationDelta[] = [];
  const result = fake.run(generate(request, letterModel, fake, (delta) => deltas.push(delta)));
  expect(fake.liveSequences).toBe(0);
  return { result, deltas, fake };
}

const textOf = (deltas: GenerationDelta[], output: number, blank: number): string =>
  deltas
    .filter((delta) => delta.output === output && delta.blank === blank)
    .map(({ text }) => text)
    .join('');

describe('samples', () => {
  const request = requestOf('ab[MASK]cd[MASK]e', { sampling: sampled, n: 3, bannedTokens: [mask] });

  test('the first one is what a request for one sample gives', () => {
    expect(run(request).result.outputs[0]).toEqual(run({ ...request, n: 1 }).result.outputs[0]);
  });

  test('differ, and depend on the seed alone', () => {
    const { outputs } = run(request).result;
    expect(outputs).toEqual(run(request).result.outputs);
    expect(new Set(outputs.map(({ ids }) => ids.join())).size).toBe(3);
    expect(outputs).not.toEqual(run({ ...request, seed: 2n }).result.outputs);
  });

  test('share the prefill of the first context', () => {
    const { ops } = run(request).fake;
    expect(ops[0]).toMatchObject({ tokens: [0, 1, mask, 2, 3, mask, 4, eos], bidirectionalTokens: 8, want: { kind: 'none' } });
    for (const op of ops.slice(1, 4)) expect(op).toMatchObject({ tokens: [sop], positions: [2], bidirectionalTokens: 0 });
    expect(ops.filter(({ tokens }) => tokens.length > 1)).toHaveLength(4); // and one for each second blank
  });

  test('never use the same noise twice', () => {
    const noise = run(request).fake.ops.flatMap(({ want }) =>
      want.kind === 'sample' ? [`${want.noise.stream} ${want.noise.position}`] : [],
    );
    expect(new Set(noise).size).toBe(noise.length);
    expect(noise).toContain('0 0');
    expect(run(request).result.generatedTokens).toBe(noise.length);
  });
});

describe('deltas', () => {
  test('are the texts of the blanks of each output', () => {
    const { result, deltas } = run(
      requestOf('ab[MASK]cd[MASK]e', { sampling: sampled, n: 2, bannedTokens: notLetters.filter((id) => id !== eop) }),
    );
    for (const [output, { blanks }] of result.outputs.entries()) {
      expect(blanks).toHaveLength(2);
      for (const [blank, { text }] of blanks.entries()) expect(textOf(deltas, output, blank)).toBe(text);
    }
  });

  test('carry log-probabilities where they are asked for', () => {
    const { result, deltas } = run(requestOf('ab', { topLogprobs: 2, bannedTokens: [gmask, eop, eos] }));
    const logprobs = deltas.flatMap((delta) => delta.logprobs!);
    expect(logprobs.map(({ token }) => token)).toEqual(result.outputs[0]!.blanks[0]!.tokens);
    for (const { top } of logprobs) expect(top).toHaveLength(2);
    expect(run(requestOf('ab')).deltas.every((delta) => delta.logprobs === null)).toBe(true);
  });

  test('come once for a blank of a beam search', () => {
    const { result, deltas } = run(requestOf('ab[MASK]cd[MASK]e', { beams, bannedTokens: notLetters.filter((id) => id !== eop) }));
    expect(deltas.map(({ blank, text }) => ({ blank, text }))).toEqual(
      result.outputs[0]!.blanks.flatMap(({ text }, blank) => (text === '' ? [] : [{ blank, text }])),
    );
  });
});

describe('ends of a blank', () => {
  test('length: maxNewTokens, or the row', () => {
    const endless = { endTokens: [], bannedTokens: notLetters };
    const byTokens = run(requestOf('abc', { ...endless, maxNewTokens: 5 })).result.outputs[0]!;
    expect([byTokens.blanks[0]!.tokens.length, byTokens.finish]).toEqual([5, 'length']);
    const byRow = run(requestOf('abc', { ...endless, maxNewTokens: null, maxRowTokens: 12 })).result.outputs[0]!;
    expect(byRow.blanks[0]!.tokens).toHaveLength(12 - 5); // abc [gMASK] <sop>
    const byModel = run(requestOf('abc', { ...endless, maxNewTokens: null, maxRowTokens: 1000 })).result.outputs[0]!;
    expect(byModel.blanks[0]!.tokens).toHaveLength(64 - 5);
  });

  test('end: the end token is counted, but in neither text nor ids', () => {
    const endTokens = [0, 1, 2, 3, 4, 5, 6, 7, 8]; // soon, but not at once
    const { result } = run(requestOf('abc', { endTokens, minNewTokens: 3, bannedTokens: notLetters, sampling: sampled }));
    const { blanks, ids, finish } = result.outputs[0]!;
    expect(finish).toBe('end');
    expect(blanks[0]!.tokens.slice(0, 3)).toEqual([9, 9, 9]); // the only token that is left
    expect(result.generatedTokens).toBe(blanks[0]!.tokens.length + 1);
    expect(ids).toEqual([0, 1, 2, ...blanks[0]!.tokens]);
  });

  test('stop: the text is cut before the stop string', () => {
    const endless = requestOf('abc', { endTokens: [], bannedTokens: notLetters, maxNewTokens: 30 });
    const text = run(endless).result.outputs[0]!.blanks[0]!.text;
    const stop = text.slice(10, 13);
    const { result, deltas } = run({ ...endless, stopStrings: [stop] });
    const expected = text.slice(0, text.indexOf(stop));
    expect(result.outputs[0]).toMatchObject({ finish: 'stop', text: `abc${expected}` });
    expect(textOf(deltas, 0, 0)).toBe(expected);
    expect(result.generatedTokens).toBe(text.indexOf(stop) + 3);
  });

  test('a later blank without room stays empty', () => {
    const endless = { endTokens: [], bannedTokens: notLetters };
    const { outputs } = run(requestOf('ab[MASK]cd[MASK]', { ...endless, maxNewTokens: null, maxRowTokens: 10 })).result;
    // ab [MASK] cd [MASK] <sop> is 7: three new tokens; then the row with <sop> is 9: one more
    expect(outputs[0]!.blanks.map(({ tokens, finish }) => [tokens.length, finish])).toEqual([[3, 'length'], [1, 'length']]); // prettier-ignore
    const tight = run(requestOf('ab[MASK]cd[MASK]e[MASK]', { ...endless, maxNewTokens: null, maxRowTokens: 11 })).result.outputs[0]!;
    expect(tight.blanks.map(({ tokens }) => tokens.length)).toEqual([2, 1, 1]);
  });
});

describe('masks that are generated', () => {
  // Nothing but [MASK] can be generated: every blank fills the row with new blanks.
  const onlyMasks = { bannedTokens: Array.from({ length: vocabSize }, (_, id) => id).filter((id) => id !== mask) };

  test('become blanks, in a bounded number', () => {
    const { result } = run(requestOf('ab[MASK]', { ...onlyMasks, maxNewTokens: null }));
    expect(result.outputs[0]!.blanks).toHaveLength(MAX_BLANKS);
    expect(result.outputs[0]!.finish).toBe('length');
  });

  test('share the room that the blanks of the prompt left', () => {
    const { result } = run(requestOf('ab[MASK]', { ...onlyMasks, maxNewTokens: 4 }));
    for (const { tokens } of result.outputs[0]!.blanks) expect(tokens.length).toBeLessThanOrEqual(4);
    expect(result.outputs[0]!.ids.length).toBeLessThanOrEqual('ab'.length + 4);
  });

  test('stay where the mode fills one span', () => {
    const { result } = run(requestOf('ab', { ...onlyMasks, mode: 'mask' }));
    expect(result.outputs[0]!.blanks).toHaveLength(1);
    expect(result.outputs[0]!.ids).toContain(mask);
  });
});

describe('modes', () => {
  test('unidirectional: [gMASK] <sop> in front, causal, the answer is the continued prompt', () => {
    const { result, fake } = run(
      requestOf('abc', { mode: 'unidirectional', bannedTokens: notLetters, endTokens: [], n: 2, sampling: sampled }),
    );
    expect(fake.ops[0]).toMatchObject({ tokens: [gmask, sop, 0, 1], positions: [0, 1, 2, 3], bidirectionalTokens: 0 });
    expect(fake.ops[1]).toMatchObject({ tokens: [2], positions: [4] });
    expect(fake.ops[3]!.positions).toEqual([5]);
    for (const { ids, text, blanks } of result.outputs) {
      expect(ids).toEqual([0, 1, 2, ...blanks[0]!.tokens]);
      expect(text).toBe(`abc${blanks[0]!.text}`);
      expect(blanks[0]!.maskPosition).toBe(3);
    }
    expect(result.promptTokens).toBe(4);
  });

  test('gmask in the middle of fill-blanks goes on counting positions', () => {
    const { fake } = run(requestOf('ab[gMASK]c', { bannedTokens: notLetters }));
    expect(fake.ops[0]!.positions).toEqual([0, 1, 2, 3, 4, 5]);
    expect(fake.ops[1]!.positions).toEqual([6]);
  });
});

describe('beams', () => {
  test('all of them are spliced, the next blank goes on from the best', () => {
    const { result, fake } = run(requestOf('ab[MASK]cd[MASK]e', { beams, bannedTokens: [mask] }));
    const output = result.outputs[0]!;
    expect(output.beams).toHaveLength(3);
    expect(output.beams[0]).toMatchObject({ ids: output.ids, text: output.text, blanks: output.blanks.map(({ text }) => text) });
    const second = fake.ops.filter(({ tokens }) => tokens.length > 1)[1]!;
    expect(second.tokens).toEqual([0, 1, ...output.blanks[0]!.tokens, 2, 3, mask, 4, eos, sop]);
    for (const { ids } of output.beams)
      expect(ids.slice(0, 2 + output.blanks[0]!.tokens.length)).toEqual([0, 1, ...output.blanks[0]!.tokens]);
  });
});

describe('refuses before it yields anything', () => {
  test.each<[string, GenerationRequest, new (message: string) => Error, string]>([
    [
      'a prompt that fills the row',
      requestOf('abcdef', { maxRowTokens: 8 }),
      PromptTooLongError,
      'the prompt has 8 tokens with its masks and <sop>, which leaves no room for a new one: max_row_tokens allows 8',
    ],
    ['a prompt that fills the model', requestOf('a'.repeat(62)), PromptTooLongError, 'the model takes 64 tokens; shorten the prompt'],
    ['end tokens beyond the vocabulary', requestOf('a', { endTokens: [20] }), InvalidRequestError, 'end token id 0 is 20'],
    ['banned tokens beyond the vocabulary', requestOf('a', { bannedTokens: [1, 99] }), InvalidRequestError, 'banned token id 1 is 99'],
    [
      'banned prefixes beyond the vocabulary',
      requestOf('a', { beams: { ...beams, bannedPrefixes: [[20]] } }),
      InvalidRequestError,
      'banned prefix id 0 is 20',
    ],
    [
      'top_k beyond the vocabulary',
      requestOf('a', { sampling: { temperature: 1, topK: 21, topP: 0 } }),
      InvalidRequestError,
      'top_k is 21, the model has 20 tokens',
    ],
    ['a [gMASK] in mode gmask', requestOf('a[gMASK]', { mode: 'gmask' }), InvalidRequestError, 'which already has a [gMASK]'],
  ])('%s', (_, request, type, message) => {
    let thrown: unknown;
    try {
      generate(request, letterModel, new FakeModel(vocabSize), () => {}).next();
    } catch (error) {
      thrown = error;
    }
    expect(thrown).toBeInstanceOf(type);
    expect((thrown as Error).message).toContain(message);
  });

  test('stop strings without a tokenizer', () => {
    const request = requestOf('', { prompt: { kind: 'ids', ids: [1] }, stopStrings: ['a'] });
    expect(() => generate(request, { ...letterModel, tokenizer: null }, new FakeModel(vocabSize), () => {}).next()).toThrow(
      'need a tokenizer',
    );
  });
});

test('ids alone work without a tokenizer', () => {
  const fake = new FakeModel(vocabSize);
  const deltas: GenerationDelta[] = [];
  const request = requestOf('', { prompt: { kind: 'ids', ids: [1, mask, 2] }, bannedTokens: [mask] });
  const { outputs } = fake.run(generate(request, { ...letterModel, tokenizer: null }, fake, (delta) => deltas.push(delta)));
  expect(outputs[0]).toMatchObject({ text: '', styledText: '', ids: [1, ...outputs[0]!.blanks[0]!.tokens, 2] });
  expect(deltas.flatMap(({ tokens }) => tokens)).toEqual(outputs[0]!.blanks[0]!.tokens);
});
