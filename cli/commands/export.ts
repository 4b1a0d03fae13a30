import type { CommandModule } from 'yargs';
import { ConfigError } from '../../common/errors.js';
import { exportCheckpoint } from '../../model/export/export-checkpoint.js';
import { byteProgress } from '../byte-progress.js';
import { formatBytes } from '../format.js';
import { interruptible } from '../interrupt.js';
import { wholeNumber } from '../number-option.js';

interface ExportArgs {
  store: string;
  to: string;
  tp: number;
  quantize: 'int8' | 'int4' | undefined;
  iteration: string;
}

export const exportCommand: CommandModule<unknown, ExportArgs> = {
  command: 'export <store> <to>',
  describe: 'Turn a model store into a GLM checkpoint (SAT folder) for the original code',
  builder: (yargs) =>
    yargs
      .positional('store', { type: 'string', demandOption: true, describe: 'Folder of the store' })
      .positional('to', { type: 'string', demandOption: true, describe: 'SAT folder to write; must not exist, or be empty' })
      .option('tp', wholeNumber('tp', { min: 1, demandOption: true, describe: 'Tensor-parallel degree: the number of rank files' }))
      .option('quantize', {
        choices: ['int8', 'int4'] as const,
        requiresArg: true,
        describe: 'Quantise the linear layers of an fp16 store (default: as in the store)',
      })
      .option('iteration', {
        type: 'string',
        default: 'release',
        requiresArg: true,
        describe: 'What "latest" says: a number, or "release"',
      }) as never,
  async handler({ store, to, tp, quantize, iteration }) {
    if (!/^([1-9]\d{0,14}|release)$/.test(iteration)) {
      throw new ConfigError(`--iteration ${iteration}: a whole number above 0 or the word release is needed`);
    }
    await interruptible(async (signal) => {
      const started = performance.now();
      const result = await exportCheckpoint({
        from: store,
        to,
        ranks: tp,
        quantize: quantize === undefined ? null : quantize === 'int8' ? 8 : 4,
        iteration,
        signal,
        onProgress: byteProgress(),
      });
      const seconds = (performance.now() - started) / 1000;
      process.stdout.write(
        `exported ${result.tensors} tensors to each of ${tp} files, ${result.bytes} bytes (${formatBytes(result.bytes)}), in ${seconds.toFixed(1)} s to ${to}\n`,
      );
    });
  },
};
