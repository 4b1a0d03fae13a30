import { crc32 } from 'node:zlib';
import { CheckpointError } from '../../common/errors.js';
import { parsePickle, PickleDict, TensorRef, type StorageRef } from './pickle.js';
import { StoredZip } from './stored-zip.js';

export type TorchDtype = 'float16' | 'float32' | 'float64' | 'bfloat16' | 'int8' | 'uint8' | 'int16' | 'int32' | 'int64' | 'bool';

export interface TorchTensor {
  readonly name: string;
  readonly dtype: TorchDtype;
  readonly itemBytes: number;
  readonly shape: readonly number[];
  /** In elements. */
  readonly strides: readonly number[];
  /** First element in its storage. */
  readonly storageOffset: number;
  /** Entry of the archive that holds the storage. */
  readonly entry: string;
}

/** Bytes that a read of a strided view may take in one go beyond what it returns. */
const gatherBytes = 64 * 2 ** 20;

/**
 * The tensors under `module` of one torch.save file (model-spec section 1.1). The pickle is read by {@link parsePickle} and executes
 * nothing; tensor data is read by ranges, never the whole file. Every view is checked against its storage, and the storage against its
 * entry in the archive, before anything is read.
 */
export class TorchFile {
  /** Running CRC-32 of the entries that are being read from front to back. */
  private readonly checksums = new Map<string, { end: number; crc: number }>();

  private constructor(
    readonly path: string,
    private readonly zip: StoredZip,
    /** By name, in the order of the file. */
    readonly tensors: ReadonlyMap<string, TorchTensor>,
  ) {}

  /** @throws CheckpointError */
  static async open(path: string): Promise<TorchFile> {
    const zip = await StoredZip.open(path);
    try {
      return new TorchFile(path, zip, await readTensorList(zip));
    } catch (error) {
      await zip.close();
      throw error;
    }
  }

  async close(): Promise<void> {
    await this.zip.close();
  }

  /**
   * Elements of rows [begin, end) (indices of the first dimension), dense and row-major, little-endian. A storage that is read from front to
   * back is checked against the archive's CRC-32 with its last byte.
   */
  async readRows(tensor: TorchTensor, begin: number, end: number): Promise<Buffer> {
    const [rows = 1, ...rowShape] = tensor.shape;
    if (!(begin >= 0 && begin <= end && end <= rows)) throw new RangeError(`rows ${begin} to ${end} of ${tensor.name}, which has ${rows}`);
    const out = Buffer.allocUnsafe((end - begin) * product(rowShape) * tensor.itemBytes);
    const limit = Math.max(gatherBytes, 2 * product(tensor.shape) * tensor.itemBytes);
    const first = tensor.storageOffset + begin * (tensor.strides[0] ?? 0);
    await this.gather(
      tensor,
      { shape: [end - begin, ...rowShape], strides: [tensor.strides[0] ?? 0, ...tensor.strides.slice(1)] },
      first,
      out,
      limit,
    );
    return out;
  }

  /** The whole tensor, as {@link readRows}; a tensor without dimensions has one row. */
  async readTensor(tensor: TorchTensor): Promise<Buffer> {
    return this.readRows(tensor, 0, tensor.shape[0] ?? 1);
  }

  /** Copies a strided block, of which `first` is the first element, into dense `out`; what it spans is read at once if that is little enough. */
  private async gather(tensor: TorchTensor, block: StridedBlock, first: number, out: Buffer, limit: number): Promise<void> {
    const { itemBytes } = tensor;
    const span = spanOf(block);
    if (span === 0) return;
    if (span * itemBytes <= limit) {
      const bytes = await this.readEntry(tensor.entry, first * itemBytes, (first + span) * itemBytes);
      copyStrided(bytes, block, itemBytes, out);
      return;
    }
    const [count = 1, ...innerShape] = block.shape;
    const [stride = 0, ...innerStrides] = block.strides;
    const inner = { shape: innerShape, strides: innerStrides };
    const innerBytes = product(innerShape) * itemBytes;
    for (let i = 0; i < count; i++) {
      await this.gather(tensor, inner, first + i * stride, out.subarray(i * innerBytes, (i + 1) * innerBytes), limit);
    }
  }

