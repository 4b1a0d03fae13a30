import { createHash, type Hash } from 'node:crypto';
import { open, type FileHandle } from 'node:fs/promises';
import { join } from 'node:path';
import { NewFolder } from './new-folder.js';
import { planFiles, writeDescription, type PlannedFile, type PlannedTensor, type StoreDescription } from './store-files.js';

export type { PlannedTensor, StoreDescription } from './store-files.js';

/**
 * Writes a store into a temporary folder beside the target and renames it there at the end, synced to disk: the target is either absent or
 * complete. What is to be written is known up front, so every header precedes its data and tensors stream through.
 */
export class StoreWriter {
  private readonly checksums: Record<string, string> = {};
  private readonly queue: { name: string; bytes: number; file: PlannedFile }[];
  private open: { file: PlannedFile; handle: FileHandle } | null = null;
  private current: { bytesLeft: number; hash: Hash } | null = null;

  private constructor(
    private readonly folder: NewFolder,
    private readonly files: readonly PlannedFile[],
  ) {
    this.queue = files.flatMap((file) => file.tensors.map((tensor) => ({ ...tensor, file })));
  }

  /** @throws ConfigError where the target exists and is not an empty folder, or cannot be created */
  static async create(target: string, tensors: readonly PlannedTensor[], shardBytes?: number): Promise<StoreWriter> {
    return new StoreWriter(await NewFolder.create(target), planFiles(tensors, shardBytes));
  }

  /** Appends bytes to the tensor `name`; tensors come in the planned order, each in any number of pieces. */
  async append(name: string, bytes: Uint8Array): Promise<void> {
    const next = this.queue[0];
    if (next?.name !== name) throw new Error(`tensor ${name} is written where ${next?.name ?? 'nothing'} is due`);
    this.current ??= { bytesLeft: next.bytes, hash: createHash('sha256') };
    if (bytes.length > this.current.bytesLeft) throw new Error(`tensor ${name} gets more bytes than its shape has`);
    const handle = await this.openFile(next.file);
    await handle.writeFile(bytes); // at the handle's position, all of it
    this.current.hash.update(bytes);
    this.current.bytesLeft -= bytes.length;
    if (this.current.bytesLeft > 0) return;
    this.checksums[name] = this.current.hash.digest('hex');
    this.current = null;
    this.queue.shift();
  }

  /** Writes configuration, index and manifest, and puts the store in its place. */
  async commit(description: StoreDescription): Promise<void> {
    if (this.queue.length > 0) throw new Error(`tensor ${this.queue[0]!.name} was never written`);
    await this.closeFile();
    await writeDescription(this.folder.path, this.files, this.checksums, description);
    await this.folder.commit();
  }

  /** Removes what was written. After {@link commit} there is nothing to remove. */
  async dispose(): Promise<void> {
    await this.open?.handle.close();
    this.open = null;
    await this.folder.dispose();
  }

  private async openFile(file: PlannedFile): Promise<FileHandle> {
    if (this.open?.file === file) return this.open.handle;
    await this.closeFile();
    const handle = await open(join(this.folder.path, file.name), 'wx');
    this.open = { file, handle };
    await handle.writeFile(file.header);
    return handle;
  }

  private async closeFile(): Promise<void> {
    if (this.open === null) return;
    await this.open.handle.sync();
    await this.open.handle.close();
    this.open = null;
  }
}
