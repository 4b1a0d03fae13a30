import { fileURLToPath } from 'node:url';
import { beforeAll, expect, test } from 'vitest';
import { InvalidRequestError, PromptTooLongError } from '../../common/errors.js';
import { buildContext, encodePlain, type Mode, type Prompt, type PromptModel } from './prompt.js';
import { loadTokenizer } from './tokenizer.js';

const [mask, gmask, smask, sop, eos] = [3740, 3741, 3742, 3744, 2];
const specialTokens = { mask, gmask, smask, eod: 3743, sop, eop: 3745, enc: 3746, dblock: 3747, eos };
const config = { vocabSize: 4096, maxSequenceLength: 512, specialTokens };
let model: PromptModel;
let encode: (text: string) => number[];
beforeAll(async () => {
  const path = fileURLToPath(new URL('../tiny/tokenizer.model', import.meta.url));
  const tokenizer = await loadTokenizer(path, { file: 'tokenizer.model', imageTokenOffset: 0, numTextPieces: 3740 });
  model = { config, tokenizer };
  encode = (text) => tokenizer.encode(text);
});

const ofText = (text: string): Prompt => ({ kind: 'text', text });
const ofIds = (...ids: number[]): Prompt => ({ kind: 'ids', ids });

// Rows are written as texts, which are encoded each on its own, and ids.
test.each<{ name: string; prompt: Prompt; mode: Mode; row: (string | number)[]; maskToken: number; positions: string }>([
  {
    name: '[MASK] in the middle: </s>',
    prompt: ofText('a [MASK] b'),
    mode: 'fill-blanks',
    row: ['a ', mask, ' b', eos],
    maskToken: mask,
    positions: 'mask',
  },
  {
    name: 'a mask at the end: no </s>',
    prompt: ofText('a [sMASK]'),
    mode: 'fill-blanks',
    row: ['a ', smask],
    maskToken: smask,
    positions: 'mask',
  },
  {
    name: 'no mask: [gMASK] is appended',
    prompt: ofText('a b'),
    mode: 'fill-blanks',
    row: ['a b', gmask],
    maskToken: gmask,
    positions: 'running',
  },
  { name: 'nothing at all', prompt: ofText(''), mode: 'fill-blanks', row: [gmask], maskToken: gmask, positions: 'running' },
  {
    name: '[MASK] before the other kinds',
    prompt: ofText('[gMASK] a [sMASK] b [MASK] c'),
    mode: 'fill-blanks',
    row: [gmask, ' a ', smask, ' b ', mask, ' c', eos],
    maskToken: mask,
    positions: 'mask',
  },
  {
    name: '[sMASK] before [gMASK]',
    prompt: ofText('[gMASK][sMASK]'),
    mode: 'fill-blanks',
    row: [gmask, smask],
    maskToken: smask,
    positions: 'mask',
  },
  {
    name: 'MASK] that is no mask word',
    prompt: ofText('a MASK] b'),
    mode: 'fill-blanks',
    row: ['a MASK] b', gmask],
    maskToken: gmask,
    positions: 'running',
  },
  {
    name: 'ids with a mask: no </s>',
    prompt: ofIds(5, mask, 6),
    mode: 'fill-blanks',
    row: [5, mask, 6],
    maskToken: mask,
    positions: 'mask',
  },
  { name: 'ids without a mask', prompt: ofIds(5, 6), mode: 'fill-blanks', row: [5, 6, gmask], maskToken: gmask, positions: 'running' },
  {
    name: '<sop> among ids is a token',
    prompt: ofIds(5, sop, 6),
    mode: 'fill-blanks',
    row: [5, sop, 6, gmask],
    maskToken: gmask,
    positions: 'running',
  },
  { name: 'mode mask appends [MASK], no </s>', prompt: ofText('a'), mode: 'mask', row: ['a', mask], maskToken: mask, positions: 'mask' },
  {
    name: 'mode mask takes the [MASK] that is there',
    prompt: ofText('[MASK] a'),
    mode: 'mask',
    row: [mask, ' a'],
    maskToken: mask,
    positions: 'mask',
  },
  {
    name: 'mode mask keeps other masks as tokens',
    prompt: ofIds(gmask, 5),
    mode: 'mask',
    row: [gmask, 5, mask],
    maskToken: mask,
    positions: 'mask',
  },
  { name: 'mode gmask', prompt: ofIds(5), mode: 'gmask', row: [5, gmask], maskToken: gmask, positions: 'running' },
  { name: 'unidirectional', prompt: ofText('a b'), mode: 'unidirectional', row: ['a b'], maskToken: gmask, positions: 'running' },
])('$name', ({ prompt, mode, row, maskToken, positions }) => {
  const context = buildContext(prompt, mode, model);
  expect(context.row).toEqual(row.flatMap((part) => (typeof part === 'string' ? encode(part) : [part])));
  expect({ maskToken: context.maskToken, positions: context.positions, bidirectional: context.bidirectional }).toEqual({
    maskToken,
    positions,
    bidirectional: mode !== 'unidirectional',
  });
});

