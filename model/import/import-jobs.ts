import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { setImmediate } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import { CheckpointError, ConfigError } from '../../common/errors.js';
import { packageRoot } from '../../common/package-root.js';
import { jobBytes, PieceBuffers, runJob, type CheckJob, type ConvertJob, type JobResult } from './convert-tensor.js';
import { loadImportKernels } from './import-kernels.js';

/** Who does the work, and with how much memory. */
export interface Workers {
  /** 0: the calling thread. */
  readonly threads: number;
  readonly pieceBytes: number;
  /** What the process will need in all, roughly. */
  readonly memoryBytes: number;
}

export interface JobProgress {
  /** Job that ended last; empty: none yet. */
  readonly name: string;
  readonly bytes: number;
  readonly totalBytes: number;
}

export interface ImportThreadData {
  readonly pieceBytes: number;
  /** Bytes that all threads have read; and 1 where they shall end. */
  readonly counters: BigInt64Array;
}

/** What a thread answers. */
export type ThreadAnswer =
  | { readonly result: JobResult }
  | { readonly error: { readonly isCheckpoint: boolean; readonly message: string } }
  | { readonly stopped: true };

// Measured (bench/import.ts): a process with its index read, and a thread without its buffers.
const processBytes = 160 * 2 ** 20;
const threadBytes = 32 * 2 ** 20;
/** Rows are read, merged and quantised while they are in the caches; larger reads gain nothing. */
const usualPieceBytes = 4 * 2 ** 20;
const minPieceBytes = 2 ** 20;
const progressEveryMs = 100;

/**
 * A thread for each core, and one more for those that wait for the disk: the kernel fetches what they read next. More would only take time from
 * the largest tensor, which is one thread's. As much memory as that takes; fewer threads where the limit is lower.
 * @throws ConfigError where the limit is too low for one thread
 */
export function chooseWorkers(options: { memoryLimit: number; threads: number | null; largestRowBytes: number }): Workers {
  const wanted = options.threads ?? availableParallelism() + 1;
  const smallest = Math.max(minPieceBytes, options.largestRowBytes);
  const perThread = (pieceBytes: number): number => threadBytes + PieceBuffers.bytesFor(pieceBytes);
  const room = options.memoryLimit - processBytes;
  if (room < perThread(smallest)) {
    throw new ConfigError(
      `a memory limit of ${mebibytes(options.memoryLimit)} is too low: a single thread for this model needs ${mebibytes(processBytes + perThread(smallest))}`,
    );
  }
  const usual = Math.max(smallest, usualPieceBytes);
  const pieceBytes = room >= Math.max(1, wanted) * perThread(usual) ? usual : smallest;
  const threads = Math.min(wanted, Math.floor(room / perThread(pieceBytes)));
  return { threads, pieceBytes, memoryBytes: processBytes + Math.max(1, threads) * perThread(pieceBytes) };
}

function mebibytes(bytes: number): string {
  return `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

/**
 * Runs jobs in their order, as many at once as there are threads.
 * @returns the warnings of all
 * @throws the first job's error, or the signal's reason, when no job runs any more
 */
export async function runJobs<Job extends ConvertJob | CheckJob>(
  jobs: readonly Job[],
  { workers, signal }: { readonly workers: Workers; readonly signal?: AbortSignal },
  { onResult, onBytes }: { readonly onResult: (job: Job, result: JobResult) => void; readonly onBytes: (progress: JobProgress) => void },
): Promise<string[]> {
  const warnings: string[] = [];
  const totalBytes = jobs.reduce((sum, job) => sum + jobBytes(job), 0);
  let name = '';
  const finish = (job: Job, result: JobResult, bytes: number): void => {
    warnings.push(...result.warnings);
    onResult(job, result);
    name = job.name;
    onBytes({ name, bytes, totalBytes });
  };
  const report = (bytes: number): void => onBytes({ name, bytes, totalBytes });
  signal?.throwIfAborted();
  if (jobs.length > 0) {
    if (workers.threads === 0) await runHere(jobs, workers, { finish, signal });
    else await runInThreads(jobs, workers, { finish, report, signal });
  }
  return warnings;
}

async function runHere<Job extends ConvertJob | CheckJob>(
  jobs: readonly Job[],
  { pieceBytes }: Workers,
  { finish, signal }: { finish: (job: Job, result: JobResult, bytes: number) => void; signal: AbortSignal | undefined },
): Promise<void> {
  let bytes = 0;
  const onRead = (count: number): void => void (bytes += count);
  const tools = { kernels: loadImportKernels(), buffers: new PieceBuffers(pieceBytes), onRead };
  for (const job of jobs) {
    finish(job, runJob(job, tools), bytes);
    await setImmediate(); // signals come in between
    signal?.throwIfAborted();
  }
}

async function runInThreads<Job extends ConvertJob | CheckJob>(
  jobs: readonly Job[],
  { threads, pieceBytes }: Workers,
  {
    finish,
    report,
    signal,
  }: {
    finish: (job: Job, result: JobResult, bytes: number) => void;
    report: (bytes: number) => void;
    signal: AbortSignal | undefined;
  },
): Promise<void> {
  const counters = new BigInt64Array(new SharedArrayBuffer(16));
  const bytes = (): number => Number(Atomics.load(counters, 0));
  const stop = (): void => void Atomics.store(counters, 1, 1n);
  const queue = [...jobs];
  let failure: { error: unknown } | null = null;
  const fail = (error: unknown): void => {
    failure ??= { error };
    stop();
  };
  const onAbort = (): void => fail(signal!.reason);
  signal?.addEventListener('abort', onAbort);
  const timer = setInterval(() => report(bytes()), progressEveryMs);
  const work = async (): Promise<void> => {
    const thread = new ImportThread({ pieceBytes, counters });
    try {
      for (let job = queue.shift(); job !== undefined && failure === null; job = queue.shift()) {
        const result = await thread.run(job);
        if (result !== null) finish(job, result, bytes());
      }
    } catch (error) {
      fail(error);
    } finally {
      await thread.close();
    }
  };
  await Promise.all(Array.from({ length: Math.min(threads, jobs.length) }, work));
  clearInterval(timer);
  signal?.removeEventListener('abort', onAbort);
  if (failure !== null) throw (failure as { error: unknown }).error;
}

/** A thread that runs one job at a time. */
class ImportThread {
  private readonly thread: Worker;
  private settle: { resolve: (result: JobResult | null) => void; reject: (error: unknown) => void } | null = null;

  constructor(workerData: ImportThreadData) {
    // The compiled script, wherever this runs from: threads know nothing of TypeScript, which is what tests run.
    const script = join(packageRoot, 'dist', 'model', 'import', 'import-thread.js');
    this.thread = new Worker(script, { workerData, name: 'import', execArgv: [] });
    this.thread.on('message', (answer: ThreadAnswer) => {
      if ('error' in answer)
        this.settle?.reject(answer.error.isCheckpoint ? new CheckpointError(answer.error.message) : new ConfigError(answer.error.message));
      else this.settle?.resolve('result' in answer ? answer.result : null);
    });
    this.thread.on('error', (error) => this.settle?.reject(error));
    this.thread.on('exit', (code) => this.settle?.reject(new Error(`a thread of the import ended with code ${code}`)));
  }

  /** @returns null where it was stopped */
  async run(job: ConvertJob | CheckJob): Promise<JobResult | null> {
    return new Promise((resolve, reject) => {
      this.settle = { resolve, reject };
      this.thread.postMessage(job);
    });
  }

  async close(): Promise<void> {
    this.settle = null;
    await this.thread.terminate();
  }
}
