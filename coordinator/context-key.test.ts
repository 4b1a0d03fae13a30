import fc from 'fast-check';
import { expect, test } from 'vitest';
import { contextKeyOf } from './context-key.js';
import type { ExtendOp, Want } from './generation/strategy.js';

const sequence = { id: 1, length: 0 };
const tokens = Array.from({ length: 24 }, (_, i) => 100 + i);
const positions = tokens.map((_, i) => i);
const op: ExtendOp = { sequence, tokens, positions, bidirectionalTokens: 20, want: { kind: 'none' } };

const keyOf = (changes: Partial<ExtendOp> = {}, apiKey = 'a', contextTokens = 20): string | null =>
  contextKeyOf(apiKey, { ...op, ...changes }, contextTokens);

test('equal contexts have equal keys, whatever comes behind them', () => {
  expect(keyOf()).not.toBeNull();
  expect(keyOf()).toBe(keyOf());
  expect(keyOf({ tokens: [...tokens.slice(0, 20), 7, 8, 9, 10] })).toBe(keyOf());
  expect(keyOf({ positions: [...positions.slice(0, 20), 7, 7, 7, 7] })).toBe(keyOf());
  expect(keyOf({ tokens: tokens.slice(0, 21), positions: positions.slice(0, 21), want: { kind: 'logits', rows: 1 } })).toBe(keyOf());
});

test.each<{ name: string; other: string | null }>([
  { name: 'another token, a kind of mask among them', other: keyOf({ tokens: tokens.map((token, i) => (i === 5 ? 7 : token)) }) },
  { name: 'another position', other: keyOf({ positions: positions.map((position, i) => (i === 5 ? 7 : position)) }) },
  { name: 'tokens and positions the other way round', other: keyOf({ tokens: positions, positions: tokens }) },
  { name: 'a shorter context', other: keyOf({ bidirectionalTokens: 19 }, 'a', 19) },
  { name: 'one that is causal', other: keyOf({ bidirectionalTokens: 0 }) },
  { name: 'another API key', other: keyOf({}, 'b') },
])('$name is another context', ({ other }) => {
  expect(other).not.toBeNull();
  expect(other).not.toBe(keyOf());
});

test('names of API keys can not be chosen so that a context is found under another one', () => {
  fc.assert(
    fc.property(fc.string(), fc.string(), (one, other) => {
      fc.pre(one !== other);
      expect(keyOf({}, one)).not.toBe(keyOf({}, other));
    }),
  );
});

test.each<{ name: string; want: Want; isShared: boolean }>([
  { name: 'targets behind the context', want: { kind: 'targets', tokens: [1, 2, 3, 4] }, isShared: true },
  { name: 'targets that begin in it', want: { kind: 'targets', tokens: [1, 2, 3, 4, 5] }, isShared: false },
  { name: 'logits behind it', want: { kind: 'logits', rows: 4 }, isShared: true },
  { name: 'logits of its last token', want: { kind: 'logits', rows: 5 }, isShared: false },
])('$name: shared $isShared', ({ want, isShared }) => {
  expect(keyOf({ want }) !== null).toBe(isShared);
});

test('what is wanted of the last row needs that row to be run', () => {
  const want: Want = { kind: 'candidates', count: 1, bannedTokens: [], noise: null };
  expect(keyOf({ want, tokens: tokens.slice(0, 20), positions: positions.slice(0, 20) })).toBeNull();
  expect(keyOf({ want, tokens: tokens.slice(0, 21), positions: positions.slice(0, 21) })).not.toBeNull();
});

test('a short context is not worth it', () => {
  expect(keyOf({ bidirectionalTokens: 15 }, 'a', 15)).toBeNull();
  expect(keyOf({ bidirectionalTokens: 16 }, 'a', 16)).not.toBeNull();
});
