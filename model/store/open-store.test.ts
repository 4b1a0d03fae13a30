import { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync, truncateSync, writeFileSync, appendFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { CheckpointError, ConfigError } from '../../common/errors.js';
import { importCheckpoint } from '../import/import-checkpoint.js';
import { goldenModel } from '../import/fixtures/golden-checkpoints.js';
import { openStore } from './open-store.js';
import { verifyTensor } from './verify-tensor.js';

const scratch = mkdtempSync(join(tmpdir(), 'open-store-'));
afterAll(() => rmSync(scratch, { recursive: true }));

const E = goldenModel('E');
const plain = join(scratch, 'plain');
const int4 = join(scratch, 'int4');
const shardName = 'model-00001-of-00001.safetensors';

beforeAll(async () => {
  await importCheckpoint({ from: E.layout('tp1').dir!, to: plain, configPath: E.configPath });
  await importCheckpoint({ from: E.layout('tp1').dir!, to: int4, configPath: E.configPath, quantize: 4, ranks: 2 });
});

test('a store is the files that store/README.md names', () => {
  expect(readdirSync(plain).sort()).toEqual(['config.json', 'manifest.json', shardName, 'model.safetensors.index.json']);
});

test('the data part of a file starts at a multiple of 64 bytes', async () => {
  const { tensors } = await openStore(plain);
  expect(tensors[0]).toMatchObject({
    name: 'transformer.word_embeddings.weight',
    dtype: 'F16',
    shape: [256, 64],
    bytes: 32768,
    file: join(plain, shardName),
  });
  expect(tensors[0]!.offset % 64).toBe(0);
});

test('a quantised weight is its qweight, then its scales', async () => {
  const { tensors, quantization } = await openStore(int4);
  expect(quantization).toEqual({ bits: 4, group: 'vector', ranks: 2 });
  const dense = tensors
    .filter(({ name }) => name.startsWith('transformer.layers.1.mlp.dense_4h_to_h'))
    .map(({ name, dtype, shape }) => ({ name, dtype, shape }));
  expect(dense).toEqual([
    { name: 'transformer.layers.1.mlp.dense_4h_to_h.qweight', dtype: 'U8', shape: [64, 80] },
    { name: 'transformer.layers.1.mlp.dense_4h_to_h.scales', dtype: 'F16', shape: [64, 2] },
    { name: 'transformer.layers.1.mlp.dense_4h_to_h.bias', dtype: 'F16', shape: [64] },
  ]);
});

/** What the edits below touch of config.json and of the index. */
interface StoreJson {
  weight_map: Record<string, string>;
  metadata?: unknown;
  quantization?: unknown;
  tokenizer?: unknown;
  num_layers?: number;
  inner_hidden_size?: number;
}

/** Edits that keep the header's length: the new JSON is padded with spaces. */
function editHeader(
  dir: string,
  edit: (header: Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }>) => void,
): void {
  const path = join(dir, shardName);
  const bytes = readFileSync(path);
  const length = Number(bytes.readBigUInt64LE());
  const header = JSON.parse(bytes.subarray(8, 8 + length).toString()) as never;
  edit(header);
  const json = Buffer.from(JSON.stringify(header));
  const padded = Buffer.alloc(Math.max(length, json.length), ' ');
  json.copy(padded);
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(BigInt(padded.length));
  writeFileSync(path, Buffer.concat([size, padded, bytes.subarray(8 + length)]));
}

function editJson(path: string, edit: (json: StoreJson) => void): void {
  const json = JSON.parse(readFileSync(path, 'utf8')) as StoreJson;
  edit(json);
  writeFileSync(path, JSON.stringify(json));
}

const embeddings = 'transformer.word_embeddings.weight';
const finalBias = 'transformer.final_layernorm.bias';
const qkv = 'transformer.layers.0.attention.query_key_value';
const index = 'model.safetensors.index.json';

