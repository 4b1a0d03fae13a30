import { open, type FileHandle } from 'node:fs/promises';

/**
 * Takes a stream of bytes. One write is on its way while the next is being prepared: what was given to `write` has to stay as it is until
 * the following call has returned.
 */
export interface ByteSink {
  write(bytes: Uint8Array): Promise<void>;
}

/** A new file. */
export class FileSink implements ByteSink {
  private pending: Promise<void> = Promise.resolve();

  private constructor(private readonly handle: FileHandle) {}

  /** Fails where the file exists. */
  static async create(path: string): Promise<FileSink> {
    return new FileSink(await open(path, 'wx'));
  }

  async write(bytes: Uint8Array): Promise<void> {
    await this.pending;
    this.pending = this.handle.writeFile(bytes); // at the handle's position, all of it
    this.pending.catch(() => {}); // it is the next call that fails
  }

  /** Waits until everything is on disk. */
  async finish(): Promise<void> {
    await this.pending;
    await this.handle.sync();
    await this.handle.close();
  }

  /** For a file that is given up. */
  async abandon(): Promise<void> {
    await this.pending.catch(() => {});
    await this.handle.close().catch(() => {});
  }
}
