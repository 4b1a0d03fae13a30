import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { packageRoot } from '../../common/package-root.js';
import { goldenModel, sha256 } from '../import/fixtures/golden-checkpoints.js';
import { glmTensors } from './glm-tensors.js';
import { readManifest } from './manifest.js';
import { openStore } from './open-store.js';
import { verifyTensor } from './verify-tensor.js';
import { StoreWriter, type PlannedTensor } from './write-store.js';

let dir: string;
beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), 'write-store-'));
});
afterEach(() => rmSync(dir, { recursive: true }));

const { config } = goldenModel('E');
const plan = glmTensors(config).map(({ name, shape }): PlannedTensor => ({ name, dtype: 'F16', shape }));

/** Tensor i is full of the byte i; written in two pieces. */
async function writeAll(writer: StoreWriter): Promise<void> {
  for (const [i, { name, shape }] of plan.entries()) {
    const bytes = new Uint8Array(2 * shape.reduce((product, count) => product * count, 1)).fill(i);
    await writer.append(name, bytes.subarray(0, 100));
    await writer.append(name, bytes.subarray(100));
  }
}

test('what was written in pieces over several files is read back, and in each file tensors lie one after the other', async () => {
  const writer = await StoreWriter.create(join(dir, 'store'), plan, 40_000);
  await writeAll(writer);
  await writer.commit({ config, quantization: null, tokenizerPath: null });
  await writer.dispose();
  const store = await openStore(join(dir, 'store'));
  const files = readdirSync(store.dir).filter((name) => name.endsWith('.safetensors'));
  expect(files.length).toBeGreaterThan(3);
  expect(files[0]).toBe(`model-00001-of-0000${files.length}.safetensors`);
  for (const [i, tensor] of store.tensors.entries()) {
    await verifyTensor(tensor);
    expect(new Set(readFileSync(tensor.file).subarray(tensor.offset, tensor.offset + tensor.bytes))).toEqual(new Set([i]));
  }
  expect(readdirSync(dir)).toEqual(['store']);
});

test('the manifest has size and SHA-256 of every tensor and of every other file', async () => {
  const tokenizerPath = join(packageRoot, 'model/tiny/tokenizer.model');
  const tokenizer = { file: 'tokenizer.model', imageTokenOffset: 0, numTextPieces: 244 };
  const writer = await StoreWriter.create(join(dir, 'store'), plan, 40_000);
  await writeAll(writer);
  await writer.commit({ config: { ...config, tokenizer }, quantization: null, tokenizerPath });
  await writer.dispose();
  const store = await openStore(join(dir, 'store'));
  const manifest = (await readManifest(store.dir))!;
  expect(manifest.tensors).toEqual(
    Object.fromEntries(
      store.tensors.map(({ name, file, offset, bytes }) => [
        name,
        { file: basename(file), bytes, sha256: sha256(readFileSync(file).subarray(offset, offset + bytes)) },
      ]),
    ),
  );
  const others = readdirSync(store.dir).filter((name) => name !== 'manifest.json' && !name.endsWith('.safetensors'));
  expect(others.sort()).toEqual(['config.json', 'model.safetensors.index.json', 'tokenizer.model']);
  expect(manifest.files).toEqual(
    Object.fromEntries(
      others.map((name) => {
        const content = readFileSync(join(store.dir, name));
        return [name, { bytes: content.length, sha256: sha256(content) }];
      }),
    ),
  );
});

test('a store without a manifest opens, a damaged manifest is refused by name', async () => {
  const writer = await StoreWriter.create(join(dir, 'store'), plan);
  await writeAll(writer);
  await writer.commit({ config, quantization: null, tokenizerPath: null });
  await writer.dispose();
  const path = join(dir, 'store/manifest.json');
  writeFileSync(path, readFileSync(path, 'utf8').replace(/"sha256": "../, '"sha256": "'));
  await expect(openStore(join(dir, 'store'))).rejects.toThrow(`${path} is damaged: tensors.transformer.word_embeddings.weight.sha256: `);
  rmSync(path);
  const { tensors } = await openStore(join(dir, 'store'));
  expect(tensors.map(({ sha256 }) => sha256)).toEqual(plan.map(() => null));
});

describe('until it is committed there is nothing at the target', () => {
  test('and after dispose nothing beside it', async () => {
    const writer = await StoreWriter.create(join(dir, 'store'), plan);
    await writeAll(writer);
    expect(readdirSync(dir).length).toBe(1);
    expect(readdirSync(dir)[0]).toMatch(/^\.store\.partial-/);
    await writer.dispose();
    expect(readdirSync(dir)).toEqual([]);
  });

  test('a target that appeared meanwhile stays as it is', async () => {
    const writer = await StoreWriter.create(join(dir, 'store'), plan);
    await writeAll(writer);
    mkdirSync(join(dir, 'store/mine'), { recursive: true });
    await expect(writer.commit({ config, quantization: null, tokenizerPath: null })).rejects.toThrow(
      'exists and is not empty; remove it or choose another target',
    );
    await writer.dispose();
    expect(readdirSync(dir)).toEqual(['store']);
    expect(readdirSync(join(dir, 'store'))).toEqual(['mine']);
  });
});

test('tensors out of order, too long or missing are defects', async () => {
  const writer = await StoreWriter.create(join(dir, 'store'), plan);
  await expect(writer.append(plan[1]!.name, new Uint8Array(1))).rejects.toThrow(
    'is written where transformer.word_embeddings.weight is due',
  );
  await expect(writer.append(plan[0]!.name, new Uint8Array(32769))).rejects.toThrow('gets more bytes than its shape has');
  await expect(writer.commit({ config, quantization: null, tokenizerPath: null })).rejects.toThrow('was never written');
  await writer.dispose();
});
