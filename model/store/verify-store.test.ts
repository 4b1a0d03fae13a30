import { appendFileSync, cpSync, mkdtempSync, readFileSync, rmSync, truncateSync, unlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { goldenModel } from '../import/fixtures/golden-checkpoints.js';
import { writeSyntheticStore } from '../synth/write-synthetic.js';
import { manifestFileName } from './manifest.js';
import { openStore } from './open-store.js';
import { indexFileName } from './store-format.js';
import { verifyStore } from './verify-store.js';

const scratch = mkdtempSync(join(tmpdir(), 'verify-store-'));
const original = join(scratch, 'original');
beforeAll(async () => {
  await writeSyntheticStore({ config: goldenModel('E').config, seed: '1', bits: 4, ranks: 1, to: original });
});
afterAll(() => rmSync(scratch, { recursive: true }));

let copies = 0;
function copy(): string {
  const dir = join(scratch, `copy-${copies++}`);
  cpSync(original, dir, { recursive: true });
  return dir;
}

function flipByte(file: string, offset: number): void {
  const bytes = readFileSync(file);
  bytes[offset]! ^= 1;
  writeFileSync(file, bytes);
}

function editJson(file: string, edit: (json: Record<string, never>) => void): void {
  const json = JSON.parse(readFileSync(file, 'utf8')) as Record<string, never>;
  edit(json);
  writeFileSync(file, JSON.stringify(json));
}

test('a whole store is compared to its last byte, whatever the number of threads', async () => {
  const store = await openStore(original);
  const tensorBytes = store.tensors.reduce((sum, { bytes }) => sum + bytes, 0);
  for (const threads of [1, 3]) {
    let last = { bytes: 0, totalBytes: 0 };
    const report = await verifyStore(original, { threads, onProgress: (progress) => (last = progress) });
    expect(report).toMatchObject({ hasManifest: true, comparedTensors: store.tensors.length, unrecorded: [], problems: [] });
    expect(report.comparedBytes).toBeGreaterThan(tensorBytes); // configuration and index too
    expect(last).toEqual({ bytes: report.comparedBytes, totalBytes: report.comparedBytes });
  }
});

test('every tensor that changed is named, and no other', async () => {
  const dir = copy();
  const { tensors } = await openStore(dir);
  const [first, last] = [tensors[3]!, tensors.at(-1)!];
  flipByte(first.file, first.offset);
  flipByte(last.file, last.offset + last.bytes - 1);
  const { problems } = await verifyStore(dir);
  expect(problems.map(({ name }) => name).sort()).toEqual([first.name, last.name].sort());
  expect(problems.find(({ name }) => name === first.name)!.message).toMatch(
    new RegExp(`^tensor ${first.name} in ${first.file} has SHA-256 [0-9a-f]{64}, recorded is ${first.sha256}$`),
  );
});

test('other files than the tensors are compared too', async () => {
  const changed = copy();
  appendFileSync(join(changed, 'config.json'), ' ');
  const missing = copy();
  editJson(join(missing, manifestFileName), (json: Record<string, Record<string, unknown>>) => {
    json['files']!['tokenizer.model'] = { bytes: 3, sha256: 'a'.repeat(64) };
  });
  const flipped = copy();
  flipByte(join(flipped, indexFileName), 4);
  expect((await verifyStore(changed)).problems.map(({ message }) => message)).toEqual([
    expect.stringMatching(/^file .*config\.json has \d+ bytes, manifest\.json says \d+$/),
  ]);
  expect((await verifyStore(missing)).problems.map(({ message }) => message)).toEqual([
    `file ${join(missing, 'tokenizer.model')} is missing, manifest.json lists it`,
  ]);
  await expect(verifyStore(flipped)).rejects.toThrow(indexFileName); // it is no index any more
});

test('a manifest of other tensors is no manifest of this store', async () => {
  const dir = copy();
  const [first, second, third] = (await openStore(dir)).tensors.map(({ name }) => name) as [string, string, string];
  editJson(join(dir, manifestFileName), (json: Record<string, Record<string, { bytes: number }>>) => {
    const tensors = json['tensors']!;
    tensors['another'] = tensors[first]!;
    delete tensors[second];
    tensors[third]!.bytes++;
  });
  const { problems, unrecorded } = await verifyStore(dir);
  expect(problems.map(({ message }) => message)).toEqual([
    `tensor ${second} is not in manifest.json`,
    expect.stringMatching(new RegExp(`^tensor ${third} has \\d+ bytes in .*, manifest.json says \\d+ in `)),
    'tensor another is in manifest.json, but not in the store',
  ]);
  expect(unrecorded).toEqual([second]);
});

test('without a manifest there is nothing to compare with, but the structure is checked', async () => {
  const dir = copy();
  unlinkSync(join(dir, manifestFileName));
  const report = await verifyStore(dir);
  expect(report).toMatchObject({ hasManifest: false, comparedTensors: 0, comparedBytes: 0, problems: [] });
  expect(report.unrecorded.length).toBe(report.tensors);
  const { file } = (await openStore(dir)).tensors[0]!;
  truncateSync(file, 5000);
  await expect(verifyStore(dir)).rejects.toThrow('it is truncated or damaged');
});

test('aborting ends it', async () => {
  await expect(verifyStore(original, { signal: AbortSignal.abort(new Error('enough')) })).rejects.toThrow('enough');
});
