import { existsSync } from 'node:fs';
import { totalmem } from 'node:os';
import { join } from 'node:path';
import type { CommandModule } from 'yargs';
import { ConfigError } from '../../common/errors.js';
import { kvBlockSize } from '../../model/kv-blocks.js';
import { planMemory, type KvPrecision, type MemoryPlan, type PlanDevices, type WeightPrecision } from '../../model/memory-plan.js';
import { glm130b, parseModelConfig, type ModelConfig } from '../../model/model-config.js';
import { readJsonFile } from '../../model/store/read-json-file.js';
import { configFileName } from '../../model/store/store-format.js';
import { formatBytes, formatCount, formatMs, formatTable } from '../format.js';
import { decimalNumber, wholeNumber } from '../number-option.js';
import { detectGpus, parseGpus } from '../plan/gpus.js';

interface PlanArgs {
  config: string | undefined;
  gpus: string | undefined;
  bandwidth: number | undefined;
  context: number | undefined;
  memoryShare: number;
  json: boolean;
}

const weightPrecisions: readonly WeightPrecision[] = ['fp16', 'int8', 'int4'];
const kvPrecisions: readonly KvPrecision[] = ['fp16', 'int8'];

interface Hardware extends PlanDevices {
  readonly name: string;
}

export const planCommand: CommandModule<unknown, PlanArgs> = {
  command: 'plan',
  describe: 'Will it fit? What a model takes on some hardware, at every precision',
  builder: (yargs) =>
    yargs
      .option('config', {
        type: 'string',
        requiresArg: true,
        describe: 'Model configuration, or the folder of a store (default: GLM-130B)',
      })
      .option('gpus', {
        type: 'string',
        requiresArg: true,
        describe: "As in 4x24GB or 8xA100-40, or none (default: this machine's, else its memory)",
      })
      .option(
        'bandwidth',
        decimalNumber('bandwidth', { describe: 'Memory bandwidth of each device in GB/s (default: known for common GPUs)' }),
      )
      .option(
        'context',
        wholeNumber('context', { min: 1, describe: "Tokens of a sequence that has to fit (default: the model's longest)" }),
      )
      .option('memory-share', {
        ...decimalNumber('memory-share', {
          default: 0.9,
          describe: 'Of the memory, for weights, workspace and KV cache; the rest is for driver and communication',
        }),
      })
      .option('json', { type: 'boolean', default: false, describe: 'Print JSON' }) as never,
  async handler(args) {
    const config = await chooseConfig(args.config);
    const context = args.context ?? config.maxSequenceLength;
    if (context > config.maxSequenceLength) {
      throw new ConfigError(`--context ${context}: the model takes ${config.maxSequenceLength} tokens`);
    }
    const { memoryShare } = args;
    if (!(memoryShare > 0 && memoryShare <= 1))
      throw new ConfigError(`--memory-share ${memoryShare}: a number above 0 and up to 1 is needed`);
    const hardware = await chooseHardware(args);
    const plans = weightPrecisions.flatMap((weights) =>
      kvPrecisions.map((kv) => planMemory({ config, devices: hardware, weights, kv, context, memoryShare })),
    );
    if (args.json) process.stdout.write(`${JSON.stringify({ hardware, context, kvBlockSize, plans }, null, 2)}\n`);
    else process.stdout.write(`${describePlans({ config, hardware, context, memoryShare, plans })}\n`);
  },
};

async function chooseConfig(given: string | undefined): Promise<ModelConfig> {
  if (given === undefined) return glm130b;
  const inFolder = join(given, configFileName);
  const path = existsSync(inFolder) ? inFolder : given;
  return parseModelConfig(await readJsonFile(path, 2 ** 20), path);
}

async function chooseHardware({ gpus: given, bandwidth }: PlanArgs): Promise<Hardware> {
  if (bandwidth !== undefined && !(bandwidth > 0)) throw new ConfigError(`--bandwidth ${bandwidth}: a number above 0 is needed, in GB/s`);
  const gpus = given === 'none' ? null : given === undefined ? await detectGpus() : parseGpus(given);
  const hardware: Hardware =
    gpus === null
      ? { count: 1, name: "this machine's memory", memoryBytes: totalmem(), bandwidth: null, activationBytes: 4 }
      : { ...gpus, activationBytes: 2 };
  return { ...hardware, bandwidth: bandwidth === undefined ? hardware.bandwidth : bandwidth * 1e9 };
}

interface Plans {
  readonly config: ModelConfig;
  readonly hardware: Hardware;
  readonly context: number;
  readonly memoryShare: number;
  readonly plans: readonly MemoryPlan[];
}

function describePlans({ config, hardware, context, memoryShare, plans }: Plans): string {
  const { worldSize, usableBytes } = plans[0]!;
  const speed = hardware.bandwidth === null ? 'bandwidth unknown (--bandwidth)' : `${formatCount(hardware.bandwidth / 1e9)} GB/s`;
  const lines = [
    `model      ${config.numLayers} layers, hidden ${config.hiddenSize}, ${config.numAttentionHeads} heads, inner ${config.innerHiddenSize}, vocabulary ${config.vocabSize}`,
    `hardware   ${hardware.count} x ${hardware.name}, ${formatBytes(hardware.memoryBytes)} each, ${formatBytes(usableBytes)} of it usable (${Math.round(memoryShare * 100)} %), ${speed}`,
    `ranks      ${worldSize}${worldSize < hardware.count ? `: the model cannot be divided by more of ${hardware.count} devices` : ''}`,
    `sequences  of ${context} tokens, KV blocks of ${kvBlockSize}`,
    '',
    formatTable(
      ['weights', 'KV', 'fits', 'weights each', 'workspace', 'KV blocks', 'KV tokens', 'sequences', 'context', 'step of 1', 'of all'],
      plans.map((plan) => [
        plan.weights.toUpperCase(),
        plan.kv.toUpperCase(),
        plan.fits ? 'yes' : 'no',
        formatBytes(plan.weightBytes),
        formatBytes(plan.workspaceBytes),
        String(plan.kvBlocks),
        String(plan.kvTokens),
        String(plan.maxSequences),
        String(plan.maxContext),
        plan.stepMs === null ? '-' : formatMs(plan.stepMs.oneSequence),
        plan.stepMs === null ? '-' : formatMs(plan.stepMs.maxSequences),
      ]),
    ),
    '',
    ...reasons(plans),
    'Everything is of one device. A step decodes one token of each sequence; its time is what reading weights, keys and values takes at the full',
    'bandwidth, so real ones are longer. Workers of this version take an FP16 KV cache; INT8 is shown for what it would save.',
  ];
  return lines.join('\n');
}

/** One line for each precision of the weights, or two where it depends on the KV cache. */
function reasons(plans: readonly MemoryPlan[]): string[] {
  const kvsByReason = new Map<string, string[]>();
  for (const { weights, kv, whyNot } of plans) {
    if (whyNot === null) continue;
    const reason = `${weights.toUpperCase()} does not fit: ${whyNot}`;
    kvsByReason.set(reason, [...(kvsByReason.get(reason) ?? []), kv.toUpperCase()]);
  }
  return [...kvsByReason].map(([reason, kvs]) => (kvs.length === kvPrecisions.length ? reason : `with ${kvs.join()} KV, ${reason}`));
}
