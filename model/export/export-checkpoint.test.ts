import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { packageRoot } from '../../common/package-root.js';
import { goldenModels, sha256, type GoldenLayout, type GoldenTensor } from '../import/fixtures/golden-checkpoints.js';
import { importCheckpoint } from '../import/import-checkpoint.js';
import { SatCheckpoint } from '../import/sat-checkpoint.js';
import { openStore } from '../store/open-store.js';
import { exportCheckpoint } from './export-checkpoint.js';

const scratch = mkdtempSync(join(tmpdir(), 'export-checkpoint-'));
afterAll(() => rmSync(scratch, { recursive: true }));

let folders = 0;
const folder = (): string => join(scratch, String(folders++));

async function importGolden(layout: GoldenLayout, configPath: string): Promise<string> {
  const to = folder();
  await importCheckpoint({ from: layout.dir!, to, configPath });
  return to;
}

/** Every tensor of every rank as the golden files describe it. */
async function contentOf(dir: string): Promise<Map<string, GoldenTensor>[]> {
  const checkpoint = await SatCheckpoint.open(dir);
  const ranks = [];
  for (const file of checkpoint.ranks) {
    const tensors = new Map<string, GoldenTensor>();
    for (const tensor of file.tensors.values()) {
      tensors.set(tensor.name, { shape: tensor.shape, dtype: tensor.dtype, sha256: sha256(await file.readTensor(tensor)) });
    }
    ranks.push(tensors);
  }
  await checkpoint.close();
  return ranks;
}

/** The original copies `inv_freq` where a checkpoint has it, and nothing reads it; an export always has it. */
function expectGolden(seen: readonly ReadonlyMap<string, GoldenTensor>[], layout: GoldenLayout): void {
  const withoutFrequencies = (tensors: ReadonlyMap<string, GoldenTensor>): string[] =>
    [...tensors.keys()].filter((name) => !name.endsWith('inv_freq'));
  expect(seen.length).toBe(layout.numRanks);
  for (const [rank, golden] of layout.ranks.entries()) {
    for (const [name, tensor] of golden) expect(seen[rank]!.get(name), `${name} of rank ${rank}`).toEqual(tensor);
    expect(withoutFrequencies(seen[rank]!)).toEqual(withoutFrequencies(golden)); // in the same order, too
  }
}

describe.each(goldenModels)('what the original converter made of $name', ({ layouts, configPath }) => {
  const stores = new Map<string, string>();
  beforeAll(async () => {
    for (const layout of layouts) if (layout.dir !== null) stores.set(layout.name, await importGolden(layout, configPath));
  });

  test.each(layouts)('$name, from the fp16 checkpoint', async (layout) => {
    const to = folder();
    await exportCheckpoint({ from: stores.get('tp1')!, to, ranks: layout.numRanks, quantize: layout.bits });
    expectGolden(await contentOf(to), layout);
  });

  test.each(layouts.filter(({ dir }) => dir !== null))('$name, from itself', async (layout) => {
    const to = folder();
    await exportCheckpoint({ from: stores.get(layout.name)!, to, ranks: layout.numRanks });
    expectGolden(await contentOf(to), layout);
  });
});

describe('the tiny model', () => {
  let store: string;
  beforeAll(async () => {
    store = folder();
    await importCheckpoint({
      from: join(packageRoot, 'model/tiny/sat'),
      to: store,
      configPath: join(packageRoot, 'model/tiny/config.json'),
    });
  });

  test('comes back as the same store: tensors, configuration and tokenizer', async () => {
    const [sat, again] = [folder(), folder()];
    await exportCheckpoint({ from: store, to: sat, ranks: 4, iteration: '4904' });
    expect(readFileSync(join(sat, 'latest'), 'utf8')).toBe('4904');
    await importCheckpoint({ from: sat, to: again });
    const [before, after] = [await openStore(store), await openStore(again)];
    expect(after.config).toEqual(before.config);
    expect(after.tensors.map(({ name, sha256: hash }) => [name, hash])).toEqual(
      before.tensors.map(({ name, sha256: hash }) => [name, hash]),
    );
    expect(readFileSync(after.tokenizerPath!).equals(readFileSync(before.tokenizerPath!))).toBe(true);
  });

  test.each([
    { name: 'groups of 128', quantized: { group: 128 }, ranks: 1, message: 'with a scale for each 128 columns' },
    { name: 'scales of other ranks', quantized: { ranks: 2 }, ranks: 4, message: 'vector-wise for 2 ranks' },
  ] as const)('$name are not the format of this degree', async ({ quantized, ranks, message }) => {
    const [int4, to] = [folder(), folder()];
    const from = join(packageRoot, 'model/tiny/sat');
    await importCheckpoint({ from, to: int4, configPath: join(packageRoot, 'model/tiny/config.json'), quantize: 4, ...quantized });
    await expect(exportCheckpoint({ from: int4, to, ranks })).rejects.toThrow(message);
    await expect(exportCheckpoint({ from: int4, to, ranks, quantize: 8 })).rejects.toThrow('is quantised to INT4 already');
    expect(existsSync(to)).toBe(false);
  });

  test('a degree that does not divide the model is refused', async () => {
    await expect(exportCheckpoint({ from: store, to: folder(), ranks: 5 })).rejects.toThrow('world size 5 does not divide the model');
  });

  test('aborting leaves nothing', async () => {
    const dir = mkdtempSync(join(scratch, 'abort-'));
    const signal = AbortSignal.abort(new Error('enough'));
    await expect(exportCheckpoint({ from: store, to: join(dir, 'x'), ranks: 2, signal })).rejects.toThrow('enough');
    expect(readdirSync(dir)).toEqual([]);
  });
});
