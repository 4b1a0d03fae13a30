import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { CheckpointError } from '../../common/errors.js';
import { goldenModel, goldenModels, sha256 } from './fixtures/golden-checkpoints.js';
import { global, modulePickle, op, tensor, text, tuple, writeTorchFile, zip, type FixtureTensor } from './fixtures/torch-archive.js';
import { TorchFile } from './read-torch.js';
import { SatCheckpoint } from './sat-checkpoint.js';

const dir = mkdtempSync(join(tmpdir(), 'read-torch-'));
afterAll(() => rmSync(dir, { recursive: true }));

const stored = goldenModels.flatMap((model) =>
  model.layouts.filter((layout) => layout.dir !== null).map((layout) => ({ model: model.name, layout })),
);

test('the golden folder has all twelve stored layouts', () => {
  expect(stored.map(({ model, layout }) => `${model}/${layout.name}`).sort()).toEqual(
    [
      'A/tp1',
      'A/tp2-int4',
      'B/tp1',
      'B/tp2',
      'B/tp2-int4',
      'B/tp2-int8',
      'E/tp1',
      'E/tp1-int4',
      'E/tp1-int8',
      'E/tp2',
      'E/tp4',
      'E/tp4-int4',
      'E/tp4-int8',
    ].sort(),
  );
});

test.each(stored.map(({ model, layout }) => ({ name: `${model} ${layout.name}`, layout })))(
  'every tensor of $name has the original bytes',
  async ({ layout }) => {
    const checkpoint = await SatCheckpoint.open(layout.dir!);
    expect(checkpoint.ranks.length).toBe(layout.numRanks);
    for (const [rank, file] of checkpoint.ranks.entries()) {
      const golden = layout.ranks[rank]!;
      for (const [name, expected] of golden) {
        const seen = file.tensors.get(name)!;
        expect({ shape: seen.shape, dtype: seen.dtype, sha256: sha256(await file.readTensor(seen)) }, name).toEqual(expected);
      }
      expect([...file.tensors.keys()].filter((name) => !name.endsWith('inv_freq')).sort()).toEqual(
        [...golden.keys()].filter((name) => !name.endsWith('inv_freq')).sort(),
      );
    }
    await checkpoint.close();
  },
);

// A storage of 0, 1, 2, ... 23 as bytes; what a view of it should read as.
const bytes24 = Uint8Array.from({ length: 24 }, (_, i) => i);
const base: FixtureTensor = { storageType: 'CharStorage', key: '0', storageElements: 24, offset: 0, shape: [24], strides: [1] };

