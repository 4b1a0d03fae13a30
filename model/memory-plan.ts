import { shardShape } from './import/split.js';
import { kvBlockBytes, kvBlockSize } from './kv-blocks.js';
import { localShare, possibleWorldSizes, type ModelConfig } from './model-config.js';
import { glmTensors } from './store/glm-tensors.js';

export type WeightPrecision = 'fp16' | 'int8' | 'int4';
export type KvPrecision = 'fp16' | 'int8';

/** Devices that are alike, each with one rank. */
export interface PlanDevices {
  readonly count: number;
  readonly memoryBytes: number;
  /** Bytes read per second; null: unknown. */
  readonly bandwidth: number | null;
  /** Of activations: 2 on a GPU, 4 on a CPU. */
  readonly activationBytes: 2 | 4;
}

export interface PlanOptions {
  readonly config: ModelConfig;
  readonly devices: PlanDevices;
  readonly weights: WeightPrecision;
  readonly kv: KvPrecision;
  /** Tokens of a sequence that has to fit; at most the model's own. */
  readonly context: number;
  /** Of a device's memory that weights, workspace and KV may take; the rest is for driver, communication and fragments. */
  readonly memoryShare: number;
}

export interface MemoryPlan {
  readonly weights: WeightPrecision;
  readonly kv: KvPrecision;
  /** Devices that are used: the largest possible number of ranks. */
  readonly worldSize: number;
  /** Of each device, as are all that follow. */
  readonly usableBytes: number;
  readonly weightBytes: number;
  readonly workspaceBytes: number;
  readonly kvBlockBytes: number;
  /** 0 where weights and workspace leave no room. */
  readonly kvBlocks: number;
  readonly kvTokens: number;
  /** Sequences of `context` tokens that the cache holds at once: the largest batch. */
  readonly maxSequences: number;
  /** Tokens of one sequence, if it is alone. */
  readonly maxContext: number;
  readonly fits: boolean;
  /** Null where it fits. */
  readonly whyNot: string | null;
  /** Of one decoding step at the full bandwidth, so a lower bound; null where the bandwidth is unknown or it does not fit. */
  readonly stepMs: { readonly oneSequence: number; readonly maxSequences: number } | null;
}

/** Sequences that can decode in one step of the server; each needs a row of logits. */
export const maxStepSequences = 256;

/**
 * Whether a model fits the memory of some devices, and what fits beside it. Pure arithmetic: every rank holds its share of the weights
 * (model-spec section 1.2), buffers for the largest step, and KV blocks in the rest. A decoding step reads all weights and the keys and values
 * of every sequence in it once, so memory bandwidth bounds its time from below.
 */
export function planMemory({ config, devices, weights, kv, context, memoryShare }: PlanOptions): MemoryPlan {
  const worldSize = Math.max(...possibleWorldSizes(config).filter((size) => size <= devices.count));
  const share = localShare(config, worldSize);
  const usableBytes = Math.floor(devices.memoryBytes * memoryShare);
  const weightBytes = rankWeightBytes(config, worldSize, weights);
  const workspaceBytes = rankWorkspaceBytes(config, worldSize, devices.activationBytes);
  const blockBytes = kvBlockBytes({ config, share, blockSize: kvBlockSize, dtype: kv });
  const leftBytes = usableBytes - weightBytes - workspaceBytes;
  const kvBlocks = Math.max(0, Math.floor(leftBytes / blockBytes));
  const blocksPerSequence = Math.ceil(context / kvBlockSize);
  const maxSequences = Math.floor(kvBlocks / blocksPerSequence);
  const fits = maxSequences > 0;
  const stepMs = (sequences: number): number => ((weightBytes + sequences * blocksPerSequence * blockBytes) / devices.bandwidth!) * 1000;
  const plan = {
    ...{ weights, kv, worldSize, usableBytes, weightBytes, workspaceBytes, kvBlockBytes: blockBytes, kvBlocks, maxSequences, fits },
    kvTokens: kvBlocks * kvBlockSize,
    maxContext: Math.min(config.maxSequenceLength, kvBlocks * kvBlockSize),
    stepMs:
      fits && devices.bandwidth !== null
        ? { oneSequence: stepMs(1), maxSequences: stepMs(Math.min(maxSequences, maxStepSequences)) }
        : null,
  };
  return { ...plan, whyNot: fits ? null : describeLack(plan, { context, contextBytes: blocksPerSequence * blockBytes }) };
}

/** Bytes of one rank's tensors; quantised vector-wise, a row of a shard has one fp16 scale. */
export function rankWeightBytes(config: ModelConfig, worldSize: number, weights: WeightPrecision): number {
  const itemBytes = { fp16: 2, int8: 1, int4: 0.5 }[weights];
  return glmTensors(config).reduce((sum, { split, shape, isQuantizable }) => {
    const [rows, columns = 1] = shardShape(split, shape, worldSize) as [number, number?];
    const quantized = isQuantizable && weights !== 'fp16';
    return sum + (quantized ? rows * columns * itemBytes + rows * 2 : rows * columns * 2);
  }, 0);
}

/** An estimate of the buffers of the largest step: what one layer computes for each of its tokens, and rows of logits. */
function rankWorkspaceBytes(config: ModelConfig, worldSize: number, activationBytes: number): number {
  const { hiddenSize: h, innerHiddenSize: f, vocabSize, maxSequenceLength } = config;
  const tokens = maxSequenceLength + maxStepSequences;
  const perToken = 4 * h + (4 * h + 3 * f) / worldSize; // residual, norm, sum, its copy; q, k, v, attention; both halves, their product
  return tokens * perToken * activationBytes + maxStepSequences * vocabSize * (1 + 1 / worldSize) * 4;
}

function describeLack(
  {
    usableBytes,
    weightBytes,
    workspaceBytes,
    maxContext,
  }: Pick<MemoryPlan, 'usableBytes' | 'weightBytes' | 'workspaceBytes' | 'maxContext'>,
  { context, contextBytes }: { context: number; contextBytes: number },
): string {
  const lack = weightBytes + workspaceBytes - usableBytes;
  if (weightBytes > usableBytes) return `the weights take ${gib(weightBytes)}, ${gib(usableBytes)} are usable`;
  if (lack > 0)
    return `weights (${gib(weightBytes)}) and workspace (${gib(workspaceBytes)}) take ${gib(lack)} more than the usable ${gib(usableBytes)}`;
  return (
    `weights (${gib(weightBytes)}) and workspace (${gib(workspaceBytes)}) leave ${gib(-lack)} of ${gib(usableBytes)} for the KV cache, ` +
    `a sequence of ${context} tokens takes ${gib(contextBytes)}` +
    (maxContext > 0 ? `; one of ${maxContext} would fit (--context)` : '')
  );
}

function gib(bytes: number): string {
  return `${(bytes / 2 ** 30).toFixed(2)} GiB`;
}
