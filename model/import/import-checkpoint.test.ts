import { cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeEach, describe, expect, test } from 'vitest';
import { CheckpointError, ConfigError } from '../../common/errors.js';
import { packageRoot } from '../../common/package-root.js';
import { glmTensors, quantizedNames } from '../store/glm-tensors.js';
import { openStore, type Store } from '../store/open-store.js';
import { verifyTensor } from '../store/verify-tensor.js';
import { goldenModel, goldenModels, sha256, type GoldenLayout, type GoldenModel } from './fixtures/golden-checkpoints.js';
import { modulePickle, tensor, writeTorchFile } from './fixtures/torch-archive.js';
import { importCheckpoint, type ImportOptions, type ImportProgress } from './import-checkpoint.js';
import { TorchFile } from './read-torch.js';
import { shardShape, splitTensor } from './split.js';

const scratch = mkdtempSync(join(tmpdir(), 'import-'));
afterAll(() => rmSync(scratch, { recursive: true }));

let to: string;
let count = 0;
beforeEach(() => {
  to = join(scratch, `store-${count++}`);
});

const E = goldenModel('E');

describe('against the original', () => {
  const fp16 = goldenModels.flatMap((model) =>
    model.layouts
      .filter(({ bits, dir }) => bits === null && dir !== null)
      .map((layout) => ({ name: `${model.name} ${layout.name}`, model, layout })),
  );

  test.each(fp16)('$name becomes the tensors of tp1', async ({ model, layout }) => {
    const result = await importCheckpoint({ from: layout.dir!, to, configPath: model.configPath });
    const store = await openStore(to);
    expect(store.config).toEqual(model.config);
    expect(store.quantization).toBeNull();
    expect(store.tensors.map(({ name }) => name)).toEqual(glmTensors(model.config).map(({ name }) => name));
    expect(result).toMatchObject({ tensors: store.tensors.length, bytes: store.tensors.reduce((sum, { bytes }) => sum + bytes, 0) });
    for (const { name, shape, dtype, ...rest } of store.tensors) {
      const golden = model.layout('tp1').ranks[0]!.get(name)!;
      expect({ shape, dtype, sha256: rest.sha256 }).toEqual({ shape: golden.shape, dtype: 'F16', sha256: golden.sha256 });
      await verifyTensor({ name, shape, dtype, ...rest });
    }
  });

  // From tp1 and from other degrees, to the hashes of layouts that are stored and that are not.
  const quantised = goldenModels.flatMap((model) =>
    model.layouts
      .filter(({ bits }) => bits !== null)
      .flatMap((layout) =>
        model.layouts
          .filter(({ bits, dir }) => bits === null && dir !== null)
          .map((from) => ({ name: `${model.name} ${from.name}`, model, from, layout })),
      ),
  );

  test.each(quantised)('$name quantised becomes $layout.name', async ({ model, from, layout }) => {
    await importCheckpoint({ from: from.dir!, to, configPath: model.configPath, quantize: layout.bits, ranks: layout.numRanks });
    const store = await openStore(to);
    expect(store.quantization).toEqual({ bits: layout.bits, group: 'vector', ranks: layout.numRanks });
    await expectShardsOf(store, model, layout);
  });

  const alreadyQuantised = goldenModels.flatMap((model) =>
    model.layouts
      .filter(({ bits, dir }) => bits !== null && dir !== null)
      .map((layout) => ({ name: `${model.name} ${layout.name}`, model, layout })),
  );

  test.each(alreadyQuantised)('$name keeps its bits', async ({ model, layout }) => {
    await importCheckpoint({ from: layout.dir!, to, configPath: model.configPath, quantize: layout.numRanks === 2 ? layout.bits : null });
    const store = await openStore(to);
    expect(store.quantization).toEqual({ bits: layout.bits, group: 'vector', ranks: layout.numRanks });
    await expectShardsOf(store, model, layout);
  });

  test('the default groups are those of the checkpoint’s own ranks', async () => {
    await importCheckpoint({ from: E.layout('tp4').dir!, to, configPath: E.configPath, quantize: 8 });
    await expectShardsOf(await openStore(to), E, E.layout('tp4-int8'));
  });
});

