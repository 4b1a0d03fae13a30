/** A process of the fuzzing bench: a thread reads inputs, and this one watches its time and memory. Killed or crashed, it takes nothing with it. */
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { packageRoot } from '../../common/package-root.js';

export interface InputThreadData {
  readonly target: string;
  readonly seed: number;
  /** Inputs [from, to). */
  readonly from: number;
  readonly to: number;
  /** Two words: the index of the input that is being read, and how many have been begun. */
  readonly current: SharedArrayBuffer;
}

export type ThreadMessage =
  { readonly kind: 'defect'; readonly index: number; readonly what: string } | { readonly kind: 'done'; readonly refused: number };

/** What the parent is told. `stopped`: inputs from `index` on have not been read. */
export type ChildMessage =
  | ThreadMessage
  | { readonly kind: 'peak'; readonly rssBytes: number }
  | { readonly kind: 'at'; readonly index: number }
  | { readonly kind: 'stopped'; readonly index: number; readonly what: string };

export interface ChildTask extends Omit<InputThreadData, 'current'> {
  readonly timeLimitMs: number;
  readonly rssLimitBytes: number;
}

const watchEveryMs = 20;

process.once('message', (task: ChildTask) => {
  const current = new SharedArrayBuffer(8);
  const at = new Int32Array(current);
  const send = (message: ChildMessage): void => void process.send!(message);
  const thread = new Worker(join(packageRoot, 'dist/bench/fuzz/input-thread.js'), {
    workerData: { ...task, current } satisfies InputThreadData & ChildTask,
  });
  let peak = 0;
  let seen = { count: -1, sinceMs: 0 };
  const stop = (what: string): void => {
    clearInterval(watch);
    send({ kind: 'stopped', index: Atomics.load(at, 0), what });
    process.send!({ kind: 'peak', rssBytes: peak } satisfies ChildMessage, () => process.exit(1));
  };
  const watch = setInterval(() => {
    const count = Atomics.load(at, 1);
    const now = performance.now();
    if (count !== seen.count) seen = { count, sinceMs: now };
    const rssBytes = process.memoryUsage.rss();
    peak = Math.max(peak, rssBytes);
    send({ kind: 'at', index: Atomics.load(at, 0) });
    if (count > 0 && now - seen.sinceMs > task.timeLimitMs) stop(`takes longer than ${task.timeLimitMs} ms`);
    else if (rssBytes > task.rssLimitBytes) stop(`takes the process to ${rssBytes} bytes of memory, the limit is ${task.rssLimitBytes}`);
  }, watchEveryMs);
  thread.on('message', (message: ThreadMessage) => {
    send(message);
    if (message.kind !== 'done') return;
    clearInterval(watch);
    process.send!({ kind: 'peak', rssBytes: peak } satisfies ChildMessage, () => process.exit());
  });
  thread.on('error', (error) => stop(`ends the thread: ${error.message}`));
});
