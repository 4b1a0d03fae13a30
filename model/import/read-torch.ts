import { crc32 } from 'node:zlib';
import { CheckpointError } from '../../common/errors.js';
import { ByteSource, namesOf } from './byte-source.js';
import { parsePickle, PickleDict, TensorRef, type StorageRef } from './pickle.js';
import { StoredZip } from './stored-zip.js';
import { spanOf, TensorReader } from './tensor-reader.js';
import type { TorchDtype, TorchTensor } from './torch-tensor.js';

/**
 * The tensors under `module` of one torch.save file (model-spec section 1.1). The pickle is read by {@link parsePickle} and executes
 * nothing; tensor data is read by ranges, never the whole file. Every view is checked against its storage, and the storage against its
 * entry in the archive, before anything is read.
 */
export class TorchFile {
  /** Of the tensors that were read last, as their checksums run from one call to the next. */
  private readonly readers = new Map<string, TensorReader>();

  private constructor(
    /** What to call it. */
    readonly path: string,
    private readonly source: ByteSource,
    /** By name, in the order of the file. */
    readonly tensors: ReadonlyMap<string, TorchTensor>,
  ) {}

  /** @param from a path, or the bytes, which stay the caller's then @throws CheckpointError */
  static async open(from: string | ByteSource): Promise<TorchFile> {
    const source = typeof from === 'string' ? ByteSource.open([from]) : from;
    try {
      return new TorchFile(source.label, source, await readTensorList(await StoredZip.open(source)));
    } catch (error) {
      if (source !== from) source.close();
      throw error;
    }
  }

  /** Closes the file that {@link open} was given by its path. */
  async close(): Promise<void> {
    this.source.close();
  }

  /**
   * Elements of rows [begin, end) (indices of the first dimension), dense and row-major, little-endian. A storage that is read from front to
   * back is checked against the archive's CRC-32 with its last byte.
   */
  async readRows(tensor: TorchTensor, begin: number, end: number): Promise<Buffer> {
    const reader = this.readers.get(tensor.name) ?? new TensorReader(tensor);
    this.readers.set(tensor.name, reader);
    const out = Buffer.allocUnsafe((end - begin) * reader.rowBytes);
    reader.readRows(begin, end, out);
    return out;
  }

  /** The whole tensor, as {@link readRows}; a tensor without dimensions has one row. */
  async readTensor(tensor: TorchTensor): Promise<Buffer> {
    return this.readRows(tensor, 0, tensor.shape[0] ?? 1);
  }
}

async function readTensorList(zip: StoredZip): Promise<Map<string, TorchTensor>> {
  const pickles = zip.entries.filter((entry) => /^[^/]+\/data\.pkl$/.test(entry.name));
  const [pickle] = pickles;
  if (pickle === undefined || pickles.length > 1) {
    throw new CheckpointError(`${zip.path}: the archive has ${pickles.length} entries NAME/data.pkl, a torch.save file has one`);
  }
  const root = pickle.name.slice(0, -'/data.pkl'.length);
  await checkByteOrder(zip, `${root}/byteorder`);
  if (pickle.size > 16 * 2 ** 20) throw new CheckpointError(`${zip.path}: data.pkl has ${pickle.size} bytes, at most 16 MiB are read`);
  const bytes = await zip.read(pickle.name, 0, pickle.size);
  if (crc32(bytes) !== pickle.crc32) {
    const where = namesOf(zip.content(pickle.name).extents);
    throw new CheckpointError(`${zip.path}: data.pkl does not match its CRC-32: ${where} is damaged or not in its place, fetch it again`);
  }

  const top = parsePickle(bytes, zip.path);
  const module = top instanceof PickleDict ? top.get('module') : undefined;
  if (!(module instanceof PickleDict)) {
    throw new CheckpointError(`${zip.path}: the file holds no dict of tensors under the key "module", which a SAT checkpoint has`);
  }
  const tensors = new Map<string, TorchTensor>();
  for (const [name, value] of module) {
    if (typeof name !== 'string' || !(value instanceof TensorRef)) continue; // the importer says which names are missing
    tensors.set(name, checkTensor(zip, root, name, value));
  }
  return tensors;
}

/** Newer torch.save writes the byte order; before, it was little-endian wherever GLM ran. */
async function checkByteOrder(zip: StoredZip, name: string): Promise<void> {
  const entry = zip.entry(name);
  if (entry === undefined) return;
  const order = entry.size <= 16 ? (await zip.read(name, 0, entry.size)).toString('latin1').trim() : '?';
  if (order !== 'little') {
    throw new CheckpointError(`${zip.path}: byte order ${JSON.stringify(order)}, this reader takes little-endian files`);
  }
}

function checkTensor(zip: StoredZip, root: string, name: string, ref: TensorRef): TorchTensor {
  const label = `${zip.path}: tensor ${name}`;
  const { storage } = ref;
  const { dtype, itemBytes } = storageDtypes[storage.type]!;
  const entryName = `${root}/data/${storage.key}`;
  const { content, crc32 } = checkStorage(zip, { name, label, storage, entryName, itemBytes });
  const numElements = ref.shape.reduce((total, count) => total * count, 1);
  if (numElements > storage.numElements) {
    throw new CheckpointError(`${label} has shape [${ref.shape.join(', ')}], more elements than its storage of ${storage.numElements}`);
  }
  const end = ref.offset + spanOf(ref);
  if (!(end <= storage.numElements)) {
    throw new CheckpointError(
      `${label}: shape [${ref.shape.join(', ')}] with strides [${ref.strides.join(', ')}] from element ${ref.offset} ` +
        `leaves its storage of ${storage.numElements} elements`,
    );
  }
  return {
    name,
    dtype,
    itemBytes,
    shape: ref.shape,
    strides: ref.strides,
    storageOffset: ref.offset,
    storage: { label: content.label, extents: content.extents },
    crc32,
  };
}

function checkStorage(
  zip: StoredZip,
  {
    name,
    label,
    storage,
    entryName,
    itemBytes,
  }: { name: string; label: string; storage: StorageRef; entryName: string; itemBytes: number },
): { content: ByteSource; crc32: number } {
  const entry = zip.entry(entryName);
  if (entry === undefined) throw new CheckpointError(`${label}: the archive has no entry ${JSON.stringify(entryName)} for its storage`);
  if (entry.size !== storage.numElements * itemBytes) {
    throw new CheckpointError(
      `${label}: its storage should have ${storage.numElements} elements of ${itemBytes} bytes, entry ${entryName} has ${entry.size} bytes`,
    );
  }
  return { content: zip.content(entryName, `tensor ${name}`), crc32: entry.crc32 };
}

const storageDtypes: Readonly<Record<string, { dtype: TorchDtype; itemBytes: number }>> = {
  'torch.HalfStorage': { dtype: 'float16', itemBytes: 2 },
  'torch.FloatStorage': { dtype: 'float32', itemBytes: 4 },
  'torch.DoubleStorage': { dtype: 'float64', itemBytes: 8 },
  'torch.BFloat16Storage': { dtype: 'bfloat16', itemBytes: 2 },
  'torch.CharStorage': { dtype: 'int8', itemBytes: 1 },
  'torch.ByteStorage': { dtype: 'uint8', itemBytes: 1 },
  'torch.ShortStorage': { dtype: 'int16', itemBytes: 2 },
  'torch.IntStorage': { dtype: 'int32', itemBytes: 4 },
  'torch.LongStorage': { dtype: 'int64', itemBytes: 8 },
  'torch.BoolStorage': { dtype: 'bool', itemBytes: 1 },
};
