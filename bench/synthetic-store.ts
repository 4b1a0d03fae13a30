import type { ModelConfig } from '../model/model-config.js';
import { writeSyntheticStore as writeStore } from '../model/synth/write-synthetic.js';

/** The shape that the performance records are about; 3.2 GMAC per token. */
export const SYNTHETIC_CONFIG: ModelConfig = {
  numLayers: 16,
  hiddenSize: 4096,
  numAttentionHeads: 32,
  innerHiddenSize: 10944,
  vocabSize: 32000,
  maxSequenceLength: 2048,
  layernormEpsilon: 1e-5,
  rotaryBase: 10000,
  rotaryPrecision: 'fp32',
  specialTokens: { mask: 31990, gmask: 31991, smask: 31992, eod: 31993, sop: 31994, eop: 31995, enc: 31996, dblock: 31997, eos: 2 },
  tokenizer: null,
};

/**
 * Writes a store of random INT4 or INT8 weights (vector-wise scales for two ranks).
 *
 * @returns the bytes of all tensors
 */
export async function writeSyntheticStore(dir: string, config: ModelConfig, bits: 4 | 8 = 4): Promise<number> {
  return (await writeStore({ config, seed: '0', bits, ranks: 2, to: dir })).bytes;
}
