/** A process of the fuzzing bench: a thread reads inputs, and this one watches its time and memory. Killed or crashed, it takes nothing with it. */
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { packageRoot } from '../../common/package-root.js';
import type { ChildMessage, ChildTask, InputThreadData, ThreadMessage } from './child-task.js';

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