test('groups of 128 columns have a scale each', async () => {
  const A = goldenModel('A');
  await importCheckpoint({ from: A.layout('tp1').dir!, to, configPath: A.configPath, quantize: 4, group: 128 });
  const store = await openStore(to);
  expect(store.quantization).toEqual({ bits: 4, group: 128, ranks: null });
  const shapes = Object.fromEntries(store.tensors.map(({ name, shape }) => [name, shape]));
  expect(shapes['transformer.layers.0.mlp.dense_4h_to_h.scales']).toEqual([256, 6]);
  expect(shapes['transformer.layers.0.attention.query_key_value.scales']).toEqual([768, 2]);
  expect(shapes['transformer.layers.0.attention.query_key_value.qweight']).toEqual([768, 128]);
});

test('progress counts up to the totals of the result', async () => {
  const seen: ImportProgress[] = [];
  const result = await importCheckpoint({
    from: E.layout('tp2').dir!,
    to,
    configPath: E.configPath,
    quantize: 8,
    onProgress: (progress) => seen.push(progress),
  });
  expect(seen.map(({ name }) => name)).toEqual(glmTensors(E.config).map(({ name }) => name));
  const read = E.layout('tp2').ranks.flatMap((tensors) =>
    [...tensors].filter(([name]) => !name.endsWith('inv_freq')).map(([, each]) => each),
  );
  const totalBytes = read.reduce((sum, { shape }) => sum + shape.reduce((product, count) => product * count, 2), 0);
  const totals = { totalTensors: result.tensors, totalBytes };
  expect(seen[0]).toMatchObject({ phase: 'import', tensors: 1, ...totals });
  expect(seen.at(-1)).toMatchObject({ tensors: result.tensors, bytes: totalBytes, ...totals });
});

describe('configuration and tokenizer', () => {
  const tiny = join(packageRoot, 'model/tiny');

  test('the tokenizer beside the configuration is copied in', async () => {
    const result = await importCheckpoint({ from: join(tiny, 'sat'), to, configPath: join(tiny, 'config.json') });
    expect(result.warnings).toEqual([]);
    const store = await openStore(to);
    expect(store.config.tokenizer).toEqual({ file: 'tokenizer.model', imageTokenOffset: 0, numTextPieces: 3740 });
    expect(sha256(readFileSync(store.tokenizerPath!))).toBe(sha256(readFileSync(join(tiny, 'tokenizer.model'))));
  });

  test('a tokenizer that is given to a configuration that names none has the layout of the special tokens', async () => {
    await importCheckpoint({ from: E.layout('tp1').dir!, to, configPath: E.configPath, tokenizerPath: join(tiny, 'tokenizer.model') });
    expect((await openStore(to)).config.tokenizer).toEqual({ file: 'tokenizer.model', imageTokenOffset: 0, numTextPieces: 244 });
  });

  test('without a tokenizer the store has none, and the import says so', async () => {
    const result = await importCheckpoint({ from: E.layout('tp1').dir!, to, configPath: E.configPath });
    expect(result.warnings).toEqual(['no tokenizer was given: the store will take token ids but no text; give --tokenizer FILE for text']);
    expect(await openStore(to)).toMatchObject({ tokenizerPath: null, config: { tokenizer: null } });
  });

  test('config.json in the SAT folder is used where none is given', async () => {
    const from = copyOf(E.layout('tp1'));
    cpSync(E.configPath, join(from, 'config.json'));
    await importCheckpoint({ from, to });
    expect((await openStore(to)).config).toEqual(E.config);
  });

  test('without a configuration only GLM-130B is known', async () => {
    await expectError(
      { from: E.layout('tp2').dir!, to },
      ConfigError,
      "has no config.json, and 2 layers, vocabulary 256, hidden size 64 are not GLM-130B's 70, 150528, 12288; give --config FILE",
    );
  });

  test.each([
    {
      name: 'a tokenizer that is not there',
      options: { tokenizerPath: '/nonexistent/t.model' },
      error: CheckpointError,
      message: '/nonexistent/t.model does not exist',
    },
    {
      name: 'a configuration that is not there',
      options: { configPath: '/nonexistent/c.json' },
      error: CheckpointError,
      message: '/nonexistent/c.json does not exist',
    },
    {
      name: 'another model’s configuration',
      options: { configPath: goldenModel('B').configPath },
      error: CheckpointError,
      message:
        'tensor transformer.word_embeddings.weight is float16 [256, 64] in each of 1 rank files, expected float16 or float32 [320, 128]',
    },
  ])('$name', async ({ options, error, message }) => {
    await expectError({ from: E.layout('tp1').dir!, to, configPath: E.configPath, ...options }, error, message);
  });
});

