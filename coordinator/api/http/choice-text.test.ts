import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, expect, test } from 'vitest';
import { parseModelConfig } from '../../../model/model-config.js';
import { tinyModelDir } from '../../../model/tiny/tiny-model.js';
import { loadTokenizer, type Tokenizer } from '../../../model/tokenizer/tokenizer.js';
import type { GenerationDelta } from '../../generation/request.js';
import { ChoiceText, echoPart } from './choice-text.js';
import { TokenTexts } from './token-texts.js';

let tokenizer: Tokenizer;
let tokens: TokenTexts;
beforeAll(async () => {
  const config = parseModelConfig(JSON.parse(readFileSync(join(tinyModelDir, 'config.json'), 'utf8')), 'config.json');
  tokenizer = await loadTokenizer(join(tinyModelDir, 'tokenizer.model'), config.tokenizer!);
  tokens = new TokenTexts(tokenizer);
});

/** As sampling emits a text: a token at a time, tokens with the text that they complete. */
function deltasOf(text: string, blank = 0): GenerationDelta[] {
  const stream = tokenizer.stream();
  let held: number[] = [];
  const deltas: GenerationDelta[] = [];
  const emit = (part: string): void => {
    const logprobs = held.map((token, i) => ({ token, logprob: -1 - i, top: [{ token: 7, logprob: -0.5 }] }));
    deltas.push({ output: 0, blank, text: part, tokens: held, logprobs });
    held = [];
  };
  for (const token of tokenizer.encode(text)) {
    held.push(token);
    const part = stream.push(token);
    if (!stream.isHolding) emit(part);
  }
  const rest = stream.flush();
  if (held.length > 0 || rest !== '') emit(rest);
  return deltas;
}

test.each(['Hello there, world.', '你好，世界！', 'a 🦜 b\n\n  c\td', '䨻𠮷 rare'])('offsets of %j count its characters', (text) => {
  const choice = new ChoiceText(tokens, null);
  for (const delta of deltasOf(text)) choice.add(delta);
  expect(choice.text).toBe(text);
  const { tokens: words, text_offset } = choice.logprobs;
  expect(text_offset).toHaveLength(tokenizer.encode(text).length);
  words.forEach((word, i) => {
    if (word.startsWith('token_id:')) return; // a part of a character
    expect(
      [...text]
        .slice(text_offset[i])
        .join('')
        .startsWith(i === 0 ? word.trimStart() : word),
    ).toBe(true);
  });
});

test('texts of blanks are joined by newlines, those of blanks without text, too', () => {
  const choice = new ChoiceText(tokens, null);
  const parts = [...deltasOf('one', 0), ...deltasOf('three', 2)].flatMap((delta) => choice.add(delta)).concat(choice.finish(4));
  expect(choice.text).toBe('one\n\nthree\n');
  expect(parts.map(({ text }) => text).join('')).toBe(choice.text);
  expect(parts.filter(({ blank }) => blank === null).map(({ text }) => text)).toEqual(['\n', '\n', '\n']);
  expect(choice.blanks).toEqual(['one', '', 'three', '']);
  const last = choice.logprobs.text_offset.slice(tokenizer.encode('one').length);
  expect(last[0]).toBe('one\n\n'.length);
});

test('an echo comes once, in front', () => {
  const echo = echoPart(tokens, '问：', tokenizer.encodePrompt('问：'));
  const choice = new ChoiceText(tokens, echo);
  const parts = deltasOf('Hello').flatMap((delta) => choice.add(delta));
  expect(parts.filter((part) => part === echo)).toHaveLength(1);
  expect(parts[0]).toBe(echo);
  expect(choice.finish(1)).toEqual([]);
  expect(choice.text).toBe('问：Hello');
  const numPrompt = tokenizer.encodePrompt('问：').length;
  expect(choice.logprobs.token_logprobs.findLastIndex((value) => value === null)).toBe(numPrompt - 1);
  expect(choice.logprobs.text_offset[numPrompt]).toBe(2);
  expect(choice.meanLogprob).toBe(-1); // of what was generated
});

test('tokens that read the same are told apart by their ids, and the drawn one is always there', () => {
  const choice = new ChoiceText(tokens, null);
  const top = [5, 6].map((token) => ({ token, logprob: -2 }));
  const [mask, gmask] = ['[MASK]', '[gMASK]'].map((name) => tokenizer.command(name));
  const logprobs = [{ token: mask!, logprob: -3, top: [...top, { token: gmask!, logprob: -4 }] }];
  choice.add({ output: 0, blank: 0, text: '', tokens: [mask!], logprobs });
  expect(choice.logprobs.tokens).toEqual(['[[MASK]]']);
  expect(Object.keys(choice.logprobs.top_logprobs[0]!)).toHaveLength(4);
  expect(choice.logprobs.top_logprobs[0]).toMatchObject({ '[[MASK]]': -3, '[[gMASK]]': -4 });
});

test('without a tokenizer tokens are called by their ids', () => {
  const choice = new ChoiceText(new TokenTexts(null), null);
  choice.add({ output: 0, blank: 0, text: '', tokens: [3, 4], logprobs: [3, 4].map((token) => ({ token, logprob: -1, top: [] })) });
  expect(choice.logprobs).toEqual({
    tokens: ['token_id:3', 'token_id:4'],
    token_logprobs: [-1, -1],
    top_logprobs: [{ 'token_id:3': -1 }, { 'token_id:4': -1 }],
    text_offset: [0, 0],
  });
});
