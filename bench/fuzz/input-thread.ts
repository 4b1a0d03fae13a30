/** The thread that reads inputs, one after the other. Where it is can be seen while it hangs, and in a file when the process is gone. */
import { closeSync, openSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { parentPort, workerData } from 'node:worker_threads';
import { FuzzTargets, inputOf, tryInput } from './targets.js';
import { currentFileName, type InputThreadData, type ThreadMessage } from './child-task.js';

const { target: name, seed, from, to, dir, current } = workerData as InputThreadData;
const at = new Int32Array(current);
const send = (message: ThreadMessage): void => parentPort!.postMessage(message);

const file = openSync(join(dir, currentFileName), 'w');
const targets = await FuzzTargets.open(dir);
try {
  const target = targets.all.find((one) => one.name === name)!;
  let refused = 0;
  for (let index = from; index < to; index++) {
    Atomics.store(at, 0, index);
    Atomics.add(at, 1, 1);
    writeSync(file, at, 0, 4, 0);
    try {
      if (await tryInput(target, inputOf(target, seed, index))) refused++;
    } catch (error) {
      send({ kind: 'defect', index, what: (error as Error).stack ?? String(error) });
    }
  }
  send({ kind: 'done', refused });
} finally {
  targets.close();
  closeSync(file);
}
