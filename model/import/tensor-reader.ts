import { crc32 as zlibCrc32 } from 'node:zlib';
import { CheckpointError } from '../../common/errors.js';
import { ByteSource, namesOf, type Extent } from './byte-source.js';
import type { TorchTensor } from './torch-tensor.js';

/** Bytes that a read of a strided view may take in one go beyond what it returns. */
const gatherBytes = 64 * 2 ** 20;

export type Crc32 = (bytes: Uint8Array, previous: number) => number;

/** Reads rows of one tensor of a torch.save file, and checks its storage against the CRC-32 of the archive. */
export class TensorReader {
  readonly rowBytes: number;
  private readonly source: ByteSource;
  private readonly isDense: boolean;
  /** Of the storage, as far as it was read from front to back. */
  private readonly checksum = { end: 0, crc: 0 };

  constructor(
    private readonly tensor: TorchTensor,
    private readonly crc32: Crc32 = zlibCrc32,
  ) {
    const { shape, strides, itemBytes, storage } = tensor;
    this.rowBytes = product(shape.slice(1)) * itemBytes;
    this.source = new ByteSource(storage);
    this.isDense = shape.every((count, axis) => count === 1 || strides[axis] === product(shape.slice(axis + 1)));
  }

  /**
   * Fills `into` with rows [begin, end), dense and row-major. With the last byte of a storage that was read from front to back its CRC-32 is
   * compared.
   */
  readRows(begin: number, end: number, into: Uint8Array): void {
    const { shape, strides, storageOffset, itemBytes, name } = this.tensor;
    const [rows = 1, ...rowShape] = shape;
    if (!(begin >= 0 && begin <= end && end <= rows)) throw new RangeError(`rows ${begin} to ${end} of ${name}, which has ${rows}`);
    if (into.length !== (end - begin) * this.rowBytes) throw new RangeError(`${into.length} bytes for rows ${begin} to ${end} of ${name}`);
    if (this.isDense) return this.readStorage(storageOffset * itemBytes + begin * this.rowBytes, into);
    const block = { shape: [end - begin, ...rowShape], strides: [strides[0] ?? 0, ...strides.slice(1)] };
    const limit = Math.max(gatherBytes, 2 * product(shape) * itemBytes);
    this.gather(block, storageOffset + begin * (strides[0] ?? 0), Buffer.from(into.buffer, into.byteOffset, into.length), limit);
  }

  /** Where rows [begin, end) lie; empty for a view that is not dense, whose rows are all over its storage. */
  extentsOf(begin: number, end: number): Extent[] {
    if (!this.isDense) return [];
    return this.source.extentsOf(this.tensor.storageOffset * this.tensor.itemBytes + begin * this.rowBytes, (end - begin) * this.rowBytes);
  }

  /** Compares the CRC-32 of a storage of which not every byte was read in order. */
  finish(): void {
    const scratch = Buffer.allocUnsafe(Math.min(2 ** 20, this.source.size));
    while (this.checksum.end < this.source.size) {
      const begin = this.checksum.end;
      this.readStorage(begin, scratch.subarray(0, Math.min(scratch.length, this.source.size - begin)));
    }
  }

  /** Copies a strided block, of which `first` is the first element, into dense `out`; what it spans is read at once if that is little enough. */
  private gather(block: StridedBlock, first: number, out: Buffer, limit: number): void {
    const { itemBytes } = this.tensor;
    const span = spanOf(block);
    if (span === 0) return;
    if (span * itemBytes <= limit) {
      const bytes = Buffer.allocUnsafe(span * itemBytes);
      this.readStorage(first * itemBytes, bytes);
      copyStrided(bytes, block, itemBytes, out);
      return;
    }
    const [count = 1, ...innerShape] = block.shape;
    const [stride = 0, ...innerStrides] = block.strides;
    const inner = { shape: innerShape, strides: innerStrides };
    const innerBytes = product(innerShape) * itemBytes;
    for (let i = 0; i < count; i++) {
      this.gather(inner, first + i * stride, out.subarray(i * innerBytes, (i + 1) * innerBytes), limit);
    }
  }

  private readStorage(begin: number, into: Uint8Array): void {
    this.source.readInto(into, begin);
    const { checksum } = this;
    if (begin !== 0 && begin !== checksum.end) return;
    checksum.crc = this.crc32(into, begin === 0 ? 0 : checksum.crc);
    checksum.end = begin + into.length;
    if (checksum.end === this.source.size && checksum.crc !== this.tensor.crc32) throw this.damaged();
  }

  private damaged(): CheckpointError {
    const { name, storage } = this.tensor;
    return new CheckpointError(
      `tensor ${name} does not match its CRC-32 (${storage.label}): ${namesOf(storage.extents)} is damaged or not in its place, fetch it again`,
    );
  }
}

interface StridedBlock {
  readonly shape: readonly number[];
  readonly strides: readonly number[];
}

/** Elements from the first to the last one of a strided block, both included; 0 for a block without elements. */
export function spanOf(block: StridedBlock): number {
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
