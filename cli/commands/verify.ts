import type { CommandModule } from 'yargs';
import { CheckpointError } from '../../common/errors.js';
import { verifyStore, type VerifyReport } from '../../model/store/verify-store.js';
import { byteProgress } from '../byte-progress.js';
import { formatBytes } from '../format.js';
import { interruptible } from '../interrupt.js';
import { wholeNumber } from '../number-option.js';

interface VerifyArgs {
  store: string;
  json: boolean;
  threads: number | undefined;
}

export const verifyCommand: CommandModule<unknown, VerifyArgs> = {
  command: 'verify <store>',
  describe: 'Read a model store and compare it with its checksums',
  builder: (yargs) =>
    yargs
      .positional('store', { type: 'string', demandOption: true, describe: 'Folder of the store' })
      .option('json', { type: 'boolean', default: false, describe: 'Print JSON' })
      .option('threads', wholeNumber('threads', { min: 1, max: 256, describe: 'Tensors read at a time (default: the cores)' })) as never,
  async handler({ store, json, threads }) {
    await interruptible(async (signal) => {
      const started = performance.now();
      const report = await verifyStore(store, { signal, onProgress: byteProgress(), ...(threads === undefined ? {} : { threads }) });
      const seconds = (performance.now() - started) / 1000;
      if (json) process.stdout.write(`${JSON.stringify(report, null, 2)}\n`);
      else for (const line of describe(report, seconds)) process.stdout.write(`${line}\n`);
      if (report.problems.length > 0) throw damaged(report);
    });
  },
};

function describe({ hasManifest, tensors, comparedTensors, comparedBytes, unrecorded, problems }: VerifyReport, seconds: number): string[] {
  const lines = problems.map(({ message }) => message);
  if (comparedTensors > 0) {
    lines.push(`compared ${comparedTensors} tensors, ${comparedBytes} bytes (${formatBytes(comparedBytes)}), in ${seconds.toFixed(1)} s`);
  }
  if (!hasManifest) lines.push('the store has no manifest.json');
  if (unrecorded.length > 0) {
    lines.push(`${unrecorded.length} of ${tensors} tensors have no recorded checksum: only their names, shapes and sizes were checked`);
  }
  if (problems.length === 0) lines.push(unrecorded.length === 0 ? 'everything is as it was written' : 'nothing wrong was seen');
  return lines;
}

function damaged({ dir, problems }: VerifyReport): CheckpointError {
  const names = problems.map(({ name }) => name);
  return new CheckpointError(
    `${dir} is damaged (${names.slice(0, 5).join(', ')}${names.length > 5 ? ` and ${names.length - 5} more` : ''}): import it again`,
  );
}