describe('a store that is not what it says is refused', () => {
  test.each<{ name: string; from?: string; damage: (dir: string) => void; message: string }>([
    { name: 'no folder', damage: (dir) => rmSync(dir, { recursive: true }), message: 'does not exist; make one with `tandem import`' },
    { name: 'no config.json', damage: (dir) => rmSync(join(dir, 'config.json')), message: 'it is not a folder with config.json' },
    {
      name: 'a config.json of something else',
      damage: (dir) => cpSync(E.configPath, join(dir, 'config.json')),
      message: 'is no model store: config.json does not say "format": "tandem-store"',
    },
    {
      name: 'a config.json that is no JSON',
      damage: (dir) => writeFileSync(join(dir, 'config.json'), '{"a":\n\n'),
      message: 'config.json is not JSON',
    },
    {
      name: 'a config.json of a gigabyte',
      damage: (dir) => truncateSync(join(dir, 'config.json'), 2 ** 30),
      message: 'has 1073741824 bytes, at most 1048576 are read',
    },
    {
      name: 'a config.json that is a device',
      damage: (dir) => (rmSync(join(dir, 'config.json')), symlinkSync('/dev/zero', join(dir, 'config.json'))),
      message: 'config.json is not a regular file',
    },
    {
      name: 'odd quantisation',
      damage: (dir) => editJson(join(dir, 'config.json'), (json) => (json.quantization = { bits: 3 })),
      message: 'config.json: quantization: ',
    },
    {
      name: 'a tokenizer that is not there',
      damage: (dir) =>
        editJson(
          join(dir, 'config.json'),
          (json) => (json.tokenizer = { file: 'tokenizer.model', image_token_offset: 0, num_text_pieces: 244 }),
        ),
      message: 'tokenizer.model does not exist, config.json names it as the tokenizer',
    },
    { name: 'no index', damage: (dir) => rmSync(join(dir, index)), message: 'model.safetensors.index.json does not exist' },
    {
      name: 'an index without a map',
      damage: (dir) => writeFileSync(join(dir, index), '{}'),
      message: 'model.safetensors.index.json: weight_map: ',
    },
    {
      name: 'an index that leaves the folder',
      damage: (dir) => editJson(join(dir, index), (json) => (json.weight_map[embeddings] = '../other.safetensors')),
      message: 'weight_map maps tensor names to files of the same folder',
    },
    {
      name: 'an absolute path in the index',
      damage: (dir) => editJson(join(dir, index), (json) => (json.weight_map[embeddings] = '/etc/x.safetensors')),
      message: 'weight_map maps tensor names to files of the same folder',
    },
    {
      name: 'an index that names a file that is not there',
      damage: (dir) => editJson(join(dir, index), (json) => (json.weight_map[embeddings] = 'model-2.safetensors')),
      message: 'model-2.safetensors does not exist',
    },
    {
      name: 'an index with a tensor too many',
      damage: (dir) => editJson(join(dir, index), (json) => (json.weight_map['x'] = shardName)),
      message: 'says that tensor x is in model-00001-of-00001.safetensors, which does not have it',
    },
    {
      name: 'an index with a tensor too few',
      damage: (dir) => editJson(join(dir, index), (json) => delete json.weight_map[finalBias]),
      message: 'has tensor transformer.final_layernorm.bias, which model.safetensors.index.json does not list there',
    },
    {
      name: 'a file cut off',
      damage: (dir) => truncateSync(join(dir, shardName), 100_000),
      message: 'the file has 100000: it is truncated or damaged',
    },
    {
      name: 'a file with more at its end',
      damage: (dir) => appendFileSync(join(dir, shardName), 'x'),
      message: 'it is truncated or damaged',
    },
    {
      name: 'an empty file',
      damage: (dir) => truncateSync(join(dir, shardName), 0),
      message: 'is no safetensors file: it says its header has 0 bytes, the file has 0',
    },
    {
      name: 'a header of 2^63 bytes',
      damage: (dir) => patch(dir, (bytes) => bytes.writeBigUInt64LE(2n ** 63n)),
      message: 'is no safetensors file: it says its header has 9223372036854775808 bytes',
    },
    {
      name: 'a header longer than the file',
      damage: (dir) => patch(dir, (bytes) => bytes.writeBigUInt64LE(BigInt(bytes.length))),
      message: 'is no safetensors file: it says its header has',
    },
    {
      name: 'a header that is no JSON',
      damage: (dir) => patch(dir, (bytes) => bytes.write('x', 8)),
      message: 'is no safetensors file: its header is not JSON',
    },
    {
      name: 'a shape that does not fit its bytes',
      damage: (dir) => editHeader(dir, (header) => (header[embeddings]!.shape = [256, 65])),
      message: 'tensor transformer.word_embeddings.weight is F16 [256, 65], 33280 bytes, but its offsets 0 to 32768 hold 32768',
    },
    {
      name: 'a shape whose product overflows',
      damage: (dir) => editHeader(dir, (header) => (header[embeddings]!.shape = [2 ** 40, 2 ** 40])),
      message: 'tensor transformer.word_embeddings.weight is F16 [1099511627776, 1099511627776]',
    },
    {
      name: 'a negative dimension',
      damage: (dir) => editHeader(dir, (header) => (header[embeddings]!.shape = [-256, -64])),
      message: 'tensor transformer.word_embeddings.weight: shape.0: ',
    },
    {
      name: 'a type that a store does not have',
      damage: (dir) => editHeader(dir, (header) => (header[embeddings]!.dtype = 'BF16')),
      message: 'tensor transformer.word_embeddings.weight: dtype: ',
    },
    {
      name: 'overlapping tensors',
      damage: (dir) => editHeader(dir, (header) => (header[finalBias]!.data_offsets = [0, 128])),
      message: 'begins at byte 0 of the data, ',
    },
    {
      name: 'tensors past the end',
      damage: (dir) =>
        editHeader(dir, (header) => {
          const at = header[finalBias]!.data_offsets;
          header['x'] = { dtype: 'U8', shape: [2 ** 30], data_offsets: [at[1], at[1] + 2 ** 30] };
        }),
      message: 'it is truncated or damaged',
    },
    {
      name: 'a missing tensor',
      damage: (dir) => {
        rename(dir, finalBias, 'transformer.final_layernorm.b');
      },
      message: 'tensor transformer.final_layernorm.bias is missing, expected F16 or F32 [64]',
    },
    {
      name: 'a tensor of another shape',
      damage: (dir) => editHeader(dir, (header) => (header[embeddings]!.shape = [64, 256])),
      message: 'tensor transformer.word_embeddings.weight is F16 [64, 256], expected F16 or F32 [256, 64]',
    },
    {
      name: 'another model’s configuration',
      damage: (dir) => editJson(join(dir, 'config.json'), (json) => (json.inner_hidden_size = 192)),
      message: 'mlp.dense_h_to_4h.weight is F16 [320, 64], expected F16 or F32 [384, 64]',
    },
    {
      name: 'a layer too many',
      damage: (dir) => editJson(join(dir, 'config.json'), (json) => (json.num_layers = 1)),
      message: 'tensor transformer.layers.1.input_layernorm.weight belongs to no model of this configuration',
    },
    {
      name: 'scales missing',
      from: int4,
      damage: (dir) => rename(dir, `${qkv}.scales`, 'x'),
      message: 'query_key_value.scales is missing, expected F16 [192, groups]',
    },
    {
      name: 'a qweight of another width',
      from: int4,
      damage: (dir) => editHeader(dir, (header) => (header[`${qkv}.qweight`]!.shape = [96, 64])),
      message: 'query_key_value.qweight is U8 [96, 64], expected I8 [192, 64] or U8 [192, 32]',
    },
    {
      name: 'scales whose groups do not divide',
      from: int4,
      damage: (dir) => editHeader(dir, (header) => (header[`${qkv}.scales`]!.shape = [64, 3])),
      message: 'query_key_value.scales is F16 [64, 3], expected F16 [192, groups] with groups dividing 64 into even parts',
    },
  ])('$name', async ({ from, damage, message }) => {
    const dir = mkdtempSync(join(scratch, 'damaged-'));
    cpSync(from ?? plain, dir, { recursive: true });
    damage(dir);
    const error: unknown = await openStore(dir).then(
      () => null,
      (reason: unknown) => reason,
    );
    expect(error instanceof CheckpointError || error instanceof ConfigError, String(error)).toBe(true);
    expect((error as Error).message).toContain(message);
    expect((error as Error).message).not.toContain('\n');
  });
});

