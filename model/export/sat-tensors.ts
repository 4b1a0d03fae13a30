import { ConfigError } from '../../common/errors.js';
import type { QuantizedBits } from '../import/quantize.js';
import { shardShape } from '../import/split.js';
import { localShare, type ModelConfig } from '../model-config.js';
import { glmTensors, type GlmTensor } from '../store/glm-tensors.js';
import type { PlannedTorchTensor } from './write-torch.js';

/** A tensor of a rank's file; `scales` belong to the weight before them. */
export type SatTensor = PlannedTorchTensor & {
  readonly source: GlmTensor;
  readonly part: 'values' | 'scales';
};

/**
 * What each of `ranks` files of a SAT checkpoint holds, in the order of the original's own files (model-spec sections 1.2 and 1.3).
 *
 * @param dtypeOf of a tensor that is not quantised
 * @throws ConfigError where `ranks` does not divide the model
 */
export function satTensors(
  config: ModelConfig,
  { ranks, bits, dtypeOf }: { ranks: number; bits: QuantizedBits | null; dtypeOf?: (tensor: GlmTensor) => 'float16' | 'float32' },
): SatTensor[] {
  localShare(config, ranks); // throws
  return glmTensors(config).flatMap((source): SatTensor[] => {
    const shape = shardShape(source.split, source.shape, ranks)!;
    if (bits === null || !source.isQuantizable) {
      return [{ name: source.name, dtype: dtypeOf?.(source) ?? 'float16', shape, source, part: 'values' }];
    }
    const [rows, columns] = shape as [number, number];
    if (bits === 4 && columns % 2 !== 0) {
      throw new ConfigError(`${source.name} has ${columns} columns on each of ${ranks} ranks: INT4 packs them in pairs`);
    }
    return [
      { name: source.name, dtype: 'int8', shape: [rows, bits === 4 ? columns / 2 : columns], source, part: 'values' },
      { name: `${source.name}_scale`, dtype: 'float16', shape: [rows], source, part: 'scales' },
    ];
  });
}

/** Name inside the iteration's folder. */
export function rankFileName(rank: number): string {
  return `${rankFileRoot(rank)}.pt`;
}

/** Folder inside a rank's archive. */
export function rankFileRoot(rank: number): string {
  return `mp_rank_${String(rank).padStart(2, '0')}_model_states`;
}
