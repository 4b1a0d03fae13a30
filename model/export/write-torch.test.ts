import { mkdtempSync, readFileSync, rmSync, statSync } from 'node:fs';
import { open, type FileHandle } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { goldenModels } from '../import/fixtures/golden-checkpoints.js';
import { parsePickle, PickleDict, TensorRef } from '../import/pickle.js';
import { TorchFile } from '../import/read-torch.js';
import type { TorchTensor } from '../import/torch-tensor.js';
import { SatCheckpoint } from '../import/sat-checkpoint.js';
import { StoredZip } from '../import/stored-zip.js';
import { FileSink, type ByteSink } from './byte-sink.js';
import { layOutTorchFile, TorchFileWriter, type PlannedTorchTensor } from './write-torch.js';

const scratch = mkdtempSync(join(tmpdir(), 'write-torch-'));
afterAll(() => rmSync(scratch, { recursive: true }));

function planned({ name, dtype, shape }: TorchTensor): PlannedTorchTensor {
  return { name, dtype: dtype as PlannedTorchTensor['dtype'], shape };
}

async function writeFile(
  path: string,
  root: string,
  tensors: readonly PlannedTorchTensor[],
  bytesOf: (name: string) => Promise<Buffer>,
): Promise<void> {
  const sink = await FileSink.create(path);
  const writer = await TorchFileWriter.create(sink, layOutTorchFile(root, tensors));
  for (const { name } of tensors) {
    const bytes = await bytesOf(name);
    await writer.append(name, bytes.subarray(0, 10)); // in pieces
    if (bytes.length > 10) await writer.append(name, bytes.subarray(10));
  }
  await writer.finish();
  await sink.finish();
}

const golden = goldenModels.flatMap((model) =>
  model.layouts.filter(({ dir }) => dir !== null).map((layout) => ({ name: `${model.name} ${layout.name}`, dir: layout.dir! })),
);

test.each(golden)('what torch.save wrote of $name is written again: the same pickle, the same entries', async ({ name, dir }) => {
  const checkpoint = await SatCheckpoint.open(dir);
  for (const [rank, file] of checkpoint.ranks.entries()) {
    const tensors = [...file.tensors.values()];
    const root = `mp_rank_0${rank}_model_states`;
    const path = join(scratch, `${name} ${rank}.pt`);
    await writeFile(path, root, tensors.map(planned), (tensor) => file.readTensor(file.tensors.get(tensor)!));
    expect(statSync(path).size).toBe(layOutTorchFile(root, tensors.map(planned)).bytes);
    const [original, written] = [await StoredZip.open(file.path), await StoredZip.open(path)];
    const read = (zip: StoredZip, entry: string): Promise<Buffer> => zip.read(entry, 0, zip.entry(entry)!.size);
    const byName = (zip: StoredZip): Map<string, unknown> => new Map(zip.entries.map((entry) => [entry.name, entry]));
    expect(byName(written)).toEqual(byName(original)); // sizes and CRCs
    for (const entry of ['data.pkl', 'version']) {
      expect(await read(written, `${root}/${entry}`)).toEqual(await read(original, `${root}/${entry}`));
    }
    await original.close();
    await written.close();
    // No data was moved by the writer: every storage begins at a multiple of 64 bytes, as PyTorch maps files.
    const bytes = readFileSync(path);
    for (const tensor of tensors.filter(({ shape }) => shape.length > 1)) {
      expect(bytes.indexOf(await file.readTensor(tensor)) % 64).toBe(0);
    }
  }
  await checkpoint.close();
});

test('what was written is read back, more tensors than one SETITEMS takes among it', async () => {
  const tensors = Array.from({ length: 2001 }, (_, i): PlannedTorchTensor => ({ name: `t${i}`, dtype: 'float32', shape: [i % 7] }));
  const content = (name: string): Buffer => Buffer.alloc((Number(name.slice(1)) % 7) * 4, name);
  const path = join(scratch, 'many.pt');
  await writeFile(path, 'many', tensors, (name) => Promise.resolve(content(name)));
  const file = await TorchFile.open(path);
  expect([...file.tensors.keys()]).toEqual(tensors.map(({ name }) => name));
  for (const tensor of file.tensors.values()) expect(await file.readTensor(tensor)).toEqual(content(tensor.name));
  await file.close();
});

describe('sizes beyond 32 bits', () => {
  test.each([1, 255, 256, 65_535, 65_536, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 32, 2 ** 39 - 1, 2 ** 39, 2 ** 47, 2 ** 53 - 1])(
    'a tensor of %d elements',
    (elements) => {
      const { pickle } = layOutTorchFile('r', [{ name: 'x', dtype: 'int8', shape: [elements] }]);
      const top = parsePickle(pickle, 'test') as PickleDict;
      const tensor = (top.get('module') as PickleDict).get('x') as TensorRef;
      expect({ shape: tensor.shape, elements: tensor.storage.numElements }).toEqual({ shape: [elements], elements });
    },
  );

  test('entries of 4 GiB and behind 4 GiB are read from a sparse file by their zip64 fields', async () => {
    const big = 2 ** 32 + 6;
    const tensors: PlannedTorchTensor[] = [
      { name: 'big', dtype: 'int8', shape: [big] },
      { name: 'behind', dtype: 'float16', shape: [3] },
    ];
    const layout = layOutTorchFile('r', tensors);
    const path = join(scratch, 'big.pt');
    const sparse = await SparseSink.create(path);
    const writer = await TorchFileWriter.create(sparse, layout);
    const zeros = Buffer.alloc(2 ** 27);
    for (let done = 0; done < big; done += zeros.length) await writer.append('big', zeros.subarray(0, Math.min(zeros.length, big - done)));
    await writer.append('behind', Buffer.from('behind'));
    await writer.finish();
    await sparse.close();
    expect(statSync(path).size).toBe(layout.bytes);
    const file = await TorchFile.open(path);
    expect((await file.readTensor(file.tensors.get('behind')!)).toString()).toBe('behind');
    expect(await file.readRows(file.tensors.get('big')!, big - 4, big)).toEqual(Buffer.alloc(4));
    await file.close();
  });
});

/** Leaves zeros as holes. */
class SparseSink implements ByteSink {
  private position = 0;
  private constructor(private readonly handle: FileHandle) {}

  static async create(path: string): Promise<SparseSink> {
    return new SparseSink(await open(path, 'wx'));
  }

  async write(bytes: Uint8Array): Promise<void> {
    if (bytes.length < 2 ** 20) await this.handle.write(bytes, 0, bytes.length, this.position);
    this.position += bytes.length;
  }

  close(): Promise<void> {
    return this.handle.close();
  }
}

test('tensors out of order, too long or missing are defects', async () => {
  const tensors: PlannedTorchTensor[] = ['a', 'b'].map((name) => ({ name, dtype: 'int8', shape: [4] }));
  const sink = await FileSink.create(join(scratch, 'defects.pt'));
  const writer = await TorchFileWriter.create(sink, layOutTorchFile('r', tensors));
  await expect(writer.append('b', Buffer.alloc(4))).rejects.toThrow('b is written where a is due');
  await expect(writer.append('a', Buffer.alloc(5))).rejects.toThrow('more bytes than its shape has');
  await expect(writer.finish()).rejects.toThrow('tensor a was never written');
  await sink.abandon();
});
