import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';
import { basename } from 'node:path';
import { CheckpointError } from '../../common/errors.js';

/** Bytes of one open file. */
export interface Extent {
  readonly fd: number;
  readonly path: string;
  readonly offset: number;
  readonly length: number;
}

/** What a {@link ByteSource} is made of: data that can be sent to another thread, which has the same file descriptors. */
export interface ByteRange {
  /** What to call it in an error. */
  readonly label: string;
  readonly extents: readonly Extent[];
}

/** Random access to bytes that lie in one file, or in several as if they were one. Reads wait: indexes are small, and data is read by threads. */
export class ByteSource implements ByteRange {
  readonly label: string;
  readonly extents: readonly Extent[];
  readonly size: number;

  constructor({ label, extents }: ByteRange) {
    this.label = label;
    this.extents = extents;
    this.size = extents.reduce((sum, { length }) => sum + length, 0);
  }

  /** Opens whole files, one after the other. {@link close} closes them. @throws CheckpointError where one is no regular file */
  static open(paths: readonly string[], label = paths[0]!): ByteSource {
    const extents: Extent[] = [];
    try {
      for (const path of paths) extents.push(openFile(path));
    } catch (error) {
      for (const { fd } of extents) closeSync(fd);
      throw error;
    }
    return new ByteSource({ label, extents });
  }

  /** Closes the files, also under all sections. */
  close(): void {
    for (const fd of new Set(this.extents.map((extent) => extent.fd))) closeSync(fd);
  }

  /** Bytes [begin, begin + length) as a source of its own. @throws CheckpointError where they do not lie in this one */
  section(label: string, begin: number, length: number): ByteSource {
    this.check(begin, length);
    return new ByteSource({ label, extents: this.extentsOf(begin, length) });
  }

  /** Reads exactly `length` bytes. @throws CheckpointError where they are not there or cannot be read */
  read(begin: number, length: number): Buffer {
    this.check(begin, length);
    const buffer = Buffer.allocUnsafe(length);
    this.readInto(buffer, begin);
    return buffer;
  }

  /** Fills `buffer` with the bytes from `begin` on. @throws CheckpointError */
  readInto(buffer: Uint8Array, begin: number): void {
    this.check(begin, buffer.length);
    let done = 0;
    for (const { fd, path, offset, length } of this.extentsOf(begin, buffer.length)) {
      for (const end = done + length; done < end;) {
        const position = offset + length - (end - done);
        const count = readSome({ fd, path }, buffer.subarray(done, end), position);
        if (count === 0) throw new CheckpointError(`${path} became shorter while it was read`);
        done += count;
      }
    }
  }

  /** Where bytes lie, in order. */
  extentsOf(begin: number, length: number): Extent[] {
    const found: Extent[] = [];
    let start = 0;
    for (const extent of this.extents) {
      const from = Math.max(begin, start);
      const to = Math.min(begin + length, start + extent.length);
      if (from < to) found.push({ ...extent, offset: extent.offset + from - start, length: to - from });
      start += extent.length;
    }
    return found;
  }

  private check(begin: number, length: number): void {
    if (begin >= 0 && length >= 0 && begin + length <= this.size) return;
    throw new CheckpointError(
      `${this.label} has ${this.size} bytes, but bytes ${begin} to ${begin + length} are needed: the file is truncated or damaged`,
    );
  }
}

/** The files that bytes lie in, for an error: `/data/part_06 or part_07`. */
export function namesOf(extents: readonly Extent[]): string {
  return [...new Set(extents.map(({ path }) => path))].map((path, i) => (i === 0 ? path : basename(path))).join(' or ');
}

function openFile(path: string): Extent {
  let fd: number;
  try {
    fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK); // a FIFO would block
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    throw new CheckpointError(code === 'ENOENT' ? `${path} does not exist` : `${path} cannot be opened (${code})`);
  }
  const stat = fstatSync(fd);
  if (stat.isFile()) return { fd, path, offset: 0, length: stat.size };
  closeSync(fd);
  throw new CheckpointError(`${path} is not a regular file`);
}

function readSome({ fd, path }: { fd: number; path: string }, into: Uint8Array, position: number): number {
  try {
    return readSync(fd, into, 0, Math.min(into.length, 2 ** 30), position); // one call moves at most 2 GiB on Linux
  } catch (error) {
    throw new CheckpointError(`${path} cannot be read at byte ${position} (${(error as NodeJS.ErrnoException).code})`);
  }
}
