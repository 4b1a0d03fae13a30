/** The thread that reads inputs, one after the other. Where it is can be seen from outside while it hangs. */
import { parentPort, workerData } from 'node:worker_threads';
import { FuzzTargets, inputOf, tryInput } from './targets.js';
import type { InputThreadData, ThreadMessage } from './child.js';

const { target: name, seed, from, to, current } = workerData as InputThreadData;
const at = new Int32Array(current);
const send = (message: ThreadMessage): void => parentPort!.postMessage(message);

const targets = await FuzzTargets.open();
try {
  const target = targets.all.find((one) => one.name === name)!;
  let refused = 0;
  for (let index = from; index < to; index++) {
    Atomics.store(at, 0, index);
    Atomics.add(at, 1, 1);
    try {
      if (await tryInput(target, inputOf(target, seed, index))) refused++;
    } catch (error) {
      send({ kind: 'defect', index, what: (error as Error).stack ?? String(error) });
    }
  }
  send({ kind: 'done', refused });
} finally {
  targets.close();
}
