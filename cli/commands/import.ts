import type { CommandModule } from 'yargs';
import { ConfigError } from '../../common/errors.js';
import { importCheckpoint, outlineImport, type ImportOutline, type ImportProgress } from '../../model/import/import-checkpoint.js';
import { partialFolder } from '../../model/store/partial-store.js';
import { tensorBytes } from '../../model/store/store-format.js';
import { byteSize } from '../byte-size-option.js';
import { formatBytes, formatTable } from '../format.js';
import { ImportProgressView } from '../import-progress.js';
import { wholeNumber } from '../number-option.js';

interface ImportArgs {
  from: string[];
  to: string;
  config: string | undefined;
  tokenizer: string | undefined;
  quantize: string | undefined;
  group: string | undefined;
  ranks: number | undefined;
  memoryLimit: number | undefined;
  threads: number | undefined;
  dryRun: boolean;
  restart: boolean;
}

export const importCommand: CommandModule<unknown, ImportArgs> = {
  command: 'import',
  describe: 'Turn a GLM checkpoint (SAT folder or archive) into a model store',
  builder: (yargs) =>
    yargs
      .option('from', {
        type: 'string',
        array: true,
        demandOption: true,
        requiresArg: true,
        describe: 'SAT folder (the one with the file "latest"), or the parts of its tar archive: "glm-130b-sat.tar.part_*"',
      })
      .option('to', {
        type: 'string',
        demandOption: true,
        requiresArg: true,
        describe: 'Folder of the new store; must not exist, or be empty',
      })
      .option('config', {
        type: 'string',
        requiresArg: true,
        describe: 'Model configuration (default: config.json in the SAT folder or beside the archive, else GLM-130B)',
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
      )
      .option('memory-limit', byteSize('memory-limit', { describe: 'Memory that the import may take (default: 4GiB)' }))
      .option(
        'threads',
        wholeNumber('threads', { min: 1, max: 1024, describe: 'Threads (default: one more than cores, as far as memory allows)' }),
      )
      .option('dry-run', { type: 'boolean', default: false, describe: 'Print what would be done: tensors, sizes, disk and memory needed' })
      .option('restart', {
        type: 'boolean',
        default: false,
        describe: 'Throw away what an unfinished import has left at the target (default: go on with it)',
      }) as never,
  async handler(args) {
    const options = {
      from: args.from,
      to: args.to,
      configPath: args.config ?? null,
      tokenizerPath: args.tokenizer ?? null,
      quantize: args.quantize === undefined ? null : args.quantize === 'int8' ? (8 as const) : (4 as const),
      group: args.group === undefined ? null : args.group === '128' ? (128 as const) : ('vector' as const),
      ranks: args.ranks ?? null,
      memoryLimit: args.memoryLimit ?? null,
      threads: args.threads ?? null,
      restart: args.restart,
    };
    if (args.dryRun) {
      process.stdout.write(describeOutline(await outlineImport(options), args.to));
      return;
    }
    const started = performance.now();
    const interrupt = new AbortController();
    const view = new ImportProgressView(process.stderr);
    let done: Pick<ImportProgress, 'tensors' | 'totalTensors'> | null = null;
    const onSignal = (signal: NodeJS.Signals): void => {
      const kept =
        done === null || done.tensors === 0
          ? 'nothing was left'
          : `${done.tensors} of ${done.totalTensors} tensors are kept in ${partialFolder(args.to)}, and the same command goes on there`;
      interrupt.abort(new ConfigError(`import stopped by ${signal}: ${kept}`));
    };
    process.once('SIGINT', onSignal).once('SIGTERM', onSignal);
    try {
      const onProgress = (progress: ImportProgress): void => view.update((done = progress));
      const result = await importCheckpoint({ ...options, onProgress, signal: interrupt.signal });
      view.close();
      for (const warning of result.warnings) process.stderr.write(`warning: ${warning}\n`);
      const seconds = (performance.now() - started) / 1000;
      const kept = result.keptTensors > 0 ? ` (${result.keptTensors} were there already)` : '';
      process.stdout.write(
        `imported ${result.tensors} tensors${kept}, ${result.bytes} bytes (${formatBytes(result.bytes)}), in ${seconds.toFixed(1)} s to ${args.to}\n`,
      );
    } finally {
      view.close();
      process.off('SIGINT', onSignal).off('SIGTERM', onSignal);
    }
  },
};

function describeOutline(
  { plan, files, ranks, sourceBytes, neededBytes, freeBytes, workers, unfinished }: ImportOutline,
  to: string,
): string {
  const outputs = plan.tensors.flatMap((tensor) => tensor.outputs);
  const [first] = files;
  const threads = workers.threads === 0 ? 'one thread' : `${workers.threads} threads`;
  const lines = [
    formatTable(
      ['name', 'dtype', 'shape', 'bytes'],
      outputs.map(({ name, dtype, shape }) => [name, dtype, shape.join(' x '), String(tensorBytes(dtype, shape))]),
    ),
    '',
    `from    ${first}${files.length > 1 ? ` and ${files.length - 1} more files` : ''}: ${ranks} rank${ranks === 1 ? '' : 's'}, ${formatBytes(sourceBytes)} to read`,
    `to      ${to}: ${outputs.length} tensors, ${plan.bytes} bytes (${formatBytes(plan.bytes)})`,
    ...(unfinished === null ? [] : [`        goes on with ${unfinished}`]),
    `disk    ${formatBytes(neededBytes)} needed, ${formatBytes(freeBytes)} free${neededBytes > freeBytes ? ': TOO LITTLE' : ''}`,
    `memory  about ${formatBytes(workers.memoryBytes)}, ${threads}`,
    ...plan.warnings.map((warning) => `warning: ${warning}`),
  ];
  return `${lines.join('\n')}\n`;
}