describe('how to quantise', () => {
  test.each([
    {
      name: 'other bits than it has',
      from: 'tp4-int8',
      options: { quantize: 4 },
      message: 'is quantised to INT8 already, --quantize int4 needs the fp16 checkpoint',
    },
    {
      name: 'other groups than it has',
      from: 'tp4-int4',
      options: { quantize: 4, group: 128 },
      message: 'is quantised already, vector-wise for 4 ranks; --group 128 and --ranks 4 need the fp16 checkpoint',
    },
    {
      name: 'other ranks than it has',
      from: 'tp4-int4',
      options: { ranks: 2 },
      message: 'vector-wise for 4 ranks; --group vector and --ranks 2 need the fp16 checkpoint',
    },
    {
      name: 'groups without bits',
      from: 'tp1',
      options: { group: 128 },
      message: '--group and --ranks say how to quantise; give --quantize int8 or int4 with them',
    },
    { name: 'ranks without bits', from: 'tp1', options: { ranks: 2 }, message: '--group and --ranks say how to quantise' },
    {
      name: 'ranks for groups of 128',
      from: 'tp1',
      options: { quantize: 8, group: 128, ranks: 2 },
      message: '--ranks belongs to --group vector',
    },
    {
      name: 'ranks that do not divide',
      from: 'tp1',
      options: { quantize: 8, ranks: 3 },
      message:
        'world size 3 does not divide the model: 4 heads, inner size 160, vocabulary 256, hidden size 64; possible world sizes are 1, 2, 4',
    },
    {
      name: 'columns that are no multiple of 128',
      from: 'tp1',
      options: { quantize: 8, group: 128 },
      message: 'query_key_value.weight has 64 columns, which groups of 128 do not divide',
    },
  ] as const)('$name', async ({ from, options, message }) => {
    await expectError({ from: E.layout(from).dir!, to, configPath: E.configPath, ...options }, ConfigError, message);
  });
});

