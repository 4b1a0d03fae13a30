import { createHash, type Hash } from 'node:crypto';
import { readSync, writeSync } from 'node:fs';
import { CheckpointError, ConfigError } from '../../common/errors.js';
import type { SplitKind } from '../store/glm-tensors.js';
import type { OutputRange } from '../store/partial-store.js';
import type { ImportKernels } from './import-kernels.js';
import type { QuantizedBits } from './quantize.js';
import type { TorchTensor } from './torch-tensor.js';
import { mergeColumnsInto, unsplitRowOrder, type RowSegment } from './split.js';
import { TensorReader } from './tensor-reader.js';

/** One tensor of the model and what becomes of it. Plain data, for any thread of this process. */
export interface ConvertJob {
  readonly kind: 'convert';
  readonly name: string;
  readonly split: SplitKind;
  /** Indexed by rank; the same shape in all. */
  readonly shards: readonly TorchTensor[];
  /** Of a checkpoint that is quantised, where the shards are weights that have them. */
  readonly scaleShards: readonly TorchTensor[] | null;
  /** Null: bits are kept. */
  readonly quantize: { readonly bits: QuantizedBits; readonly groups: number } | null;
  /** The tensor, or quantised weights and their scales. */
  readonly outputs: readonly OutputRange[];
}

/** A tensor that an earlier process has finished. */
export interface CheckJob {
  readonly kind: 'check';
  readonly name: string;
  readonly outputs: readonly OutputRange[];
}

export interface JobResult {
  /** Of each output, hexadecimal. */
  readonly sha256: readonly string[];
  readonly warnings: readonly string[];
}

export interface JobTools {
  readonly kernels: ImportKernels;
  readonly buffers: PieceBuffers;
  /** Called for every piece that was read. @throws whatever shall end the job */
  readonly onRead: (bytes: number) => void;
}

/** Pieces that the kernel fetches while one is computed with. */
const piecesAhead = 2;

/** The memory of one thread: about two and a half pieces. Rows are read, merged, quantised and written in pieces of as many rows as fit. */
export class PieceBuffers {
  readonly input: Buffer;
  readonly merged: Buffer;
  readonly quantized: Buffer;
  constructor(readonly pieceBytes: number) {
    this.input = Buffer.allocUnsafeSlow(pieceBytes);
    this.merged = Buffer.allocUnsafeSlow(pieceBytes);
    this.quantized = Buffer.allocUnsafeSlow(Math.ceil(pieceBytes / 2));
  }

  static bytesFor(pieceBytes: number): number {
    return 2.5 * pieceBytes;
  }
}

export function runJob(job: ConvertJob | CheckJob, tools: JobTools): JobResult {
  return job.kind === 'check' ? checkOutputs(job, tools) : convertTensor(job, tools);
}

/** Bytes that {@link runJob} reads. */
export function jobBytes(job: ConvertJob | CheckJob): number {
  if (job.kind === 'check') return job.outputs.reduce((sum, { bytes }) => sum + bytes, 0);
  return [...job.shards, ...(job.scaleShards ?? [])].reduce(
    (sum, { shape, itemBytes }) => sum + shape.reduce((a, b) => a * b, itemBytes),
    0,
  );
}

/** Bytes of a row of the whole tensor: a piece holds one at least. */
export function rowBytesOf({ split, shards }: ConvertJob): number {
  const [first] = shards;
  const { shape, itemBytes } = first!;
  return shape.slice(1).reduce((bytes, count) => bytes * count, itemBytes) * (split === 'columns' ? shards.length : 1);
}

function convertTensor(job: ConvertJob, tools: JobTools): JobResult {
  const [weight, scales] = job.outputs.map((range) => new OutputWriter(range, tools.kernels)) as [OutputWriter, OutputWriter?];
  const warnings = job.split === 'copied' ? differentCopies(job, tools) : [];
  let row = 0;
  const columns = rowBytesOf(job) / 2;
  for (const bytes of unsplitRows(job.split, job.shards, tools)) {
    if (job.quantize === null) {
      weight.write(bytes);
      continue;
    }
    const rows = bytes.length / 2 / columns;
    const qweight = tools.buffers.quantized.subarray(0, (rows * columns * job.quantize.bits) / 8);
    const scaleRows = new Uint16Array(rows * job.quantize.groups);
    tools.kernels.quantizeRows(
      asUint16(bytes),
      columns,
      { ...job.quantize, name: job.name, firstRow: row },
      { qweight, scales: scaleRows },
    );
    weight.write(qweight);
    scales!.write(new Uint8Array(scaleRows.buffer));
    row += rows;
  }
  // A rank's scales are a column: one number for each of its rows.
  if (job.scaleShards !== null) for (const bytes of unsplitRows(job.split, job.scaleShards, tools)) scales!.write(bytes);
  return { sha256: job.outputs.map((_, i) => [weight, scales][i]!.finish()), warnings };
}

