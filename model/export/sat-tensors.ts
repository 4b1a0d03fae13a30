import { ConfigError } from '../../common/errors.js';
import { floatToHalf } from '../import/float16.js';
import type { QuantizedBits } from '../import/quantize.js';
import { shardShape } from '../import/split.js';
import { localShare, type ModelConfig } from '../model-config.js';
import { glmTensors, type GlmTensor } from '../store/glm-tensors.js';
import type { PlannedTorchTensor } from './write-torch.js';

/** A tensor of a rank's file. */
export type SatTensor = SatWeights | SatFrequencies;

/** `scales` belong to the weight before them. */
export interface SatWeights extends PlannedTorchTensor {
  readonly part: 'values' | 'scales';
  readonly source: GlmTensor;
}

/** `inv_freq` of a layer: no code reads it, but the original's loader can miss it. Its bytes are {@link rotaryFrequencies}. */
export interface SatFrequencies extends PlannedTorchTensor {
  readonly part: 'frequencies';
}

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
  const weights = glmTensors(config).flatMap((source): SatWeights[] => {
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
  const frequencies = Array.from({ length: config.numLayers }, (_, layer): SatFrequencies => ({
    name: `transformer.layers.${layer}.attention.rotary_emb.inv_freq`,
    dtype: 'float16',
    shape: [config.hiddenSize / config.numAttentionHeads / 2],
    part: 'frequencies',
  }));
  return [...weights, ...frequencies];
}

/** fp16 `rotaryBase^(-2j/d)` for j in 0 .. d/2 - 1 (model-spec section 2). */
export function rotaryFrequencies({ hiddenSize, numAttentionHeads, rotaryBase }: ModelConfig): Buffer {
  const headDim = hiddenSize / numAttentionHeads;
  const halves = Uint16Array.from({ length: headDim / 2 }, (_, j) => floatToHalf(1 / rotaryBase ** ((2 * j) / headDim)));
  return Buffer.from(halves.buffer);
}

/** Name inside the iteration's folder. */
export function rankFileName(rank: number): string {
  return `${rankFileRoot(rank)}.pt`;
}

/** Folder inside a rank's archive. */
export function rankFileRoot(rank: number): string {
  return `mp_rank_${String(rank).padStart(2, '0')}_model_states`;
}