describe('a checkpoint that is not whole', () => {
  test.each([
    {
      name: 'a rank in the middle',
      damage: (dir: string) => rmSync(join(dir, 'release/mp_rank_02_model_states.pt')),
      message: 'mp_rank_02_model_states.pt is missing: 3 rank files were found, so ranks 0 to 2 are needed',
    },
    {
      name: 'the first rank',
      damage: (dir: string) => rmSync(join(dir, 'release/mp_rank_00_model_states.pt')),
      message: 'mp_rank_00_model_states.pt is missing: 3 rank files were found',
    },
    {
      name: 'the last ranks',
      damage: (dir: string) => ['02', '03'].forEach((rank) => rmSync(join(dir, `release/mp_rank_${rank}_model_states.pt`))),
      message:
        'transformer.word_embeddings.weight is float16 [64, 64] in each of 2 rank files, expected float16 or float32 [128, 64]; a rank file is missing',
    },
    {
      name: 'the last rank of four',
      damage: (dir: string) => rmSync(join(dir, 'release/mp_rank_03_model_states.pt')),
      message: '3 ranks do not divide transformer.word_embeddings.weight [256, 64]; a rank file is missing',
    },
    {
      name: 'no rank at all',
      damage: (dir: string) => ['00', '01', '02', '03'].forEach((rank) => rmSync(join(dir, `release/mp_rank_${rank}_model_states.pt`))),
      message: 'release has no file mp_rank_00_model_states.pt',
    },
    { name: 'latest', damage: (dir: string) => rmSync(join(dir, 'latest')), message: 'latest does not exist' },
    {
      name: 'the iteration in latest',
      damage: (dir: string) => writeFileSync(join(dir, 'latest'), '../x'),
      message: 'latest says "../x", it should hold an iteration above 0 or the word release',
    },
    {
      name: 'the folder that latest names',
      damage: (dir: string) => writeFileSync(join(dir, 'latest'), ' 0012\n'),
      message: '/12, which `latest` names, cannot be read (ENOENT)',
    },
    {
      name: 'a part of a file',
      damage: (dir: string) => truncate(join(dir, 'release/mp_rank_01_model_states.pt')),
      message: 'mp_rank_01_model_states.pt is no intact torch.save archive',
    },
    {
      name: 'a rank of another layout',
      damage: (dir: string) =>
        cpSync(join(E.layout('tp2').dir!, 'release/mp_rank_01_model_states.pt'), join(dir, 'release/mp_rank_01_model_states.pt')),
      message:
        'tensor transformer.word_embeddings.weight is float16 [64, 64] in mp_rank_00_model_states.pt but float16 [128, 64] in mp_rank_01_model_states.pt',
    },
  ])('$name', async ({ damage, message }) => {
    const from = copyOf(E.layout('tp4'));
    damage(from);
    await expectError({ from, to, configPath: E.configPath }, CheckpointError, message);
  });

  test('a missing tensor is named', async () => {
    const tensors = smallTensors(1).filter(({ name }) => name !== 'transformer.layers.0.mlp.dense_4h_to_h.bias');
    const options = writeSmallCheckpoint([tensors]);
    await expectError(
      { ...options, to },
      CheckpointError,
      'mp_rank_00_model_states.pt: tensor transformer.layers.0.mlp.dense_4h_to_h.bias is missing',
    );
  });

  test('an unknown tensor is warned about and ignored, inv_freq is dropped', async () => {
    const tensors = smallTensors(1);
    const extra = [
      { name: 'transformer.layers.0.attention.rotary_emb.inv_freq', shape: [1] },
      { name: 'mixins.rotary-embedding.rotary_emb.inv_freq', shape: [1] },
      { name: 'transformer.position_embeddings.weight', shape: [4, 8] },
    ];
    const result = await importCheckpoint({ ...writeSmallCheckpoint([[...tensors, ...extra]]), to });
    expect(result.warnings).toContain('tensor transformer.position_embeddings.weight belongs to no GLM model and is ignored');
    expect(result.warnings.join()).not.toContain('inv_freq');
    expect((await openStore(to)).tensors.map(({ name }) => name)).toEqual(tensors.map(({ name }) => name));
  });

  test.each([
    { name: 'the same', fill: [1, 1], differs: 0 },
    { name: 'other', fill: [1, 2], differs: 8 }, // weight and bias of three norms, and the biases after the two column-split matrices
  ])('$name copies in another rank give $differs warnings', async ({ fill, differs }) => {
    const result = await importCheckpoint({ ...writeSmallCheckpoint([smallTensors(2), smallTensors(2)], fill), to });
    const warnings = result.warnings.filter((line) => line.includes('differs between rank 0 and rank 1'));
    expect(warnings.length).toBe(differs);
  });

  test.each([
    {
      name: 'quantised in one layer only',
      change: 'transformer.layers.0.attention.dense.weight',
      message:
        'is not quantised but transformer.layers.0.attention.dense.weight is INT8; a checkpoint is quantised as a whole or not at all',
    },
  ])('$name', async ({ change, message }) => {
    const tensors = smallTensors(1).map((each) => (each.name === change ? { ...each, storageType: 'CharStorage' } : each));
    await expectError({ ...writeSmallCheckpoint([[...tensors, { name: `${change}_scale`, shape: [8] }]]), to }, CheckpointError, message);
  });

  test('a type that GLM checkpoints do not have', async () => {
    const tensors = smallTensors(1).map((each) => ({ ...each, storageType: 'BFloat16Storage' }));
    await expectError(
      { ...writeSmallCheckpoint([tensors]), to },
      CheckpointError,
      'transformer.word_embeddings.weight is bfloat16 [256, 8] in each of 1 rank files, expected float16 or float32 [256, 8]',
    );
  });

  test('fp32 weights stay fp32 and are not quantised', async () => {
    const options = writeSmallCheckpoint([smallTensors(1).map((each) => ({ ...each, storageType: 'FloatStorage' }))]);
    await expectError({ ...options, to, quantize: 8 }, ConfigError, 'query_key_value.weight is float32; only fp16 weights are quantised');
    await importCheckpoint({ ...options, to });
    expect(new Set((await openStore(to)).tensors.map(({ dtype }) => dtype))).toEqual(new Set(['F32']));
  });
});

