import { join } from 'node:path';
import { type ResourceLimits, Worker } from 'node:worker_threads';
import { CancelledError, EngineError, NotReadyError, QueueFullError, TandemError } from '../../common/errors.js';
import type { Logger } from '../../common/log.js';
import { packageRoot } from '../../common/package-root.js';
import type { TokenizerConfig } from '../model-config.js';
import type { Tokenizer } from './tokenizer.js';

export interface TextToEncode {
  readonly text: string;
  /** Mask words become their tokens (`encodePrompt`). False: they are ordinary text (`encode`). */
  readonly asPrompt: boolean;
  /** Of `encode`; prompts always have it. */
  readonly dummyPrefix: boolean;
}

export interface EncoderThreadData {
  readonly path: string;
  readonly config: TokenizerConfig;
}

export interface ThreadedEncoderOptions extends EncoderThreadData {
  /** Loaded from the same path: encodes short texts. */
  readonly tokenizer: Tokenizer;
  readonly log: Logger;
  /** UTF-8 bytes of the texts that may wait for those before them. */
  readonly maxWaitingBytes?: number;
  readonly startThread?: (data: EncoderThreadData) => Worker;
}

/**
 * Encoding takes 0.2 ms for each 1000 characters (1 ms where no pieces fit), the way to the thread and back 0.05 ms, half of that on the
 * event loop. Well above where that pays: below this a text is a short hold-up at worst, and need not wait behind long ones.
 */
export const LONG_TEXT_CHARACTERS = 2048;

/** Texts that take so long together that nothing else should wait for them. */
export function areLong(texts: readonly TextToEncode[]): boolean {
  return texts.reduce((sum, { text }) => sum + text.length, 0) >= LONG_TEXT_CHARACTERS;
}

export function encodeText(tokenizer: Tokenizer, { text, asPrompt, dummyPrefix }: TextToEncode): number[] {
  return asPrompt ? tokenizer.encodePrompt(text) : tokenizer.encode(text, { dummyPrefix });
}

const DEFAULT_MAX_WAITING_BYTES = 8 * 2 ** 20;
/** About a second for each MiB. */
const WAITING_BYTES_PER_MS = 1024;

interface Job {
  readonly texts: readonly TextToEncode[];
  readonly bytes: number;
  readonly resolve: (ids: number[][]) => void;
  readonly reject: (error: TandemError) => void;
}

/**
 * Encodes long texts in a thread, first come, first served, so that the event loop goes on meanwhile. The thread is started by the first
 * long text and again by the next one after it died; it keeps no process alive.
 */
export class ThreadedEncoder {
  private thread: Worker | null = null;
  private running: Job | null = null;
  private waiting: Job[] = [];
  private closing: Promise<void> | null = null;

  constructor(private readonly options: ThreadedEncoderOptions) {}

  /**
   * Ids of each text. Short texts are encoded before this returns, and never wait for long ones.
   *
   * @param signal gives up: texts that wait leave the queue, those under way are encoded for nobody
   * @throws QueueFullError too much waits already
   * @throws EngineError the thread died over these texts
   * @throws CancelledError, or the signal's reason if that is a TandemError
   * @throws NotReadyError long texts, closed
   */
  async encode(texts: readonly TextToEncode[], signal?: AbortSignal): Promise<number[][]> {
    if (signal?.aborted) throw cancelled(signal);
    if (!areLong(texts)) return texts.map((text) => encodeText(this.options.tokenizer, text));
    if (this.closing) throw closed();
    const bytes = texts.reduce((sum, { text }) => sum + Buffer.byteLength(text), 0);
    this.checkRoom(bytes);
    let cancel = (): void => {};
    try {
      return await new Promise<number[][]>((resolve, reject) => {
        const job = { texts, bytes, resolve, reject };
        cancel = () => {
          this.waiting = this.waiting.filter((other) => other !== job);
          reject(cancelled(signal!));
        };
        signal?.addEventListener('abort', cancel);
        this.waiting.push(job);
        this.runNext();
      });
    } finally {
      signal?.removeEventListener('abort', cancel);
    }
  }

  /** Fails what waits or runs. */
  close(): Promise<void> {
    return (this.closing ??= (async () => {
      for (const job of [...(this.running ? [this.running] : []), ...this.waiting]) job.reject(closed());
      this.waiting = [];
      await this.thread?.terminate();
    })());
  }

  /** Whatever its length, one may wait alone: how long texts may be is decided elsewhere. */
  private checkRoom(bytes: number): void {
    const { maxWaitingBytes = DEFAULT_MAX_WAITING_BYTES } = this.options;
    const waitingBytes = this.waiting.reduce((sum, job) => sum + job.bytes, 0);
    if (waitingBytes > 0 && waitingBytes + bytes > maxWaitingBytes) {
      throw new QueueFullError(
        `${waitingBytes} bytes of text wait to be encoded, with these ${bytes} it would be more than ${maxWaitingBytes}: try again later`,
        Math.ceil(waitingBytes / WAITING_BYTES_PER_MS),
      );
    }
  }

  private runNext(): void {
    if (this.running) return;
    this.running = this.waiting.shift() ?? null;
    if (!this.running) return;
    try {
      this.thread ??= this.start();
      this.thread.postMessage(this.running.texts);
    } catch (error) {
      this.died(error);
    }
  }

  private start(): Worker {
    const { path, config, startThread = startEncoderThread } = this.options;
    const thread = startThread({ path, config });
    let cause: unknown = null;
    thread.on('message', (ids: readonly Uint32Array[]) => {
      this.running?.resolve(ids.map(toArray));
      this.running = null;
      this.runNext();
    });
    thread.on('error', (error) => (cause = error));
    thread.on('exit', (code) => {
      this.thread = null;
      this.died(cause ?? new Error(`exit code ${code}`));
    });
    thread.unref(); // at last: a listener for messages takes it back
    return thread;
  }

  private died(cause: unknown): void {
    if (!this.closing) this.options.log.error({ err: cause }, 'the thread that encodes long texts died; the next one starts a new thread');
    this.running?.reject(new EngineError('the thread that encodes long texts died over this one: send it again, or in smaller parts'));
    this.running = null;
    this.runNext();
  }
}

/** Starts the compiled script, wherever this runs from: threads know nothing of TypeScript, which is what tests run. */
export function startEncoderThread(workerData: EncoderThreadData, resourceLimits: ResourceLimits = {}): Worker {
  const script = join(packageRoot, 'dist', 'model', 'tokenizer', 'encoder-thread.js');
  // Flags of the process (--input-type, loaders) are not meant for this script, and some would keep it from running.
  return new Worker(script, { workerData, resourceLimits, name: 'encoder', execArgv: [] });
}

/** A loop: Array.from takes five times as long, 40 ms for the million ids that a MiB can have, and this runs on the event loop. */
function toArray(ids: Uint32Array): number[] {
  const array = new Array<number>(ids.length);
  for (let i = 0; i < ids.length; i++) array[i] = ids[i]!;
  return array;
}

function cancelled(signal: AbortSignal): TandemError {
  return signal.reason instanceof TandemError ? signal.reason : new CancelledError('the request was cancelled while its text was encoded');
}

function closed(): NotReadyError {
  return new NotReadyError('the server is shutting down');
}
