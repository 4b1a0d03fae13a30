import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { goldenModel } from '../import/fixtures/golden-checkpoints.js';
import { halfToFloat } from '../import/float16.js';
import { importCheckpoint } from '../import/import-checkpoint.js';
import { openStore } from '../store/open-store.js';
import { verifyTensor } from '../store/verify-tensor.js';
import { SyntheticWeights } from './synthetic-weights.js';
import { writeSyntheticSat, writeSyntheticStore, type SynthOptions } from './write-synthetic.js';

const scratch = mkdtempSync(join(tmpdir(), 'write-synthetic-'));
afterAll(() => rmSync(scratch, { recursive: true }));

const { config } = goldenModel('E');
let folders = 0;
function options(more: Partial<SynthOptions>): SynthOptions {
  return { config, seed: 'a', bits: null, ranks: 1, to: join(scratch, String(folders++)), ...more };
}

/** Every tensor of a store with the hash of its bytes. */
async function contentOf(dir: string): Promise<Record<string, string>> {
  const store = await openStore(dir);
  for (const tensor of store.tensors) await verifyTensor(tensor);
  return Object.fromEntries(store.tensors.map(({ name, sha256 }) => [name, sha256!]));
}

/** Of the store that a SAT folder is imported to. */
async function importedContent(from: string): Promise<Record<string, string>> {
  const to = join(scratch, String(folders++));
  await importCheckpoint({ from, to });
  return contentOf(to);
}

describe('the whole tensors are the same at every degree, and those of the store', () => {
  test.each([null, 8, 4] as const)('%s bits', async (bits) => {
    const contents = [];
    for (const ranks of [1, 2, 4]) {
      const sat = options({ bits, ranks });
      await writeSyntheticSat(sat, null);
      const store = options({ bits, ranks });
      await writeSyntheticStore(store);
      const content = await importedContent(sat.to);
      expect(content).toEqual(await contentOf(store.to));
      // A row of a column-split matrix has as many scales as there are ranks.
      contents.push(Object.fromEntries(Object.entries(content).filter(([name]) => !/(dense|4h_to_h)\.scales$/.test(name))));
    }
    expect(contents[1]).toEqual(contents[0]);
    expect(contents[2]).toEqual(contents[0]);
    expect(new Set(Object.values(contents[0]!)).size).toBe(Object.keys(contents[0]!).length); // no two tensors are alike
  });
});

test('another seed gives other weights, the same seed the same file', async () => {
  const [first, again, other] = [options({}), options({}), options({ seed: 'b' })];
  for (const one of [first, again, other]) await writeSyntheticSat(one, null);
  const hash = ({ to }: SynthOptions): string =>
    createHash('sha256')
      .update(readFileSync(join(to, '49300', 'mp_rank_00_model_states.pt')))
      .digest('hex');
  expect(hash(again)).toBe(hash(first));
  expect(hash(other)).not.toBe(hash(first));
});

test('a part of a tensor is the same as in the whole, wherever it begins', () => {
  const weights = new SyntheticWeights('x');
  const whole = new Uint16Array(20_000);
  weights.fillHalves('t', 0, whole);
  for (const [begin, length] of [
    [0, 1],
    [4095, 2],
    [4096, 4096],
    [5000, 10_000],
    [19_999, 1],
  ] as const) {
    const part = new Uint16Array(length);
    weights.fillHalves('t', begin, part);
    expect(part).toEqual(whole.slice(begin, begin + length));
  }
});

test('weights have the spread of trained ones, in fp16 and quantised', () => {
  const weights = new SyntheticWeights('x');
  const count = 100_000;
  const halves = new Uint16Array(count);
  weights.fillHalves('t', 0, halves);
  const deviation = (values: readonly number[]): number => Math.sqrt(values.reduce((sum, value) => sum + value * value, 0) / values.length);
  expect(deviation([...halves].map((bits) => halfToFloat[bits]!))).toBeCloseTo(0.02, 3);
  for (const bits of [8, 4] as const) {
    const bytes = new Uint8Array(count);
    weights.fillQuantized('t', bits, 0, bytes);
    const scales = new Uint16Array(count);
    weights.fillScales('t', bits, 0, scales);
    const values = [...bytes].map(
      (byte, i) => (((bits === 8 ? byte : byte & 0xf0) << 24) >> (bits === 8 ? 24 : 28)) * halfToFloat[scales[i]!]!,
    );
    expect(deviation(values)).toBeCloseTo(0.02, 2);
  }
});

test('an archive in parts holds the same files, and tar reads it', async () => {
  const [folder, archive] = [options({ ranks: 2 }), options({ ranks: 2 })];
  await writeSyntheticSat(folder, null);
  await writeSyntheticSat(archive, 7);
  const parts = readdirSync(archive.to).filter((name) => name !== 'config.json');
  expect(parts).toEqual(Array.from({ length: 7 }, (_, i) => `glm-130b-sat.tar.part_0${i}`));
  const sizes = parts.map((name) => statSync(join(archive.to, name)).size);
  expect(new Set(sizes.slice(0, -1)).size).toBe(1);
  expect(sizes.at(-1)).toBeLessThanOrEqual(sizes[0]!);
  const unpacked = mkdtempSync(join(scratch, 'tar-'));
  execFileSync('tar', ['xf', '-', '-C', unpacked], { input: Buffer.concat(parts.map((name) => readFileSync(join(archive.to, name)))) });
  for (const name of ['latest', '49300/mp_rank_00_model_states.pt', '49300/mp_rank_01_model_states.pt']) {
    expect(readFileSync(join(unpacked, 'glm-130b-sat', name)).equals(readFileSync(join(folder.to, name)))).toBe(true);
  }
});

test('a degree that does not divide the model is refused and leaves nothing', async () => {
  const three = options({ ranks: 3 });
  await expect(writeSyntheticSat(three, null)).rejects.toThrow('world size 3 does not divide the model');
  await expect(writeSyntheticStore(three)).rejects.toThrow('world size 3 does not divide the model');
  expect(readdirSync(scratch)).not.toContain(three.to.split('/').at(-1));
});

test('aborting leaves nothing', async () => {
  const aborted = options({ signal: AbortSignal.abort(new Error('enough')), to: join(mkdtempSync(join(scratch, 'abort-')), 'x') });
  await expect(writeSyntheticSat(aborted, null)).rejects.toThrow('enough');
  await expect(writeSyntheticSat(aborted, 3)).rejects.toThrow('enough');
  expect(readdirSync(join(aborted.to, '..'))).toEqual([]);
});
