import { stat } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { basename, join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { packageRoot } from '../../common/package-root.js';
import { manifestFileName, readManifest, type StoreManifest } from './manifest.js';
import { openStore, type Store } from './open-store.js';

export interface VerifyOptions {
  /** Default: the machine's cores. */
  readonly threads?: number;
  readonly onProgress?: (progress: { readonly bytes: number; readonly totalBytes: number }) => void;
  readonly signal?: AbortSignal;
}

export interface VerifyReport {
  readonly dir: string;
  readonly hasManifest: boolean;
  /** All of the store. */
  readonly tensors: number;
  /** Read and compared with their recorded hash. */
  readonly comparedTensors: number;
  readonly comparedBytes: number;
  /** Nothing is recorded of them, so their values may be anything. */
  readonly unrecorded: readonly string[];
  readonly problems: readonly VerifyProblem[];
}

export interface VerifyProblem {
  /** Of a tensor, or of a file. */
  readonly name: string;
  readonly message: string;
}

/** What a thread hashes. */
export interface FileRange {
  readonly file: string;
  readonly offset: number;
  readonly bytes: number;
}

export type HashMessage =
  | { readonly kind: 'progress'; readonly bytes: number }
  | { readonly kind: 'hash'; readonly sha256: string }
  | { readonly kind: 'error'; readonly message: string };

interface Check extends FileRange {
  readonly name: string;
  readonly what: string;
  readonly sha256: string;
}

/**
 * Checks a store's structure, and reads everything that it has a hash of, several tensors at a time.
 * @returns what was compared, and what is wrong with the content
 * @throws CheckpointError for a store that does not open: see {@link openStore}
 */
export async function verifyStore(dir: string, options: VerifyOptions = {}): Promise<VerifyReport> {
  const store = await openStore(dir);
  const manifest = await readManifest(store.dir);
  const tensors = tensorChecks(store);
  const problems = manifest === null ? [] : differences(store, manifest);
  const files = manifest === null ? { checks: [], problems: [] } : await fileChecks(store.dir, manifest);
  problems.push(...files.problems);
  const checks = [...tensors, ...files.checks];
  problems.push(...(await compareAll(checks, options)));
  return {
    dir: store.dir,
    hasManifest: manifest !== null,
    tensors: store.tensors.length,
    comparedTensors: tensors.length,
    comparedBytes: checks.reduce((sum, { bytes }) => sum + bytes, 0),
    unrecorded: store.tensors.filter(({ sha256 }) => sha256 === null).map(({ name }) => name),
    problems,
  };
}

/** In the order of the files, so that a disk reads forwards. */
function tensorChecks({ tensors }: Store): Check[] {
  return tensors
    .flatMap((tensor) => (tensor.sha256 === null ? [] : [{ ...tensor, sha256: tensor.sha256 }]))
    .map(({ name, file, offset, bytes, sha256 }) => ({ name, what: `tensor ${name} in ${file}`, file, offset, bytes, sha256 }))
    .sort((a, b) => (a.file === b.file ? a.offset - b.offset : a.file < b.file ? -1 : 1));
}

/** Where manifest and store do not speak of the same tensors. */
function differences({ tensors }: Store, manifest: StoreManifest): VerifyProblem[] {
  const problems: VerifyProblem[] = [];
  const known = new Set<string>();
  for (const { name, file, bytes } of tensors) {
    known.add(name);
    const entry = manifest.tensors[name];
    if (entry === undefined) problems.push({ name, message: `tensor ${name} is not in ${manifestFileName}` });
    else if (entry.bytes !== bytes || entry.file !== basename(file)) {
      problems.push({
        name,
        message: `tensor ${name} has ${bytes} bytes in ${basename(file)}, ${manifestFileName} says ${entry.bytes} in ${entry.file}`,
      });
    }
  }
  for (const name of Object.keys(manifest.tensors)) {
    if (!known.has(name)) problems.push({ name, message: `tensor ${name} is in ${manifestFileName}, but not in the store` });
  }
  return problems;
}

async function fileChecks(dir: string, manifest: StoreManifest): Promise<{ checks: Check[]; problems: VerifyProblem[] }> {
  const checks: Check[] = [];
  const problems: VerifyProblem[] = [];
  for (const [name, { bytes, sha256 }] of Object.entries(manifest.files)) {
    const file = join(dir, name);
    const found = await stat(file).catch(() => null);
    if (found?.isFile() && found.size === bytes) checks.push({ name, what: `file ${file}`, file, offset: 0, bytes, sha256 });
    else if (found?.isFile()) problems.push({ name, message: `file ${file} has ${found.size} bytes, ${manifestFileName} says ${bytes}` });
    else problems.push({ name, message: `file ${file} is missing, ${manifestFileName} lists it` });
  }
  return { checks, problems };
}

async function compareAll(checks: readonly Check[], options: VerifyOptions): Promise<VerifyProblem[]> {
  const { threads = availableParallelism(), onProgress, signal } = options;
  const totalBytes = checks.reduce((sum, { bytes }) => sum + bytes, 0);
  let done = 0;
  const onBytes = (bytes: number): void => {
    signal?.throwIfAborted();
    done += bytes;
    onProgress?.({ bytes: done, totalBytes });
  };
  const problems: (VerifyProblem | null)[] = [];
  let next = 0;
  const work = async (): Promise<void> => {
    const thread = new HashThread();
    try {
      for (let i = next++; i < checks.length; i = next++) problems[i] = await compare(thread, checks[i]!, onBytes);
    } finally {
      await thread.close();
    }
  };
  await Promise.all(Array.from({ length: Math.min(threads, checks.length) }, work));
  return problems.filter((problem) => problem !== null);
}

async function compare(
  thread: HashThread,
  { name, what, file, offset, bytes, sha256 }: Check,
  onBytes: (bytes: number) => void,
): Promise<VerifyProblem | null> {
  const result = await thread.hash({ file, offset, bytes }, onBytes);
  if (result.kind === 'error') return { name, message: `${what} cannot be read: ${result.message}` };
  if (result.sha256 === sha256) return null;
  return { name, message: `${what} has SHA-256 ${result.sha256}, recorded is ${sha256}` };
}

type HashResult = Exclude<HashMessage, { kind: 'progress' }>;

/** Hashes one range after the other. */
class HashThread {
  private readonly thread = new Worker(script, { name: 'hash', execArgv: [] });
  private current: { onBytes: (bytes: number) => void; resolve: (result: HashResult) => void; reject: (error: Error) => void } | null =
    null;

  constructor() {
    this.thread.on('message', (message: HashMessage) => {
      if (message.kind === 'progress') this.current?.onBytes(message.bytes);
      else this.current?.resolve(message);
    });
    this.thread.on('error', (error) => this.current?.reject(error));
    this.thread.on('exit', (code) => this.current?.reject(new Error(`a hashing thread ended with status ${code}`)));
  }

  /** What `onBytes` throws fails the call. */
  hash(range: FileRange, onBytes: (bytes: number) => void): Promise<HashResult> {
    return new Promise((resolve, reject) => {
      const onBytesOrFail = (bytes: number): void => {
        try {
          onBytes(bytes);
        } catch (error) {
          reject(error);
        }
      };
      this.current = { onBytes: onBytesOrFail, resolve, reject };
      this.thread.postMessage(range);
    });
  }

  async close(): Promise<void> {
    this.current = null;
    await this.thread.terminate();
  }
}

/** Compiled, wherever this runs from: threads know nothing of TypeScript, which is what tests run. */
const script = join(packageRoot, 'dist', 'model', 'store', 'hash-thread.js');
