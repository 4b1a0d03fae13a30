import { createHash } from 'node:crypto';
import { constants, existsSync, readdirSync } from 'node:fs';
import { mkdir, open, realpath, rename, rm, type FileHandle } from 'node:fs/promises';
import { createServer, type Server } from 'node:net';
import { basename, dirname, join, resolve } from 'node:path';
import { z } from 'zod';
import { CheckpointError, ConfigError } from '../../common/errors.js';
import { putInPlace, refuseExisting, syncPath } from './new-folder.js';
import { readJsonFile, readTextFile } from './read-json-file.js';
import { planFiles, writeDescription, type PlannedFile, type PlannedTensor, type StoreDescription } from './store-files.js';

/** What a partial store is made of, so that nobody goes on with something else. Digests of any kind, with words for people. */
export interface Provenance {
  readonly source: { readonly digest: string; readonly label: string };
  readonly options: { readonly digest: string; readonly label: string };
}

/** Where a tensor's bytes go. */
export interface OutputRange {
  readonly name: string;
  readonly path: string;
  readonly fd: number;
  readonly offset: number;
  readonly bytes: number;
}

const dataFolder = 'store';
const provenanceFile = 'import.json';
const journalFile = 'journal.jsonl';

/**
 * A store that is made in a folder beside its target, tensors in any order, and goes on where it was when it was killed. The folder is
 * `.NAME.partial`; in it are `store/`, which is renamed to the target at the end, `import.json`, which says what is made of what, and a journal with
 * the SHA-256 of every tensor that is finished: written and synced. One process at a time can have it.
 */
export class PartialStore {
  private readonly ranges = new Map<string, OutputRange>();
  private readonly checksums: Record<string, string> = {};
  /** Finished, but not yet synced. */
  private pending: JournalEntry[] = [];
  private syncing: Promise<void> | null = null;
  private failure: { error: unknown } | null = null;

  private constructor(
    private readonly target: string,
    private readonly folder: string,
    private readonly files: readonly { planned: PlannedFile; handle: FileHandle }[],
    private readonly journal: FileHandle,
    private readonly lock: Server,
    /** SHA-256 of what the journal has: claims, that is, until the bytes are looked at. */
    readonly recorded: ReadonlyMap<string, string>,
  ) {
    for (const { planned, handle } of files) {
      const path = join(folder, dataFolder, planned.name);
      for (const { name, offset, bytes } of planned.tensors) this.ranges.set(name, { name, path, fd: handle.fd, offset, bytes });
    }
  }

  /**
   * Goes on with the folder that is there, or begins one.
   * @throws ConfigError where the target exists, the folder is of another import, or another process has it
   */
  static async open(target: string, tensors: readonly PlannedTensor[], provenance: Provenance): Promise<PartialStore> {
    const path = resolve(target);
    await refuseExisting(path);
    const folder = partialFolder(path);
    await mkdir(dirname(path), { recursive: true }).catch((error: NodeJS.ErrnoException) => {
      throw new ConfigError(`${dirname(path)} cannot be written to (${error.code}); choose another target`);
    });
    const lock = await takeLock(folder, path);
    const opened: FileHandle[] = [];
    try {
      if (existsSync(join(folder, provenanceFile))) await checkProvenance(folder, provenance);
      else await begin(folder, provenance);
      await mkdir(join(folder, dataFolder), { recursive: true });
      const files = [];
      for (const planned of planFiles(tensors)) {
        const handle = await open(join(folder, dataFolder, planned.name), constants.O_RDWR | constants.O_CREAT, 0o666);
        opened.push(handle);
        await handle.truncate(planned.bytes);
        await handle.write(planned.header, 0, planned.header.length, 0);
        files.push({ planned, handle });
      }
      await syncPath(join(folder, dataFolder));
      const recorded = await readJournal(join(folder, journalFile));
      const journal = await open(join(folder, journalFile), 'a');
      opened.push(journal);
      await journal.write('\n'); // ends a line that a kill cut off
      return new PartialStore(path, folder, files, journal, lock, recorded);
    } catch (error) {
      for (const handle of opened) await handle.close();
      await release(lock);
      throw error;
    }
  }

  /** Where to write a tensor; the file descriptor is this object's. */
  range(name: string): OutputRange {
    return this.ranges.get(name)!;
  }

  /** A tensor of the journal whose bytes were found to be what it says. */
  confirm(name: string): void {
    this.checksums[name] = this.recorded.get(name)!;
  }

  /** A tensor is written. It is in the journal when its bytes are on the disk, which is not waited for. */
  finish(tensors: readonly { readonly name: string; readonly sha256: string }[]): void {
    for (const { name, sha256 } of tensors) this.checksums[name] = sha256;
    this.pending.push(...tensors);
    this.syncing ??= this.syncPending().catch((error: unknown) => void (this.failure ??= { error }));
  }

  isDone(name: string): boolean {
    return this.checksums[name] !== undefined;
  }

  /** Number of tensors that were finished or confirmed. */
  get done(): number {
    return Object.keys(this.checksums).length;
  }

  /** Syncs what is finished and puts the store in its place. */
  async commit(description: StoreDescription): Promise<void> {
    for (const name of this.ranges.keys()) {
      if (this.checksums[name] === undefined) throw new Error(`tensor ${name} was never finished`);
    }
    await this.sync();
    for (const { handle } of this.files) await handle.sync();
    const data = join(this.folder, dataFolder);
    await writeDescription(
      data,
      this.files.map(({ planned }) => planned),
      this.checksums,
      description,
    );
    await putInPlace(data, this.target);
  }

