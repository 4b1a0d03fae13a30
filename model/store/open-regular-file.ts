import { constants } from 'node:fs';
import { open, type FileHandle } from 'node:fs/promises';
import { CheckpointError } from '../../common/errors.js';

export interface OpenFile {
  readonly handle: FileHandle;
  readonly size: number;
}

/**
 * Opens a regular file for reading. A FIFO or a device, which would block or never end, is refused.
 * @returns the handle, which the caller closes, and the size in bytes
 * @throws CheckpointError where it cannot be opened
 */
export async function openRegularFile(path: string): Promise<OpenFile> {
  const handle = await open(path, constants.O_RDONLY | constants.O_NONBLOCK).catch((error: NodeJS.ErrnoException) => {
    throw new CheckpointError(error.code === 'ENOENT' ? `${path} does not exist` : `${path} cannot be opened (${error.code})`);
  });
  const stat = await handle.stat();
  if (stat.isFile()) return { handle, size: stat.size };
  await handle.close();
  throw new CheckpointError(`${path} is not a regular file`);
}

/** Reads exactly `length` bytes at `offset`. @throws CheckpointError where the file ends before or cannot be read */
export async function readExactly(file: OpenFile, offset: number, length: number, path: string): Promise<Buffer> {
  if (!(offset >= 0 && length >= 0 && offset + length <= file.size)) {
    throw new CheckpointError(
      `${path} has ${file.size} bytes, but bytes ${offset} to ${offset + length} are needed: the file is truncated or damaged`,
    );
  }
  const buffer = Buffer.allocUnsafe(length);
  // One read call moves at most 2 GiB on Linux, so the loop is needed even for regular files.
  for (let done = 0; done < length;) {
    const { bytesRead } = await file.handle.read(buffer, done, Math.min(length - done, 2 ** 30), offset + done);
    if (bytesRead === 0) throw new CheckpointError(`${path} became shorter while it was read`);
    done += bytesRead;
  }
  return buffer;
}