/** Rows of the unsplit tensor in their order, in pieces of whole rows; a piece is valid until the next one. */
function* unsplitRows(split: SplitKind, shards: readonly TorchTensor[], { kernels, buffers, onRead }: JobTools): Generator<Buffer> {
  const readers = shards.map((shard) => new TensorReader(shard, kernels.crc32));
  const rows = shards[0]!.shape[0]!;
  const { rowBytes } = readers[0]!;
  const count = split === 'columns' ? shards.length : 1; // shards that a piece has rows of
  const step = Math.max(1, Math.floor(buffers.pieceBytes / (rowBytes * count)));
  const pieces = piecesOf(split, rows, { numRanks: shards.length, step });
  const fetch = ({ rank, begin, end }: RowSegment): void => {
    for (let i = 0; i < count; i++) {
      for (const { fd, offset, length } of readers[rank + i]!.extentsOf(begin, end)) kernels.hintRead(fd, offset, length);
    }
  };
  for (const [index, { rank, begin, end }] of pieces.entries()) {
    // The disk has work while this piece is computed with.
    for (const ahead of pieces.slice(index === 0 ? 1 : index + piecesAhead, index + piecesAhead + 1)) fetch(ahead);
    const bytes = (end - begin) * rowBytes;
    const parts = Array.from({ length: count }, (_, i) => buffers.input.subarray(i * bytes, (i + 1) * bytes));
    for (const [i, part] of parts.entries()) readers[rank + i]!.readRows(begin, end, part);
    onRead(bytes * count);
    if (count === 1) yield parts[0]!;
    else yield mergeColumnsInto(parts, end - begin, buffers.merged.subarray(0, bytes * count));
  }
  for (const reader of split === 'copied' ? readers.slice(0, 1) : readers) reader.finish();
}

function piecesOf(split: SplitKind, rows: number, { numRanks, step }: { numRanks: number; step: number }): RowSegment[] {
  const segments = split === 'rows' || split === 'glu-rows' ? unsplitRowOrder(split, rows, numRanks) : [{ rank: 0, begin: 0, end: rows }];
  return segments.flatMap(({ rank, begin, end }) =>
    Array.from({ length: Math.ceil((end - begin) / step) }, (_, i) => ({
      rank,
      begin: begin + i * step,
      end: Math.min(end, begin + (i + 1) * step),
    })),
  );
}

/** The first rank's copy is taken, as the original does; other bits in another rank mean that the files do not belong together. */
function differentCopies({ name, shards }: ConvertJob, { kernels, onRead }: JobTools): string[] {
  const read = (shard: TorchTensor): Buffer => {
    const reader = new TensorReader(shard, kernels.crc32);
    const rows = shard.shape[0]!;
    const bytes = Buffer.allocUnsafe(rows * reader.rowBytes);
    reader.readRows(0, rows, bytes);
    reader.finish();
    return bytes;
  };
  const first = read(shards[0]!);
  const warnings: string[] = [];
  for (let rank = 1; rank < shards.length; rank++) {
    const other = read(shards[rank]!);
    onRead(other.length);
    if (first.equals(other)) continue;
    warnings.push(`tensor ${name} differs between rank 0 and rank ${rank}; rank 0's is used. Do these files belong to one checkpoint?`);
  }
  return warnings;
}

function checkOutputs({ outputs }: CheckJob, { buffers, onRead }: JobTools): JobResult {
  const sha256 = outputs.map(({ fd, path, offset, bytes }) => {
    const hash = createHash('sha256');
    for (let done = 0; done < bytes;) {
      const count = readSync(fd, buffers.input, 0, Math.min(buffers.input.length, bytes - done), offset + done);
      if (count === 0) throw new CheckpointError(`${path} became shorter while it was read`);
      hash.update(buffers.input.subarray(0, count));
      onRead(count);
      done += count;
    }
    return hash.digest('hex');
  });
  return { sha256, warnings: [] };
}

/** Writes one tensor from its first byte to its last. */
class OutputWriter {
  private readonly hash: Hash = createHash('sha256');
  private done = 0;

  constructor(
    private readonly range: OutputRange,
    private readonly kernels: ImportKernels,
  ) {}

  write(bytes: Uint8Array): void {
    const { fd, path, name, offset } = this.range;
    if (this.done + bytes.length > this.range.bytes) throw new Error(`tensor ${name} gets more bytes than its shape has`);
    for (let written = 0; written < bytes.length;) {
      try {
        written += writeSync(fd, bytes, written, bytes.length - written, offset + this.done + written);
      } catch (error) {
        const { code } = error as NodeJS.ErrnoException;
        throw new ConfigError(
          code === 'ENOSPC'
            ? `the disk is full: ${path} could not be written; make room, and the same command goes on`
            : `${path} cannot be written (${code}); the same command goes on when it can`,
        );
      }
    }
    this.kernels.hintWritten(fd, offset + this.done, bytes.length);
    this.hash.update(bytes);
    this.done += bytes.length;
  }

  finish(): string {
    if (this.done !== this.range.bytes) throw new Error(`tensor ${this.range.name} has ${this.done} bytes of ${this.range.bytes}`);
    return this.hash.digest('hex');
  }
}

/** Pieces begin where buffers do, which is aligned. */
function asUint16(bytes: Uint8Array): Uint16Array {
  return new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.length / 2);
}
