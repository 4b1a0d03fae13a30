import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { mutate, randomIntegers } from './mutate.js';
import { FuzzTargets, inputOf, tryInput } from './targets.js';

let targets: FuzzTargets;
beforeAll(async () => {
  targets = await FuzzTargets.open();
});
afterAll(() => targets.close());

// The same inputs as the first of `npm run bench:fuzz`, which reads a hundred times as many and watches time and memory.
test.each([
  { name: 'pickle', inputs: 1000 },
  { name: 'torch file', inputs: 500 },
  { name: 'pickle in an intact torch file', inputs: 300 },
  { name: 'tar', inputs: 300 },
  { name: 'safetensors', inputs: 500 },
  { name: 'SentencePiece', inputs: 500 },
  { name: 'tokenizer', inputs: 10 },
])('$name: damaged input is read or refused with a typed error of one line', async ({ name, inputs }) => {
  const target = targets.all.find((one) => one.name === name)!;
  let refused = 0;
  for (let index = 0; index < inputs; index++) if (await tryInput(target, inputOf(target, 1, index))) refused++;
  expect(refused).toBeGreaterThan(inputs / 10);
});

test('every target is tested above, and reads its corpus as it is', async () => {
  expect(targets.all.length).toBe(7);
  for (const target of targets.all) {
    for (const input of target.corpus)
      if (target.name !== 'pickle in an intact torch file') expect(await tryInput(target, input), target.name).toBe(false);
  }
});

describe('mutations', () => {
  test('are the same for the same seed, and differ for others', () => {
    const corpus = [Buffer.from('some content with numbers: 123, 45'), Buffer.from('another one')];
    const of = (seed: number): Buffer => Buffer.from(mutate(corpus, randomIntegers(seed)));
    const all = Array.from({ length: 200 }, (_, seed) => of(seed).toString('hex'));
    expect(all).toEqual(all.map((_, seed) => of(seed).toString('hex')));
    expect(new Set(all).size).toBeGreaterThan(150);
  });

  test('leave the corpus alone', () => {
    const original = Buffer.from('content');
    const corpus = [Buffer.from(original)];
    for (let seed = 0; seed < 500; seed++) mutate(corpus, randomIntegers(seed));
    expect(corpus[0]).toEqual(original);
  });
});