test('a changed byte of a tensor is found by its SHA-256', async () => {
  const dir = join(scratch, 'changed');
  cpSync(plain, dir, { recursive: true });
  const changed = (await openStore(dir)).tensors.find(({ name }) => name === `${qkv}.weight`)!;
  patch(dir, (bytes) => bytes.writeUInt8(bytes.readUInt8(changed.offset) ^ 1, changed.offset));
  for (const tensor of (await openStore(dir)).tensors) {
    if (tensor.name === changed.name) {
      await expect(verifyTensor(tensor)).rejects.toThrow(`tensor ${changed.name} in ${changed.file} has SHA-256`);
    } else await verifyTensor(tensor);
  }
});

test('a store without recorded checksums opens, and says that it cannot be verified', async () => {
  const dir = join(scratch, 'unrecorded');
  cpSync(plain, dir, { recursive: true });
  editJson(join(dir, index), (json) => delete json.metadata);
  rmSync(join(dir, 'manifest.json'));
  const { tensors } = await openStore(dir);
  await expect(verifyTensor(tensors[0]!)).rejects.toThrow(`tensor ${embeddings} has no recorded SHA-256`);
});

test('the checksums that earlier versions kept in the index are read from there', async () => {
  const dir = join(scratch, 'earlier');
  cpSync(plain, dir, { recursive: true });
  const [first] = (await openStore(plain)).tensors;
  editJson(join(dir, index), (json) => (json.metadata = { sha256: { [embeddings]: first!.sha256! } }));
  rmSync(join(dir, 'manifest.json'));
  const { tensors } = await openStore(dir);
  expect(tensors[0]!.sha256).toBe(first!.sha256);
  await verifyTensor(tensors[0]!);
});

function patch(dir: string, change: (bytes: Buffer) => void): void {
  const path = join(dir, shardName);
  const bytes = readFileSync(path);
  change(bytes);
  writeFileSync(path, bytes);
}

function rename(dir: string, from: string, to: string): void {
  editHeader(dir, (header) => {
    header[to] = header[from]!;
    delete header[from];
  });
  editJson(join(dir, index), (json) => {
    json.weight_map[to] = json.weight_map[from]!;
    delete json.weight_map[from];
  });
}
