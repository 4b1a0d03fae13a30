/** Data types of a store's tensors, by their safetensors names. */
export type StoreDtype = 'F32' | 'F16' | 'I8' | 'U8';

export const dtypeBytes: Readonly<Record<StoreDtype, number>> = { F32: 4, F16: 2, I8: 1, U8: 1 };

export const configFileName = 'config.json';
export const indexFileName = 'model.safetensors.index.json';
export const tokenizerFileName = 'tokenizer.model';

/** How the linear weights were quantised; describes for people, readers go by the tensors. */
export interface StoreQuantization {
  readonly bits: 8 | 4;
  /** `vector`: GLM-130B's scheme, one scale for the columns of a rank's shard; 128: one for each 128 columns. */
  readonly group: 'vector' | 128;
  /** Ranks whose column shards the vector-wise scales belong to; null for groups of 128. */
  readonly ranks: number | null;
}

/** Bytes of a dense tensor. @returns a number that is not a safe integer where the product overflows */
export function tensorBytes(dtype: StoreDtype, shape: readonly number[]): number {
  return shape.reduce((total, count) => total * count, dtypeBytes[dtype]);
}
