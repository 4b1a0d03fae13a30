/** The distributions that the engine samples from, against those of the model's original code. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { packageRoot } from '../../common/package-root.js';
import { loadAddon } from './addon.js';

interface FilterCase {
  readonly name: string;
  readonly logits: { readonly shape: number[]; readonly f32: string };
  readonly results: {
    readonly temperature: number;
    readonly top_k: number;
    readonly top_p: number;
    readonly invalid: number[];
    readonly survivors: 'all' | number[];
    readonly probs: number[];
  }[];
}

const addon = loadAddon();
const unchanged = { biasTokens: new Uint32Array(), biases: new Float32Array(), repetitionPenalty: 1, repeatedTokens: new Uint32Array() };
const PROBABILITY = 1e-6;

describe.each(['A', 'B', 'E'])('filter goldens of random model %s', (model) => {
  const { cases } = JSON.parse(readFileSync(join(packageRoot, 'test', 'golden', 'random', model, 'filter.json'), 'utf8')) as { cases: FilterCase[] };

  test.each(cases)('$name', ({ logits, results }) => {
    const values = new Float32Array(Uint8Array.from(Buffer.from(logits.f32, 'base64')).buffer);
    expect(results.length).toBeGreaterThan(0);
    for (const { temperature, top_k: topK, top_p: topP, invalid, survivors, probs } of results) {
      const got = addon.distribution(values, { temperature, topK, topP, bannedTokens: Uint32Array.from(invalid), ...unchanged });
      const surviving = Array.from(got, (probability, token) => (probability > 0 ? token : -1)).filter((token) => token >= 0);
      const name = JSON.stringify({ temperature, topK, topP, invalid });
      expect(surviving, name).toEqual(survivors === 'all' ? Array.from(values, (_, token) => token) : survivors);
      expect(probs).toHaveLength(surviving.length); // of the survivors, in the order of their ids
      const expected = new Float32Array(values.length);
      surviving.forEach((token, i) => (expected[token] = probs[i]!));
      got.forEach((probability, token) => expect(Math.abs(probability - expected[token]!), `${name} at ${token}`).toBeLessThan(PROBABILITY));
    }
  });
});

const params = { temperature: 1, topK: 0, topP: 0, bannedTokens: new Uint32Array(), ...unchanged };
test.each([
  { name: 'top-k beyond the vocabulary', change: { topK: 5 }, message: 'params.topK: 5, the vocabulary has 4' },
  { name: 'a negative temperature', change: { temperature: -1 }, message: 'params.temperature: must be a number >= 0' },
  { name: 'top-p above one', change: { topP: 1.5 }, message: 'params.topP: must be in 0 .. 1' },
  { name: 'a banned token outside the vocabulary', change: { bannedTokens: Uint32Array.of(4) }, message: 'params.bannedTokens[0]: token 4' },
  { name: 'a bias without a token', change: { biases: Float32Array.of(1) }, message: 'params.biases: has 1 elements for 0 biasTokens' },
  { name: 'a negative repetition penalty', change: { repetitionPenalty: -1 }, message: 'params.repetitionPenalty: must be a finite number > 0' },
])('$name is refused by name', ({ change, message }) => {
  expect(() => addon.distribution(new Float32Array(4), { ...params, ...change })).toThrow(message);
});