describe('views', () => {
  test.each([
    { name: 'a run inside the storage', view: { offset: 5, shape: [3], strides: [1] }, values: [5, 6, 7] },
    {
      name: 'a block of rows',
      view: { offset: 12, shape: [2, 6], strides: [6, 1] },
      values: [12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23],
    },
    { name: 'a block of columns', view: { offset: 2, shape: [3, 2], strides: [8, 1] }, values: [2, 3, 10, 11, 18, 19] },
    { name: 'a transposed matrix', view: { offset: 0, shape: [2, 3], strides: [1, 8] }, values: [0, 8, 16, 1, 9, 17] },
    { name: 'every second element', view: { offset: 1, shape: [4], strides: [2] }, values: [1, 3, 5, 7] },
    { name: 'three dimensions', view: { offset: 0, shape: [2, 2, 2], strides: [12, 1, 4] }, values: [0, 4, 1, 5, 12, 16, 13, 17] },
    { name: 'one row of odd stride', view: { offset: 3, shape: [1, 4], strides: [999, 1] }, values: [3, 4, 5, 6] },
    { name: 'a number without dimensions', view: { offset: 7, shape: [], strides: [] }, values: [7] },
    { name: 'nothing', view: { offset: 24, shape: [0, 4], strides: [4, 1] }, values: [] },
  ])('$name', async ({ view, values }) => {
    const path = join(dir, 'view.pt');
    writeTorchFile(path, modulePickle({ x: tensor({ ...base, ...view }) }), { 0: bytes24 });
    const file = await TorchFile.open(path);
    expect([...(await file.readTensor(file.tensors.get('x')!))]).toEqual(values);
    await file.close();
  });

  test('rows of a block of columns are read alone', async () => {
    const path = join(dir, 'rows.pt');
    writeTorchFile(path, modulePickle({ x: tensor({ ...base, offset: 2, shape: [3, 2], strides: [8, 1] }) }), { 0: bytes24 });
    const file = await TorchFile.open(path);
    expect([...(await file.readRows(file.tensors.get('x')!, 1, 3))]).toEqual([10, 11, 18, 19]);
    await file.close();
  });

  test.each([
    { name: 'past the end', view: { offset: 20, shape: [2, 3], strides: [3, 1] }, message: 'leaves its storage of 24 elements' },
    { name: 'by its stride', view: { offset: 0, shape: [2, 2], strides: [23, 1] }, message: 'leaves its storage of 24 elements' },
    { name: 'by an offset beyond any file', view: { offset: 2n ** 52n, shape: [1], strides: [1] }, message: 'leaves its storage' },
    {
      name: 'by sizes that overflow',
      view: { offset: 0, shape: [2n ** 50n, 2n ** 50n], strides: [1, 1] },
      message: 'more elements than its storage',
    },
    { name: 'by overlapping itself', view: { offset: 0, shape: [1000, 1000], strides: [0, 0] }, message: 'more elements than its storage' },
    {
      name: 'by a number past 2^53',
      view: { offset: 2n ** 63n, shape: [1], strides: [1] },
      message: 'the offset is no whole number from 0 to 2^53 - 1',
    },
  ])('a view that leaves its storage $name is refused', async ({ view, message }) => {
    const path = join(dir, 'outside.pt');
    writeTorchFile(path, modulePickle({ x: tensor({ ...base, ...view }) }), { 0: bytes24 });
    await expectRefused(path, message);
  });

  test('a storage whose claimed size is not that of its entry is refused', async () => {
    const path = join(dir, 'claim.pt');
    writeTorchFile(path, modulePickle({ x: tensor({ ...base, storageElements: 25 }) }), { 0: bytes24 });
    await expectRefused(path, 'its storage should have 25 elements of 1 bytes, entry archive/data/0 has 24 bytes');
  });

  test('a storage without an entry is refused', async () => {
    const path = join(dir, 'no-entry.pt');
    writeTorchFile(path, modulePickle({ x: tensor({ ...base, key: '../../1' }) }), { 0: bytes24 });
    await expectRefused(path, 'the archive has no entry "archive/data/../../1"');
  });
});

describe('what else a file may hold', () => {
  test('training state beside the module is ignored, and so is the state of an OrderedDict', async () => {
    const path = join(dir, 'state.pt');
    const orderedDict = Buffer.concat([global('collections', 'OrderedDict'), op.emptyTuple, op.reduce]);
    const module = Buffer.concat([
      orderedDict,
      op.mark,
      ...[text('x'), tensor(base)],
      op.setItems,
      ...[op.emptyDict, text('_metadata'), orderedDict, op.setItem, op.build],
    ]);
    const big = Buffer.from([0x8a, 9, 0, 0, 0, 0, 0, 0, 0, 0, 1]); // 2^64
    const state = Buffer.concat([
      op.emptyList,
      text('cosine'),
      op.append,
      big,
      op.append,
      op.none,
      op.append,
      Buffer.from('G?\xe0\0\0\0\0\0\0', 'latin1'),
      op.append,
    ]);
    const pickle = Buffer.concat([
      op.proto2,
      op.emptyDict,
      op.mark,
      ...[text('iteration'), big, text('module'), module, text('lr_scheduler'), tuple(state, op.newFalse)],
      op.setItems,
      op.stop,
    ]);
    writeTorchFile(path, pickle, { 0: bytes24 });
    const file = await TorchFile.open(path);
    expect([...file.tensors.keys()]).toEqual(['x']);
    await file.close();
  });

  test('a parameter is its tensor', async () => {
    const path = join(dir, 'parameter.pt');
    const parameter = Buffer.concat([global('torch._utils', '_rebuild_parameter'), tuple(tensor(base), op.newFalse, op.none), op.reduce]);
    writeTorchFile(path, modulePickle({ x: parameter }), { 0: bytes24 });
    const file = await TorchFile.open(path);
    expect([...(await file.readTensor(file.tensors.get('x')!))]).toEqual([...bytes24]);
    await file.close();
  });

  test.each([
    { name: 'no module', pickle: Buffer.concat([op.proto2, op.emptyDict, op.stop]), message: 'no dict of tensors under the key "module"' },
    {
      name: 'a big-endian file',
      more: [{ name: 'archive/byteorder', data: Buffer.from('big') }],
      message: 'byte order "big", this reader takes little-endian files',
    },
    { name: 'two pickles', more: [{ name: 'other/data.pkl', data: op.stop }], message: 'the archive has 2 entries NAME/data.pkl' },
    {
      name: 'a compressed storage',
      more: [{ name: 'archive/data/1', data: bytes24, deflate: true }],
      message: 'is compressed or encrypted',
    },
    { name: 'an entry twice', more: [{ name: 'archive/data/0', data: bytes24 }], message: 'the archive has two entries "archive/data/0"' },
  ])('$name is refused', async ({ pickle, more, message }) => {
    const path = join(dir, 'refused.pt');
    writeTorchFile(path, pickle ?? modulePickle({ x: tensor(base) }), { 0: bytes24 }, more);
    await expectRefused(path, message);
  });
});

