import { ConfigError } from '../../common/errors.js';
import { kvBlockBytes, type KvBlockShape } from '../../model/kv-blocks.js';
import type { ModelConfig } from '../../model/model-config.js';

export interface KvCapacityInput extends KvBlockShape {
  readonly config: ModelConfig;
  /** Of the machine; all ranks are on it. */
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
