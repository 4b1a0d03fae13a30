import type { CommandModule } from 'yargs';
import { ConfigError } from '../../common/errors.js';
import { glm130b, parseModelConfig, type ModelConfig } from '../../model/model-config.js';
import { readJsonFile } from '../../model/store/read-json-file.js';
import { writeSyntheticSat, writeSyntheticStore } from '../../model/synth/write-synthetic.js';
import { byteProgress } from '../byte-progress.js';
import { formatBytes } from '../format.js';
import { interruptible } from '../interrupt.js';
import { wholeNumber } from '../number-option.js';

interface SynthArgs {
  to: string;
  config: string | undefined;
  shape: string | undefined;
  layers: number | undefined;
  seed: string;
  weights: 'fp16' | 'int8' | 'int4';
  tp: number;
  format: 'sat' | 'store';
  archiveParts: number | undefined;
}

export const synthCommand: CommandModule<unknown, SynthArgs> = {
  command: 'synth <to>',
  describe: 'Write a checkpoint or store of random weights, to try out sizes and machines',
  builder: (yargs) =>
    yargs
      .positional('to', { type: 'string', demandOption: true, describe: 'Folder to write; must not exist, or be empty' })
      .option('config', { type: 'string', requiresArg: true, describe: 'Model configuration' })
      .option('shape', {
        choices: ['glm-130b'] as const,
        requiresArg: true,
        describe: 'A shape known by name, in place of --config (default: glm-130b)',
      })
      .option('layers', wholeNumber('layers', { min: 1, max: 10_000, describe: 'Layers, where not as many as the model has' }))
      .option('seed', { type: 'string', default: '0', requiresArg: true, describe: 'The same seed and shape give the same weights' })
      .option('weights', {
        choices: ['fp16', 'int8', 'int4'] as const,
        default: 'fp16',
        requiresArg: true,
        describe: 'What the linear layers hold',
      })
      .option('tp', wholeNumber('tp', { min: 1, default: 1, describe: 'Tensor-parallel degree: rank files, or scales of a quantised row' }))
      .option('format', {
        choices: ['sat', 'store'] as const,
        default: 'sat',
        requiresArg: true,
        describe: 'A checkpoint as GLM-130B is distributed, or a store',
      })
      .option(
        'archive-parts',
        wholeNumber('archive-parts', {
          min: 1,
          max: 1000,
          describe: 'Only with --format sat: a tar archive in this many parts (GLM-130B has 60)',
        }),
      ) as never,
  async handler(args) {
    const options = {
      config: await chooseConfig(args),
      seed: args.seed,
      bits: args.weights === 'fp16' ? null : args.weights === 'int8' ? (8 as const) : (4 as const),
      ranks: args.tp,
      to: args.to,
      onProgress: byteProgress(),
    };
    const archiveParts = args.archiveParts ?? null;
    if (args.format === 'store' && archiveParts !== null) throw new ConfigError('--archive-parts belongs to --format sat');
    await interruptible(async (signal) => {
      const started = performance.now();
      const result = await (args.format === 'store'
        ? writeSyntheticStore({ ...options, signal })
        : writeSyntheticSat({ ...options, signal }, archiveParts));
      const seconds = (performance.now() - started) / 1000;
      process.stdout.write(
        `wrote ${result.tensors} tensors, ${result.bytes} bytes (${formatBytes(result.bytes)}), in ${seconds.toFixed(1)} s to ${args.to}\n`,
      );
    });
  },
};

async function chooseConfig({ config: path, shape, layers }: SynthArgs): Promise<ModelConfig> {
  if (path !== undefined && shape !== undefined) throw new ConfigError('--config and --shape both name a model: give one of them');
  const config = path === undefined ? glm130b : parseModelConfig(await readJsonFile(path, 2 ** 20), path);
  return { ...config, numLayers: layers ?? config.numLayers };
}
