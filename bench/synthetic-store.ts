import { randomFillSync } from 'node:crypto';
import type { ModelConfig } from '../model/model-config.js';
import { glmTensors, quantizedNames } from '../model/store/glm-tensors.js';
import { tensorBytes } from '../model/store/store-format.js';
import { StoreWriter, type PlannedTensor } from '../model/store/write-store.js';

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

/** Ranks that the vector-wise scales are for: column-split matrices have this many scale groups. */
const SCALE_RANKS = 2;
/** fp16 0.004 and 0.00027: random 4-bit (8-bit) values times this have the spread of usual weights, 0.02. */
const SCALE_HALF = { 4: 0x1c19, 8: 0x0c6d } as const;
const ONE_HALF = 0x3c00;
const PIECE_BYTES = 8 * 1024 * 1024;

/**
 * Writes a store of random INT4 or INT8 weights (vector-wise scales), fp16 embedding, neutral norms and zero biases.
 *
 * @returns the bytes of all tensors
 */
export async function writeSyntheticStore(dir: string, config: ModelConfig, bits: 4 | 8 = 4): Promise<number> {
  const plan: (PlannedTensor & { readonly fill: 'random' | 'embedding' | 'scales' | 'ones' | 'zeros' })[] = [];
  for (const { name, shape, split, isQuantizable } of glmTensors(config)) {
    const [rows, columns] = shape;
    if (isQuantizable) {
      const names = quantizedNames(name);
      const weight =
        bits === 4 ? ({ dtype: 'U8', shape: [rows, columns! / 2] } as const) : ({ dtype: 'I8', shape: [rows, columns!] } as const);
      plan.push({ name: names.qweight, ...weight, fill: 'random' });
      plan.push({ name: names.scales, dtype: 'F16', shape: [rows, split === 'columns' ? SCALE_RANKS : 1], fill: 'scales' });
    } else if (columns !== undefined) plan.push({ name, dtype: 'F16', shape, fill: 'embedding' });
    else plan.push({ name, dtype: 'F16', shape, fill: name.endsWith('norm.weight') ? 'ones' : 'zeros' });
  }
  const random = randomFillSync(Buffer.alloc(PIECE_BYTES));
  const embedding = new Uint16Array(PIECE_BYTES / 2).map((_, i) => 0x2400 | (random[i]! << 2) | ((random[i + 1]! & 1) << 15)); // +-0.016 .. 0.03
  const pieces = {
    random,
    embedding: Buffer.from(embedding.buffer),
    scales: Buffer.from(new Uint16Array(PIECE_BYTES / 2).fill(SCALE_HALF[bits]).buffer),
    ones: Buffer.from(new Uint16Array(PIECE_BYTES / 2).fill(ONE_HALF).buffer),
    zeros: Buffer.alloc(PIECE_BYTES),
  };
  const writer = await StoreWriter.create(dir, plan);
  try {
    let total = 0;
    for (const { name, dtype, shape, fill } of plan) {
      const bytes = tensorBytes(dtype, shape);
      for (let offset = 0; offset < bytes; offset += PIECE_BYTES)
        await writer.append(name, pieces[fill].subarray(0, Math.min(PIECE_BYTES, bytes - offset)));
      total += bytes;
    }
    await writer.commit({ config, quantization: { bits, group: 'vector', ranks: SCALE_RANKS }, tokenizerPath: null });
    return total;
  } finally {
    await writer.dispose();
  }
}
