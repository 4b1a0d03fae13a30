import type { LocalShare, ModelConfig } from './model-config.js';

/** Tokens of a KV block: what the server uses, and what is planned with. */
export const kvBlockSize = 16;

export type KvDtype = 'fp16' | 'fp32' | 'int8';

export interface KvBlockShape {
  readonly config: Pick<ModelConfig, 'numLayers' | 'hiddenSize' | 'numAttentionHeads'>;
  readonly share: Pick<LocalShare, 'localHeads'>;
  /** Tokens. */
  readonly blockSize: number;
  readonly dtype: KvDtype;
}

/** Bytes of K and V of one block on one rank, all layers (native/model/kv_cache.cc). INT8 has an fp16 scale for each token and head of K and of V. */
export function kvBlockBytes({ config, share, blockSize, dtype }: KvBlockShape): number {
  const headDim = config.hiddenSize / config.numAttentionHeads;
  const headBytes = dtype === 'int8' ? headDim + 2 : headDim * (dtype === 'fp16' ? 2 : 4);
  return 2 * config.numLayers * share.localHeads * blockSize * headBytes;
}