test.each([
  [ofText('The [MASK].'), true],
  [ofText('The — [MASK].'), false],
  [ofIds(5, mask), true],
  [ofIds(355, mask), false],
])('%j is English: %s', (prompt, isEnglish) => {
  expect(buildContext(prompt, 'fill-blanks', model).isEnglish).toBe(isEnglish);
});

test.each<[string, Prompt, Mode, string]>([
  ['an id beyond the vocabulary', ofIds(5, 4096), 'mask', 'prompt id 1 is 4096, ids of this model are integers from 0 to 4095'],
  ['a negative id', ofIds(-1), 'gmask', 'prompt id 0 is -1'],
  ['a fraction', ofIds(0.5), 'fill-blanks', 'prompt id 0 is 0.5'],
  ['[MASK] in unidirectional mode', ofText('a [MASK]'), 'unidirectional', 'a unidirectional prompt is continued and has no masks'],
  ['[gMASK] in unidirectional mode', ofIds(gmask), 'unidirectional', 'a unidirectional prompt is continued and has no masks'],
])('refuses %s', (_, prompt, mode, message) => {
  expect(() => buildContext(prompt, mode, model)).toThrow(InvalidRequestError);
  expect(() => buildContext(prompt, mode, model)).toThrow(message);
});

test('takes only ids without a tokenizer', () => {
  const bare = { config, tokenizer: null };
  expect(() => buildContext(ofText('a'), 'mask', bare)).toThrow('this model has no tokenizer: send token ids');
  expect(() => encodePlain(ofText('a'), 'choice 0', bare)).toThrow(InvalidRequestError);
  expect(buildContext(ofIds(5), 'mask', bare)).toMatchObject({ row: [5, mask], isEnglish: true });
  expect(encodePlain(ofText('[MASK]'), 'choice 0', model)).not.toContain(mask);
});

test('refuses text that can not fit before it is tokenised', () => {
  const text = 'a'.repeat(512 * 80 + 1);
  expect(() => buildContext(ofText(text), 'fill-blanks', model)).toThrow(PromptTooLongError);
  expect(() => encodePlain(ofText(text), 'choice 3', model)).toThrow('the text of the choice 3 has 40961 characters');
  expect(buildContext(ofText(text.slice(1)), 'fill-blanks', model).row.length).toBeGreaterThan(512);
});

test('a text whose ids are there already is not encoded again', () => {
  const unused = () => {
    throw new Error('encoded again');
  };
  const idle: PromptModel = { config, tokenizer: { ...model.tokenizer!, encode: unused, encodePrompt: unused } };
  const text = 'a [MASK] b';
  const ids = model.tokenizer!.encodePrompt(text);
  for (const mode of ['fill-blanks', 'mask'] as const) {
    expect(buildContext({ kind: 'text', text, ids }, mode, idle)).toEqual(buildContext(ofText(text), mode, model));
  }
  expect(encodePlain({ kind: 'text', text, ids: encode(text) }, 'choice', idle)).toEqual(encodePlain(ofText(text), 'choice', model));
});