describe('the target', () => {
  test('a folder with something in it is left alone', async () => {
    mkdirSync(to);
    writeFileSync(join(to, 'mine.txt'), 'mine');
    await expectError(
      { from: E.layout('tp1').dir!, to, configPath: E.configPath },
      ConfigError,
      `target ${to} exists and is not empty; remove it or choose another target`,
    );
    expect(readdirSync(to)).toEqual(['mine.txt']);
  });

  test('a file is left alone', async () => {
    writeFileSync(to, 'mine');
    await expectError(
      { from: E.layout('tp1').dir!, to, configPath: E.configPath },
      ConfigError,
      `target ${to} is no folder or cannot be read (ENOTDIR)`,
    );
  });

  test('an empty folder is filled', async () => {
    mkdirSync(to);
    await importCheckpoint({ from: E.layout('tp1').dir!, to, configPath: E.configPath });
    expect((await openStore(to)).tensors.length).toBe(27);
  });

  test('an import that fails before a tensor is finished leaves nothing', async () => {
    const from = copyOf(E.layout('tp1'));
    const path = join(from, 'release/mp_rank_00_model_states.pt');
    const bytes = readFileSync(path);
    const file = await TorchFile.open(path);
    const { offset } = file.tensors.get('transformer.word_embeddings.weight')!.storage.extents[0]!;
    await file.close();
    bytes.writeUInt8(bytes.readUInt8(offset) ^ 1, offset);
    writeFileSync(path, bytes);
    await expectError({ from, to, configPath: E.configPath }, CheckpointError, 'does not match its CRC-32');
    expect(leftovers()).toEqual([]);
  });

  test('of two imports at once into one place one wins and the other says so', async () => {
    const options = { from: E.layout('tp1').dir!, to, configPath: E.configPath };
    const outcomes = await Promise.allSettled([importCheckpoint(options), importCheckpoint(options)]);
    expect(outcomes.map(({ status }) => status).sort()).toEqual(['fulfilled', 'rejected']);
    expect((outcomes.find(({ status }) => status === 'rejected') as PromiseRejectedResult).reason).toBeInstanceOf(ConfigError);
    expect((await openStore(to)).tensors.length).toBe(27);
    expect(leftovers()).toEqual([]);
  });
});

interface SmallTensor {
  readonly name: string;
  readonly shape: readonly number[];
  readonly storageType?: string;
}

