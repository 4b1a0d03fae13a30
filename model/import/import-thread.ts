/** A thread of an import: runs the jobs that it is sent. What is a defect ends it, which is what the other side is told. */
import { parentPort, workerData } from 'node:worker_threads';
import { CheckpointError, TandemError } from '../../common/errors.js';
import { PieceBuffers, runJob, type CheckJob, type ConvertJob } from './convert-tensor.js';
import type { ImportThreadData, ThreadAnswer } from './import-jobs.js';
import { loadImportKernels } from './import-kernels.js';

class Stopped extends Error {}

const { pieceBytes, counters } = workerData as ImportThreadData;
const tools = {
  kernels: loadImportKernels(),
  buffers: new PieceBuffers(pieceBytes),
  onRead: (bytes: number): void => {
    Atomics.add(counters, 0, BigInt(bytes));
    if (Atomics.load(counters, 1) !== 0n) throw new Stopped();
  },
};
const port = parentPort!;
port.on('message', (job: ConvertJob | CheckJob) => port.postMessage(answer(job)));

function answer(job: ConvertJob | CheckJob): ThreadAnswer {
  try {
    return { result: runJob(job, tools) };
  } catch (error) {
    if (error instanceof Stopped) return { stopped: true };
    if (error instanceof TandemError) return { error: { isCheckpoint: error instanceof CheckpointError, message: error.message } };
    throw error;
  }
}
