import { ConfigError } from '../../common/errors.js';
import { kvBlockBytes, type KvBlockShape } from '../../model/kv-blocks.js';
import { maxStepSequences, planMemory } from '../../model/memory-plan.js';
import type { ModelConfig } from '../../model/model-config.js';

export interface KvCapacityInput extends KvBlockShape {
  readonly config: ModelConfig;
  /** Of the machine, that all ranks are on; or of each rank's GPU. */
  readonly totalMemoryBytes: number;
  readonly ranks: number;
}

/** Full-length sequences that the default cache holds, if memory allows. */
const DEFAULT_SEQUENCES = 32;
/** Share of the machine's memory that all ranks' caches may take together. */
const MEMORY_SHARE = 0.25;

/**
 * KV blocks of each rank when the operator names no number.
 *
 * @throws ConfigError if not even one sequence of full length fits
 */
export function kvBlocksFor(input: KvCapacityInput): number {
  const { config, blockSize, totalMemoryBytes, ranks } = input;
  const blocksPerSequence = Math.ceil(config.maxSequenceLength / blockSize);
  const blockBytes = kvBlockBytes(input);
  const fitting = Math.floor((totalMemoryBytes * MEMORY_SHARE) / ranks / blockBytes);
  if (fitting < blocksPerSequence) {
    throw new ConfigError(
      `the KV cache of one sequence takes ${blocksPerSequence} blocks of ${blockBytes} bytes on each of ${ranks} ranks, a quarter of this machine's memory holds ${fitting}: give --kv-blocks to take more`,
    );
  }
  return Math.min(fitting, DEFAULT_SEQUENCES * blocksPerSequence);
}

/** Of a GPU's memory; the rest is for the driver, communication and fragments. */
const GPU_MEMORY_SHARE = 0.92;

/**
 * KV blocks of each rank when the operator names no number and each has a GPU of its own: what weights and workspace leave.
 *
 * @throws ConfigError if not even one sequence of full length fits
 */
export function kvBlocksOfGpu(input: KvCapacityInput & { readonly weights: 4 | 8 | 16 }): number {
  const { config, dtype, totalMemoryBytes, ranks, weights, blockSize } = input;
  const plan = planMemory({
    config,
    devices: { count: ranks, memoryBytes: totalMemoryBytes, bandwidth: null, activationBytes: 2 },
    weights: weights === 16 ? 'fp16' : weights === 8 ? 'int8' : 'int4',
    kv: dtype === 'int8' ? 'int8' : 'fp16',
    context: config.maxSequenceLength,
    memoryShare: GPU_MEMORY_SHARE,
  });
  if (!plan.fits) throw new ConfigError(`the model does not fit: ${plan.whyNot}; see "tandem plan", or give --kv-blocks`);
  // More of full length are never under way.
  return Math.min(plan.kvBlocks, maxStepSequences * Math.ceil(config.maxSequenceLength / blockSize));
}