  private async readEntry(name: string, begin: number, end: number): Promise<Buffer> {
    const bytes = await this.zip.read(name, begin, end);
    const running = begin === 0 ? { end: 0, crc: 0 } : this.checksums.get(name);
    if (running?.end !== begin) return bytes;
    running.crc = crc32(bytes, running.crc);
    running.end = end;
    this.checksums.set(name, running);
    const entry = this.zip.entry(name)!;
    if (end === entry.size && running.crc !== entry.crc32) {
      throw new CheckpointError(`${this.path}: the data of entry ${name} does not match its CRC-32: the file is damaged, fetch it again`);
    }
    return bytes;
  }
}

interface StridedBlock {
  readonly shape: readonly number[];
  readonly strides: readonly number[];
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
    throw new CheckpointError(`${zip.path}: data.pkl does not match its CRC-32: the file is damaged, fetch it again`);
  }

  const top = parsePickle(bytes, zip.path);
  const module = top instanceof PickleDict ? top.get('module') : undefined;
  if (!(module instanceof PickleDict)) {
    throw new CheckpointError(`${zip.path}: the file holds no dict of tensors under the key "module", which a SAT checkpoint has`);
  }
  const tensors = new Map<string, TorchTensor>();
  for (const [name, value] of module) {
    if (typeof name !== 'string' || !(value instanceof TensorRef)) continue; // the importer says which names are missing
    tensors.set(name, await checkTensor(zip, root, name, value));
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

async function checkTensor(zip: StoredZip, root: string, name: string, ref: TensorRef): Promise<TorchTensor> {
  const label = `${zip.path}: tensor ${name}`;
  const { storage } = ref;
  const { dtype, itemBytes } = storageDtypes[storage.type]!;
  const entryName = `${root}/data/${storage.key}`;
  await checkStorage(zip, label, storage, entryName, itemBytes);
  const numElements = product(ref.shape);
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
  return { name, dtype, itemBytes, shape: ref.shape, strides: ref.strides, storageOffset: ref.offset, entry: entryName };
}

async function checkStorage(zip: StoredZip, label: string, storage: StorageRef, entryName: string, itemBytes: number): Promise<void> {
  const entry = zip.entry(entryName);
  if (entry === undefined) throw new CheckpointError(`${label}: the archive has no entry ${JSON.stringify(entryName)} for its storage`);
  if (entry.size !== storage.numElements * itemBytes) {
    throw new CheckpointError(
      `${label}: its storage should have ${storage.numElements} elements of ${itemBytes} bytes, entry ${entryName} has ${entry.size} bytes`,
    );
  }
  await zip.locate(entryName);
}

/** Elements from the first to the last one of a strided block, both included; 0 for a block without elements. */
function spanOf(block: StridedBlock): number {
  let last = 0;
  for (const [axis, count] of block.shape.entries()) {
    if (count === 0) return 0;
    last += (count - 1) * block.strides[axis]!;
  }
  return last + 1; // beyond 2^53 it is inexact but still far larger than any storage
}

function product(shape: readonly number[]): number {
  return shape.reduce((total, count) => total * count, 1);
}

/** `source` starts at the block's first element. */
function copyStrided(source: Buffer, block: StridedBlock, itemBytes: number, out: Buffer): void {
  const axes = block.shape.length;
  // The innermost axes that lie densely are copied as one run.
  let run = 1;
  let outer = axes;
  while (outer > 0 && (block.strides[outer - 1] === run || block.shape[outer - 1] === 1)) run *= block.shape[--outer]!;
  const index = new Array<number>(outer).fill(0);
  let from = 0;
  for (let to = 0; to < out.length; to += run * itemBytes) {
    source.copy(out, to, from * itemBytes, (from + run) * itemBytes);
    for (let axis = outer - 1; axis >= 0; axis--) {
      from += block.strides[axis]!;
      if (++index[axis]! < block.shape[axis]!) break;
      from -= block.shape[axis]! * block.strides[axis]!;
      index[axis] = 0;
    }
  }
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
