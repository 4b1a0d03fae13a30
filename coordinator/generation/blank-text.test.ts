import { fileURLToPath } from 'node:url';
import fc from 'fast-check';
import { beforeAll, describe, expect, test } from 'vitest';
import { loadTokenizer, type Tokenizer } from '../../model/tokenizer/tokenizer.js';
import { BlankText, type FinalPart } from './blank-text.js';
import { letterTokenizer } from './letter-model.js';

function feed(blank: BlankText, ids: readonly number[]): { texts: string[]; tokens: number[]; isStopped: boolean } {
  const parts: FinalPart[] = [];
  for (const id of ids) {
    parts.push(blank.push(id));
    if (blank.isStopped) break;
  }
  if (!blank.isStopped) parts.push(blank.finish());
  return {
    texts: parts.map(({ text }) => text),
    tokens: parts.flatMap((each) => each.tokens),
    isStopped: blank.isStopped,
  };
}

describe('stop strings over letters', () => {
  test.each([
    { name: 'none: text comes at once', text: 'abc', stops: [], texts: ['a', 'b', 'c', ''], result: 'abc', isStopped: false },
    { name: 'text before it', text: 'abcd', stops: ['cd'], texts: ['a', 'b', '', ''], result: 'ab', isStopped: true },
    {
      name: 'what only began like one is given later',
      text: 'acab',
      stops: ['cd'],
      texts: ['a', '', 'ca', 'b', ''],
      result: 'acab',
      isStopped: false,
    },
    { name: 'what began like one at the end', text: 'ac', stops: ['cd'], texts: ['a', '', 'c'], result: 'ac', isStopped: false },
    { name: 'the one that comes first', text: 'abcd', stops: ['d', 'bc'], texts: ['a', '', ''], result: 'a', isStopped: true },
    {
      name: 'one within the beginning of another',
      text: 'abcabd',
      stops: ['abd', 'ca'],
      texts: ['', '', 'abc'.slice(0, 2), ''],
      result: 'ab',
      isStopped: true,
    },
    { name: 'repetitions', text: 'aaab', stops: ['aab'], texts: ['', '', 'a', ''], result: 'a', isStopped: true },
  ])('$name', ({ text, stops, texts, result, isStopped }) => {
    const blank = new BlankText(letterTokenizer, stops);
    const fed = feed(blank, letterTokenizer.encode(text));
    expect({ texts: fed.texts, isStopped: fed.isStopped }).toEqual({ texts, isStopped });
    expect(fed.tokens).toEqual(letterTokenizer.encode(result));
    expect(blank.result()).toEqual({ tokens: letterTokenizer.encode(result), text: result });
  });

  test('is the text before the first stop string, in pieces that are never taken back', () => {
    const letters = fc.array(fc.integer({ min: 0, max: 2 }), { maxLength: 12 });
    const stop = fc.array(fc.integer({ min: 0, max: 2 }), { minLength: 1, maxLength: 4 });
    fc.assert(
      fc.property(letters, fc.array(stop, { maxLength: 3 }), (ids, stops) => {
        const stopTexts = stops.map((each) => letterTokenizer.decode(each));
        const text = letterTokenizer.decode(ids);
        // The generation ends with the token that completes the first stop string; of several it completes, the earliest counts.
        const ends = stopTexts.map((each) => (text.includes(each) ? text.indexOf(each) + each.length : Infinity));
        const seen = text.slice(0, Math.min(...ends));
        const cuts = stopTexts.map((each) => seen.indexOf(each)).filter((at) => at >= 0);
        const expected = seen.slice(0, Math.min(...cuts));
        const blank = new BlankText(letterTokenizer, stopTexts);
        const fed = feed(blank, ids);
        expect(fed.texts.join('')).toBe(expected);
        expect(letterTokenizer.decode(fed.tokens)).toBe(expected);
        expect(fed.isStopped).toBe(cuts.length > 0);
      }),
      { seed: 1, numRuns: 1000 },
    );
  });
});

describe('the tiny tokenizer', () => {
  let tokenizer: Tokenizer;
  beforeAll(async () => {
    const path = fileURLToPath(new URL('../../model/tiny/tokenizer.model', import.meta.url));
    tokenizer = await loadTokenizer(path, { file: 'tokenizer.model', imageTokenOffset: 0, numTextPieces: 3740 });
  });

  test('a stop string inside of a token: the text is exact, tokens are whole', () => {
    const ids = tokenizer.encode('the capital of');
    const blank = new BlankText(tokenizer, ['ital']);
    const fed = feed(blank, ids);
    expect([fed.texts.join(''), fed.isStopped]).toEqual(['the cap', true]);
    expect(blank.result().text).toBe('the cap');
    expect(tokenizer.decode(blank.result().tokens)).toBe('the');
    expect(fed.tokens).toEqual(blank.result().tokens);
  });

  test('a stop string of one character in several bytes', () => {
    const blank = new BlankText(tokenizer, ['é']);
    const fed = feed(blank, [5, 4023, 3997, 5]); // the é the
    expect([fed.texts.join(''), fed.tokens, fed.isStopped]).toEqual(['the', [5], true]);
  });

  test('tokens go with their text', () => {
    const blank = new BlankText(tokenizer, []);
    const parts = [4068, 3987, 3980, 3956].map((id) => blank.push(id));
    expect(parts.map(({ text, tokens }) => [text, tokens.length])).toEqual([['', 0], ['', 0], ['', 0], ['😀', 4]]); // prettier-ignore
  });

  test('any ids: the pieces are the decoded tokens', () => {
    const anyId = fc.oneof(fc.integer({ min: 0, max: 4095 }), fc.integer({ min: 3828, max: 4083 }));
    fc.assert(
      fc.property(
        fc.array(anyId, { maxLength: 20 }),
        fc.array(fc.constantFrom('\ufffd', ' ', '\n', '的', 'e', 'ing'), { maxLength: 2 }),
        (ids, stops) => {
          const blank = new BlankText(tokenizer, stops);
          const fed = feed(blank, ids);
          const { tokens } = blank.result();
          expect(fed.tokens).toEqual(tokens);
          const text = fed.texts.join('');
          expect(text.startsWith(tokenizer.decode(tokens))).toBe(true);
          for (const stop of stops) expect(text).not.toContain(stop);
          if (!fed.isStopped) expect([text, tokens, blank.result().text]).toEqual([tokenizer.decode(ids), ids, tokenizer.detokenize(ids)]);
        },
      ),
      { seed: 2, numRuns: 500 },
    );
  });
});
