import { copyFileSync, cpSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { CheckpointError } from '../../common/errors.js';
import { writeSyntheticSat } from '../synth/write-synthetic.js';
import { goldenModel, sha256 } from './fixtures/golden-checkpoints.js';
import { importCheckpoint, type ImportOptions } from './import-checkpoint.js';
import { SatCheckpoint } from './sat-checkpoint.js';

const scratch = mkdtempSync(join(tmpdir(), 'import-archive-'));
afterAll(() => rmSync(scratch, { recursive: true }));

const config = { ...goldenModel('E').config, numLayers: 2, hiddenSize: 128, numAttentionHeads: 4, innerHiddenSize: 256, vocabSize: 1024 };
const folder = join(scratch, 'folder');
const archive = join(scratch, 'archive');
const numParts = 60;

let dir: string;
let to: string;
let count = 0;
beforeAll(async () => {
  const options = { config, seed: 'archive', bits: null, ranks: 4 };
  await writeSyntheticSat({ ...options, to: folder }, null);
  await writeSyntheticSat({ ...options, to: archive }, numParts);
});
beforeEach(() => {
  dir = join(scratch, `parts-${count}`);
  to = join(scratch, `store-${count++}`);
});

describe('the archive in 60 parts gives the store that the folder gives, byte for byte', () => {
  test.each([
    { name: 'fp16', options: {} },
    { name: 'int8', options: { quantize: 8 } },
    { name: 'int4 in threads', options: { quantize: 4, threads: 3 } },
    { name: 'int4 in groups of 128', options: { quantize: 4, group: 128 } },
  ] as const)('$name', async ({ options }) => {
    await importCheckpoint({ ...options, from: folder, to: `${to}-folder` });
    await importCheckpoint({ ...options, from: join(archive, 'glm-130b-sat.tar.part_*'), to: `${to}-archive` });
    expect(filesOf(`${to}-archive`)).toEqual(filesOf(`${to}-folder`));
  });

  test('as one file, and as names in any order', async () => {
    const parts = readdirSync(archive)
      .filter((name) => name.includes('part'))
      .sort();
    expect(parts.length).toBe(numParts);
    await importCheckpoint({ from: folder, to: `${to}-folder` });
    const whole = join(scratch, 'whole.tar');
    writeFileSync(whole, Buffer.concat(parts.map((name) => readFileSync(join(archive, name)))));
    copyFileSync(join(archive, 'config.json'), join(scratch, 'config.json'));
    for (const from of [[whole], parts.reverse().map((name) => join(archive, name))]) {
      await importCheckpoint({ from, to: `${to}-archive`, restart: true });
      expect(filesOf(`${to}-archive`)).toEqual(filesOf(`${to}-folder`));
      rmSync(`${to}-archive`, { recursive: true });
    }
  });
});

describe('what is wrong with a part is said with its name', () => {
  beforeEach(() => cpSync(archive, dir, { recursive: true }));
  const part = (index: number): string => join(dir, `glm-130b-sat.tar.part_${String(index).padStart(2, '0')}`);

  test('a flipped byte, in every part: part and tensor, or what else was there', async () => {
    for (let index = 0; index < numParts; index++) {
      const original = readFileSync(part(index));
      const changed = Buffer.from(original);
      const at = Math.floor(original.length / 2);
      changed.writeUInt8(changed.readUInt8(at) ^ 1, at);
      writeFileSync(part(index), changed);
      const tensors = await tensorsAt(part(index), at);
      const error = await failure({ quantize: 4 });
      if (tensors === null)
        expect(error).toContain(basename(part(index))); // not even an index
      else if (tensors.length === 0)
        expect(error).toBeNull(); // between the entries
      else {
        expect(error, `part ${index}`).toContain('does not match its CRC-32');
        expect(error, `part ${index}`).toContain(basename(part(index)));
        expect(error, `part ${index}`).toContain(tensors[0]);
      }
      writeFileSync(part(index), original);
      rmSync(to, { recursive: true, force: true });
    }
  });

  test.each([0, 1, 17, 58])('part %i is missing', async (index) => {
    rmSync(part(index));
    expect(await failure()).toContain(
      index === 0
        ? `is no tar archive: ${part(1)}, byte 0; is the part before it missing?`
        : `a part is missing between ${part(index - 1)} and ${basename(part(index + 1))}`,
    );
  });

  test('the last parts are missing', async () => {
    for (const index of [58, 59]) rmSync(part(index));
    expect(await failure()).toMatch(/which has \d+: at least 2 parts after .*part_57 are missing$/);
  });

  test.each([0, 23])('part %i is truncated', async (index) => {
    truncateSync(part(index), readFileSync(part(index)).length - 1000);
    expect(await failure()).toMatch(
      new RegExp(`part_${index === 0 ? '00' : '23'} has \\d+ bytes, other parts \\d+: it is truncated; fetch it again`),
    );
  });

  test('the last part is truncated', async () => {
    truncateSync(part(59), 10);
    expect(await failure()).toMatch(/part_59, the last part, is truncated/);
  });

  test('any two parts are swapped: a part of the two is named, and the other or the tensor', async () => {
    const named = { both: 0, tensor: 0 };
    for (let a = 0; a < numParts - 1; a += 3) {
      const b = (a + 7) % (numParts - 1);
      swap(part(a), part(b));
      const error = (await failure({ quantize: 4 }))!;
      const names = [a, b].map((index) => basename(part(index))).filter((name) => error.includes(name));
      expect(names.length, `${a} and ${b}: ${error}`).toBeGreaterThan(0);
      if (error.includes('they were swapped or renamed')) {
        expect(names.length, error).toBe(2);
        named.both++;
      } else {
        expect(error).toMatch(/tensor transformer\.\S+ |data\.pkl|is damaged at byte|is no (intact|tar)/);
        named.tensor++;
      }
      swap(part(a), part(b));
    }
    expect(named.both).toBeGreaterThan(0);
  });

  test('a part of another archive in the place of one', async () => {
    await writeSyntheticSat({ config, seed: 'other', bits: null, ranks: 4, to: `${dir}-other` }, numParts);
    copyFileSync(join(`${dir}-other`, basename(part(30))), part(30));
    const error = await failure();
    expect(error).toContain('does not match its CRC-32');
    expect(error).toContain(basename(part(30)));
  });

  async function failure(options: Partial<ImportOptions> = {}): Promise<string | null> {
    const error: unknown = await importCheckpoint({ from: join(dir, 'glm-130b-sat.tar.part_*'), to, restart: true, ...options }).then(
      () => null,
      (reason: unknown) => reason,
    );
    if (error === null) return null;
    expect(error).toBeInstanceOf(CheckpointError);
    expect((error as Error).message).not.toContain('\n');
    return (error as Error).message;
  }
});

/** Tensors of the intact archive whose storage has a byte of a part; null where the damage keeps the archive from being opened. */
async function tensorsAt(path: string, at: number): Promise<string[] | null> {
  const damaged = await SatCheckpoint.open(join(path, '..', 'glm-130b-sat.tar.part_*')).catch(() => null);
  if (damaged === null) return null;
  const found = damaged.ranks.flatMap((rank) =>
    [...rank.tensors.values()]
      .filter(({ storage }) =>
        storage.extents.some((extent) => extent.path === path && extent.offset <= at && at < extent.offset + extent.length),
      )
      .map(({ name }) => name),
  );
  await damaged.close();
  return found.filter((name) => !name.endsWith('inv_freq'));
}

function swap(a: string, b: string): void {
  renameSync(a, `${a}.x`);
  renameSync(b, a);
  renameSync(`${a}.x`, b);
}

function filesOf(store: string): Record<string, string> {
  return Object.fromEntries(readdirSync(store).map((name) => [name, sha256(readFileSync(join(store, name)))]));
}
