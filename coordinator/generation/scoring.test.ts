import { describe, expect, test } from 'vitest';
import { InvalidRequestError, PromptTooLongError } from '../../common/errors.js';
import { FakeModel, logSoftmax } from './fake-model.js';
import { letterModel, LETTERS, letterTokenizer } from './letter-model.js';
import type { Mode, ScoreRequest } from './request.js';
import { score } from './scoring.js';

const { vocabSize, mask, gmask, sop } = LETTERS;

function requestOf(text: string, choices: string[], mode: Mode = 'mask'): ScoreRequest {
  return { prompt: { kind: 'text', text }, mode, choices: choices.map((each) => ({ kind: 'text', text: each })) };
}

/** Log-probabilities of one choice from one run over its whole row. */
function direct(context: number[], positions: number[], bidirectionalTokens: number, choice: number[]): number[] {
  const model = new FakeModel(vocabSize);
  const tokens = [...context, ...choice.slice(0, -1)];
  const result = model.execute({
    sequence: model.create(),
    tokens,
    positions: positions.slice(0, tokens.length),
    bidirectionalTokens,
    want: { kind: 'logits', rows: choice.length },
  });
  if (result.kind !== 'logits') throw new Error('no logits');
  return choice.map((token, i) => logSoftmax(result.logits.slice(i * vocabSize, (i + 1) * vocabSize))[token]!);
}

describe('scores of choices', () => {
  const text = [0, 1, 2];
  test.each<[Mode, number[], number[], number]>([
    ['mask', [...text, mask, sop], [0, 1, 2, 3, 3, 3, 3], 4],
    ['gmask', [...text, gmask, sop], [0, 1, 2, 3, 4, 5, 6], 4],
    ['unidirectional', [gmask, sop, ...text], [0, 1, 2, 3, 4, 5, 6], 0],
  ])('mode %s: each choice as if it were alone', (mode, context, positions, bidirectionalTokens) => {
    const model = new FakeModel(vocabSize);
    const result = model.run(score(requestOf('abc', ['d', 'efg', 'ef'], mode), letterModel, model));
    expect(model.liveSequences).toBe(0);
    expect(result.contextTokens).toBe(4);
    for (const [i, choice] of ['d', 'efg', 'ef'].map((each) => letterTokenizer.encode(each)).entries()) {
      const expected = direct(context, positions, bidirectionalTokens, choice);
      expect(result.choices[i]!.tokens).toEqual(choice);
      expect(result.choices[i]!.tokenLogprobs).toEqual(expected);
      expect(result.choices[i]!.logprob).toBeCloseTo(
        expected.reduce((sum, each) => sum + each, 0),
        10,
      );
    }
  });

  test('a mask in the prompt is where the choice goes', () => {
    const model = new FakeModel(vocabSize);
    model.run(score(requestOf('a[MASK]b', ['cd']), letterModel, model));
    expect(model.ops.map(({ tokens, positions }) => [tokens, positions])).toEqual([
      [[0, mask, 1], [0, 1, 2]],
      [[sop, 2], [1, 1]],
    ]); // prettier-ignore
  });
});

test.each<[string, ScoreRequest, new (message: string) => Error, string]>([
  ['no choices', requestOf('a', []), InvalidRequestError, 'there are no choices'],
  ['an empty choice', requestOf('a', ['b', '']), InvalidRequestError, 'choice 1 has no tokens'],
  [
    'what the model does not take',
    requestOf('a'.repeat(60), ['b', 'bcde']),
    PromptTooLongError,
    'choice 1 has 4: together the model takes 65',
  ],
])('refuses %s', (_, request, type, message) => {
  const model = new FakeModel(vocabSize);
  expect(() => score(request, letterModel, model).next()).toThrow(type);
  expect(() => score(request, letterModel, model).next()).toThrow(message);
});
