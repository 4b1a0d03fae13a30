import type { SplitKind } from '../store/glm-tensors.js';

/** Rows [begin, end) of one rank's shard. */
export interface RowSegment {
  readonly rank: number;
  readonly begin: number;
  readonly end: number;
}

/**
 * Where the rows of an unsplit tensor come from, in their order, for `rows` and `glu-rows`: every rank's block one after the other, or every
 * rank's first half and then every rank's second half (model-spec section 1.2).
 * @param shardRows rows of one rank's shard; even for `glu-rows`
 */
export function unsplitRowOrder(kind: 'rows' | 'glu-rows', shardRows: number, numRanks: number): RowSegment[] {
  const borders = kind === 'rows' ? [0, shardRows] : [0, shardRows / 2, shardRows];
  const segments: RowSegment[] = [];
  for (let part = 0; part + 1 < borders.length; part++) {
    for (let rank = 0; rank < numRanks; rank++) segments.push({ rank, begin: borders[part]!, end: borders[part + 1]! });
  }
  return segments;
}

/** Shape of one rank's shard. @returns null where `numRanks` does not divide the dimension that is split */
export function shardShape(kind: SplitKind, shape: readonly number[], numRanks: number): number[] | null {
  const axis = kind === 'columns' ? 1 : 0;
  if (kind === 'copied') return [...shape];
  const parts = kind === 'glu-rows' ? 2 * numRanks : numRanks;
  if (shape[axis]! % parts !== 0) return null;
  return shape.map((count, i) => (i === axis ? count / numRanks : count));
}

/**
 * Joins the same rows of every rank's columns.
 * @param shards for each rank `rows` dense rows of equal length
 * @returns dense rows, each the ranks' rows one after the other
 */
export function mergeColumns(shards: readonly Uint8Array[], rows: number): Uint8Array {
  const [only] = shards;
  if (only !== undefined && shards.length === 1) return only;
  return mergeColumnsInto(shards, rows, new Uint8Array(shards.reduce((sum, { length }) => sum + length, 0)));
}

/** {@link mergeColumns} into `whole`, which has as many bytes as all shards. @returns `whole` */
export function mergeColumnsInto<Bytes extends Uint8Array>(shards: readonly Uint8Array[], rows: number, whole: Bytes): Bytes {
  const rowBytes = rows === 0 ? 0 : whole.length / rows;
  const shardRowBytes = rowBytes / shards.length;
  for (const [rank, shard] of shards.entries()) {
    for (let row = 0; row < rows; row++) {
      whole.set(shard.subarray(row * shardRowBytes, (row + 1) * shardRowBytes), row * rowBytes + rank * shardRowBytes);
    }
  }
  return whole;
}

/** Cuts `rows` dense rows into equal runs of columns, one for each rank: the reverse of {@link mergeColumns}. */
export function splitColumns(whole: Uint8Array, rows: number, numRanks: number): Uint8Array[] {
  const rowBytes = rows === 0 ? 0 : whole.length / rows;
  const shardRowBytes = rowBytes / numRanks;
  return Array.from({ length: numRanks }, (_, rank) => {
    const shard = new Uint8Array(rows * shardRowBytes);
    for (let row = 0; row < rows; row++) {
      const begin = row * rowBytes + rank * shardRowBytes;
      shard.set(whole.subarray(begin, begin + shardRowBytes), row * shardRowBytes);
    }
    return shard;
  });
}

/**
 * All ranks' shards of one tensor, made whole. Copied tensors are the first rank's.
 * @param rows rows of one shard; the elements of a row may have any size
 */
export function mergeTensor(kind: SplitKind, shards: readonly Uint8Array[], rows: number): Uint8Array {
  if (kind === 'copied') return shards[0]!;
  if (kind === 'columns') return mergeColumns(shards, rows);
  const rowBytes = rows === 0 ? 0 : shards[0]!.length / rows;
  const pieces = unsplitRowOrder(kind, rows, shards.length).map(({ rank, begin, end }) =>
    shards[rank]!.subarray(begin * rowBytes, end * rowBytes),
  );
  return Buffer.concat(pieces);
}

/** One tensor's shards for `numRanks` ranks: the reverse of {@link mergeTensor}. `rows` are the whole tensor's. */
export function splitTensor(kind: SplitKind, whole: Uint8Array, rows: number, numRanks: number): Uint8Array[] {
  if (kind === 'copied') return Array.from({ length: numRanks }, () => whole);
  if (kind === 'columns') return splitColumns(whole, rows, numRanks);
  const rowBytes = rows === 0 ? 0 : whole.length / rows;
  const shards: Uint8Array[][] = Array.from({ length: numRanks }, () => []);
  let row = 0;
  for (const { rank, begin, end } of unsplitRowOrder(kind, rows / numRanks, numRanks)) {
    shards[rank]!.push(whole.subarray(row * rowBytes, (row + end - begin) * rowBytes));
    row += end - begin;
  }
  return shards.map((pieces) => Buffer.concat(pieces));
}