const smallConfig = { ...E.config, numLayers: 1, hiddenSize: 8, innerHiddenSize: 8 };

/** What one of `numRanks` ranks holds of a model of one layer and hidden size 8. */
function smallTensors(numRanks: number): SmallTensor[] {
  return glmTensors(smallConfig).map(({ name, shape, split }) => ({ name, shape: shardShape(split, shape, numRanks)! }));
}

/** A checkpoint whose rank r has the given tensors, every byte of them fill[r]. */
function writeSmallCheckpoint(
  ranks: readonly (readonly SmallTensor[])[],
  fill: readonly number[] = [],
): { from: string; configPath: string } {
  const from = join(scratch, `small-${count++}`);
  mkdirSync(join(from, '7'), { recursive: true });
  writeFileSync(join(from, 'latest'), '7');
  const configPath = join(from, 'small.json');
  const config = JSON.parse(readFileSync(E.configPath, 'utf8')) as object;
  writeFileSync(configPath, JSON.stringify({ ...config, num_layers: 1, hidden_size: 8, inner_hidden_size: 8 }));
  for (const [rank, tensors] of ranks.entries()) {
    const storages: Record<string, Uint8Array> = {};
    const entries = tensors.map(({ name, shape, storageType = 'HalfStorage' }, key) => {
      const storageElements = shape.reduce((product, size) => product * size, 1);
      const itemBytes = { CharStorage: 1, FloatStorage: 4 }[storageType] ?? 2;
      storages[key] = new Uint8Array(itemBytes * storageElements).fill(fill[rank] ?? 0);
      const strides = shape.map((_, axis) => shape.slice(axis + 1).reduce((product, size) => product * size, 1));
      return [name, tensor({ storageType, key: String(key), storageElements, offset: 0, shape, strides })] as const;
    });
    writeTorchFile(join(from, `7/mp_rank_0${rank}_model_states.pt`), modulePickle(Object.fromEntries(entries)), storages);
  }
  return { from, configPath };
}

/** Every rank's quantised weights, scales and plain tensors, cut out of the store, against the original's hashes. */
async function expectShardsOf(store: Store, model: GoldenModel, layout: GoldenLayout): Promise<void> {
  for (const { name, shape, split, isQuantizable } of glmTensors(model.config)) {
    const { qweight, scales } = quantizedNames(name);
    const pairs = isQuantizable
      ? [
          [qweight, name],
          [scales, `${name}_scale`],
        ]
      : [[name, name]];
    for (const [stored, original] of pairs as [string, string][]) {
      const whole = readTensor(store, stored);
      for (const [rank, shard] of splitTensor(split, whole, shape[0], layout.numRanks).entries()) {
        expect(sha256(shard), `${original}, rank ${rank}`).toBe(layout.ranks[rank]!.get(original)!.sha256);
      }
    }
  }
}

function readTensor(store: Store, name: string): Buffer {
  const { file, offset, bytes } = store.tensors.find((candidate) => candidate.name === name)!;
  return readFileSync(file).subarray(offset, offset + bytes);
}

function copyOf(layout: GoldenLayout): string {
  const dir = join(scratch, `sat-${count++}`);
  cpSync(layout.dir!, dir, { recursive: true });
  return dir;
}

function truncate(path: string): void {
  writeFileSync(path, readFileSync(path).subarray(0, 20_000));
}

/** Hidden folders that an import left beside its target, and the target itself. */
function leftovers(): string[] {
  return readdirSync(scratch)
    .filter((name) => name.includes('.partial'))
    .concat(existsSync(join(to, 'config.json')) ? [] : existsSync(to) ? [to] : []);
}

async function expectError(options: ImportOptions, type: typeof CheckpointError | typeof ConfigError, message: string): Promise<void> {
  const error: unknown = await importCheckpoint(options).then(
    () => null,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(type);
  expect((error as Error).message).toContain(message);
  expect((error as Error).message).not.toContain('\n');
}
