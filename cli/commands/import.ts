import type { CommandModule } from 'yargs';
import { importCheckpoint, type ImportProgress } from '../../model/import/import-checkpoint.js';
import { ConfigError } from '../../common/errors.js';
import { formatBytes } from '../format.js';
import { wholeNumber } from '../number-option.js';

interface ImportArgs {
  from: string;
  to: string;
  config: string | undefined;
  tokenizer: string | undefined;
  quantize: string | undefined;
  group: string | undefined;
  ranks: number | undefined;
}

const progressEveryMs = 1000;

export const importCommand: CommandModule<unknown, ImportArgs> = {
  command: 'import',
  describe: 'Turn a GLM checkpoint (SAT folder) into a model store',
  builder: (yargs) =>
    yargs
      .option('from', { type: 'string', demandOption: true, requiresArg: true, describe: 'SAT folder: the one with the file "latest"' })
      .option('to', {
        type: 'string',
        demandOption: true,
        requiresArg: true,
        describe: 'Folder of the new store; must not exist, or be empty',
      })
      .option('config', {
        type: 'string',
        requiresArg: true,
        describe: 'Model configuration (default: config.json in the SAT folder, else GLM-130B)',
      })
      .option('tokenizer', {
        type: 'string',
        requiresArg: true,
        describe: 'SentencePiece file (default: the one beside the configuration)',
      })
      .option('quantize', {
        choices: ['int8', 'int4'] as const,
        requiresArg: true,
        describe: 'Quantise the linear layers (default: as in the checkpoint)',
      })
      .option('group', {
        type: 'string', // or 128 would arrive as a number, which is none of the choices
        choices: ['vector', '128'] as const,
        requiresArg: true,
        describe: 'Columns that share a scale: as GLM-130B does, or 128 (default: vector)',
      })
      .option(
        'ranks',
        wholeNumber('ranks', { min: 1, describe: 'Ranks that --group vector quantises for (default: those of the checkpoint)' }),
      ) as never,
  async handler(args) {
    const started = performance.now();
    const interrupt = new AbortController();
    const onSignal = (signal: NodeJS.Signals): void =>
      interrupt.abort(new ConfigError(`import stopped by ${signal}; nothing was left at ${args.to}`));
    process.once('SIGINT', onSignal).once('SIGTERM', onSignal);
    try {
      const result = await importCheckpoint({
        from: args.from,
        to: args.to,
        configPath: args.config ?? null,
        tokenizerPath: args.tokenizer ?? null,
        quantize: args.quantize === undefined ? null : args.quantize === 'int8' ? 8 : 4,
        group: args.group === undefined ? null : args.group === '128' ? 128 : 'vector',
        ranks: args.ranks ?? null,
        onProgress: progressPrinter(),
        signal: interrupt.signal,
      });
      for (const warning of result.warnings) process.stderr.write(`warning: ${warning}\n`);
      const seconds = (performance.now() - started) / 1000;
      process.stdout.write(
        `imported ${result.tensors} tensors, ${result.bytes} bytes (${formatBytes(result.bytes)}), in ${seconds.toFixed(1)} s to ${args.to}\n`,
      );
    } finally {
      process.off('SIGINT', onSignal).off('SIGTERM', onSignal);
    }
  },
};

/** A line about once a second, and one at the end. */
function progressPrinter(): (progress: ImportProgress) => void {
  let last = performance.now();
  return ({ name, tensors, totalTensors, bytes, totalBytes }) => {
    const now = performance.now();
    if (tensors < totalTensors && now - last < progressEveryMs) return;
    last = now;
    process.stderr.write(`${tensors}/${totalTensors} tensors, ${formatBytes(bytes)} of ${formatBytes(totalBytes)}: ${name}\n`);
  };
}
