/** A thread of verifyStore: takes ranges of files, answers with how far it is and their hashes. */
import { createHash } from 'node:crypto';
import { closeSync, openSync, readSync } from 'node:fs';
import { parentPort } from 'node:worker_threads';
import type { FileRange, HashMessage } from './verify-store.js';

const port = parentPort!;
const buffer = Buffer.allocUnsafe(4 * 2 ** 20);

port.on('message', ({ file, offset, bytes }: FileRange) => {
  const send = (message: HashMessage): void => port.postMessage(message);
  try {
    const hash = createHash('sha256');
    const fd = openSync(file, 'r');
    try {
      for (let done = 0; done < bytes;) {
        const count = readSync(fd, buffer, 0, Math.min(buffer.length, bytes - done), offset + done);
        if (count === 0) throw new Error(`it ends ${bytes - done} bytes early`);
        hash.update(buffer.subarray(0, count));
        done += count;
        send({ kind: 'progress', bytes: count });
      }
    } finally {
      closeSync(fd);
    }
    send({ kind: 'hash', sha256: hash.digest('hex') });
  } catch (error) {
    send({ kind: 'error', message: (error as Error).message });
  }
});