describe('damaged files', () => {
  const original = readFileSync(join(goldenModel('E').layout('tp4-int4').dir!, 'release/mp_rank_00_model_states.pt'));

  test('a changed byte of tensor data is noticed by the CRC-32 of the archive', async () => {
    const path = join(dir, 'flipped.pt');
    const data = Buffer.from(
      zip([
        { name: 'archive/data.pkl', data: modulePickle({ x: tensor(base) }) },
        { name: 'archive/data/0', data: bytes24 },
      ]),
    );
    const at = data.indexOf(Buffer.from(bytes24));
    data[at + 3] = 99;
    writeFileSync(path, data);
    const file = await TorchFile.open(path);
    await expect(file.readTensor(file.tensors.get('x')!)).rejects.toThrow(
      `tensor x does not match its CRC-32 (${path}, entry archive/data/0): ${path} is damaged`,
    );
    await file.close();
  });

  test('a file that is no archive, an empty one, a folder and none at all', async () => {
    writeFileSync(join(dir, 'text.pt'), 'not a checkpoint');
    writeFileSync(join(dir, 'empty.pt'), '');
    await expectRefused(
      join(dir, 'text.pt'),
      'text.pt is no intact torch.save archive: End of central directory record signature not found',
    );
    await expectRefused(join(dir, 'empty.pt'), 'empty.pt is no intact torch.save archive');
    await expectRefused(dir, 'is not a regular file');
    await expectRefused(join(dir, 'absent.pt'), 'absent.pt does not exist');
  });

  test('a truncated file', async () => {
    writeFileSync(join(dir, 'truncated.pt'), original.subarray(0, original.length - 100));
    await expectRefused(join(dir, 'truncated.pt'), 'truncated.pt is no intact torch.save archive');
  });

  test('tensor data that was cut out of the middle', async () => {
    writeFileSync(join(dir, 'hole.pt'), Buffer.concat([original.subarray(0, 8000), original.subarray(12_000)]));
    await expectRefused(
      join(dir, 'hole.pt'),
      'hole.pt has 30636 bytes, but bytes 34538 to 34594 are needed: the file is truncated or damaged',
    );
  });

  // Deterministic noise: the same mutations in every run (xorshift32).
  test('400 random changes give a CheckpointError or the file as it is, and never anything else', async () => {
    let state = 0x9e3779b9;
    const random = (below: number): number => {
      state ^= state << 13;
      state ^= state >>> 17;
      state ^= state << 5;
      return (state >>> 0) % below;
    };
    const directoryStart = original.length - 22 - original.readUInt32LE(original.length - 10);
    const outcomes = { read: 0, refused: 0 };
    for (let i = 0; i < 400; i++) {
      const mutated = Buffer.from(i % 5 === 0 ? original.subarray(0, random(original.length)) : original);
      // Most bytes are tensor data: aim at the pickle in front and at the directory at the end.
      const changes = i % 5 === 0 ? 0 : 1 + random(4);
      for (let change = 0; change < changes; change++) {
        const at =
          i % 3 === 0 ? random(4200) : i % 3 === 1 ? directoryStart + random(original.length - directoryStart) : random(original.length);
        mutated[at] = random(256);
      }
      const path = join(dir, 'mutated.pt');
      writeFileSync(path, mutated);
      try {
        const file = await TorchFile.open(path);
        try {
          for (const each of file.tensors.values()) await file.readTensor(each);
        } finally {
          await file.close();
        }
        outcomes.read++;
      } catch (error) {
        expect(error, `mutation ${i}`).toBeInstanceOf(CheckpointError);
        outcomes.refused++;
      }
    }
    expect(outcomes.refused).toBeGreaterThan(200);
  }, 60_000);
});

async function expectRefused(path: string, message: string): Promise<void> {
  const error: unknown = await TorchFile.open(path).then(
    () => null,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(CheckpointError);
  expect((error as Error).message).toContain(message);
  expect((error as Error).message).not.toContain('\n');
}