  /** Keeps the folder for another time, or removes it where it holds nothing that is finished, or the store is in its place. */
  async close(): Promise<void> {
    await this.sync().catch(() => {}); // whoever closes has another error to report, or called commit, which reported it
    for (const { handle } of this.files) await handle.close();
    await this.journal.close();
    const isWorthKeeping = this.done > 0 || this.recorded.size > 0;
    if (!isWorthKeeping || !existsSync(join(this.folder, dataFolder))) {
      await rm(join(this.folder, journalFile)); // before import.json, by which a committed store is known
      await rm(this.folder, { recursive: true, force: true });
    }
    await release(this.lock);
  }

  private async sync(): Promise<void> {
    await this.syncing;
    if (this.failure !== null) throw this.failure.error;
  }

  private async syncPending(): Promise<void> {
    while (this.pending.length > 0) {
      const entries = this.pending;
      this.pending = [];
      const fds = new Set(entries.map(({ name }) => this.range(name).fd));
      for (const { handle } of this.files) if (fds.has(handle.fd)) await handle.datasync();
      await this.journal.write(entries.map((entry) => `${JSON.stringify(entry)}\n`).join(''));
      await this.journal.datasync();
    }
    this.syncing = null;
  }
}

/** The folder in which the store at `target` is made. */
export function partialFolder(target: string): string {
  const path = resolve(target);
  return join(dirname(path), `.${basename(path)}.partial`);
}

/** Removes an unfinished store, or what a kill left after the last step of a finished one. @throws ConfigError where a process has it */
export async function removePartial(target: string): Promise<void> {
  const folder = partialFolder(target);
  if (!existsSync(folder)) return;
  const lock = await takeLock(folder, resolve(target));
  await rm(folder, { recursive: true, force: true });
  await release(lock);
}

/** Whether a kill came after the store was put in its place and before its folder was removed. */
export function isCommitted(target: string): boolean {
  const folder = partialFolder(target);
  return (
    existsSync(join(folder, provenanceFile)) &&
    !existsSync(join(folder, dataFolder)) &&
    existsSync(target) &&
    readdirSync(target).length > 0
  );
}

/** @throws ConfigError names what is different */
export async function checkProvenance(folder: string, { source, options }: Provenance): Promise<void> {
  const path = join(folder, provenanceFile);
  const parsed = provenanceJson.safeParse(await readJsonFile(path, 2 ** 20));
  if (!parsed.success) throw new CheckpointError(`${path} is damaged; give --restart to throw away what is there and begin again`);
  const there = parsed.data;
  const end = 'go on with the same command, or give --restart to throw away what is there';
  if (there.source.digest !== source.digest) {
    throw new ConfigError(`${folder} is an unfinished import of ${there.source.label}, and ${source.label} holds something else: ${end}`);
  }
  if (there.options.digest !== options.digest) {
    throw new ConfigError(`${folder} is an unfinished import with ${there.options.label}, this one would be with ${options.label}: ${end}`);
  }
}

const part = z.object({ digest: z.string(), label: z.string() });
const provenanceJson = z.object({ source: part, options: part });
const journalEntry = z.object({ name: z.string(), sha256: z.string().regex(/^[0-9a-f]{64}$/) });
type JournalEntry = z.infer<typeof journalEntry>;

async function begin(folder: string, provenance: Provenance): Promise<void> {
  await rm(folder, { recursive: true, force: true }); // killed before it had said what it is
  await mkdir(join(folder, dataFolder), { recursive: true });
  const temporary = join(folder, `${provenanceFile}.new`);
  const handle = await open(temporary, 'w');
  await handle.writeFile(`${JSON.stringify(provenance)}\n`);
  await handle.sync();
  await handle.close();
  await rename(temporary, join(folder, provenanceFile));
  await syncPath(folder);
}

/** Lines that a kill cut off, or that are none of the journal's, count for nothing: their tensors are made again. */
async function readJournal(path: string): Promise<Map<string, string>> {
  const recorded = new Map<string, string>();
  if (!existsSync(path)) return recorded;
  for (const line of (await readTextFile(path, 64 * 2 ** 20)).split('\n')) {
    const entry = journalEntry.safeParse(parseLine(line));
    if (entry.success) recorded.set(entry.data.name, entry.data.sha256);
  }
  return recorded;
}

function parseLine(line: string): unknown {
  try {
    return JSON.parse(line);
  } catch {
    return null;
  }
}

/** An abstract socket of the kernel's: it goes with its process, however that ends, so no lock is ever stale. */
async function takeLock(folder: string, target: string): Promise<Server> {
  const name = createHash('sha256')
    .update(join(await realpath(dirname(folder)), basename(folder)))
    .digest('hex');
  const server = createServer();
  server.unref();
  await new Promise<void>((done, fail) => {
    server.once('error', fail);
    server.listen(`\0tandem-import-${name.slice(0, 40)}`, done);
  }).catch((error: NodeJS.ErrnoException) => {
    throw error.code === 'EADDRINUSE' ? new ConfigError(`another import writes ${target} at the moment; wait for it, or stop it`) : error;
  });
  return server;
}

async function release(lock: Server): Promise<void> {
  await new Promise((done) => lock.close(done));
}
