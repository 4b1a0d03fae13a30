import type { ModelConfig } from '../model-config.js';

/**
 * How a tensor is divided over tensor-parallel ranks (model-spec section 1.2): `copied` to all, contiguous blocks of `rows` or `columns`, or
 * `glu-rows`, where each of the two halves of the rows is divided by itself.
 */
export type SplitKind = 'copied' | 'rows' | 'glu-rows' | 'columns';

/** One tensor of a GLM model, whole. */
export interface GlmTensor {
  /** GLM-130B's own name. */
  readonly name: string;
  readonly shape: readonly [number] | readonly [rows: number, columns: number];
  readonly split: SplitKind;
  /** One of the four weights of a layer that quantisation replaces. */
  readonly isQuantizable: boolean;
}

/** Every tensor that a model of this shape has, in the order of the forward pass; `inv_freq` is none of them. */
export function glmTensors(config: ModelConfig): GlmTensor[] {
  const { hiddenSize: h, innerHiddenSize: f, vocabSize, numLayers } = config;
  const tensors: GlmTensor[] = [tensor('transformer.word_embeddings.weight', [vocabSize, h], 'rows')];
  for (let layer = 0; layer < numLayers; layer++) {
    const prefix = `transformer.layers.${layer}`;
    tensors.push(
      tensor(`${prefix}.input_layernorm.weight`, [h], 'copied'),
      tensor(`${prefix}.input_layernorm.bias`, [h], 'copied'),
      linear(`${prefix}.attention.query_key_value.weight`, [3 * h, h], 'rows'),
      tensor(`${prefix}.attention.query_key_value.bias`, [3 * h], 'rows'),
      linear(`${prefix}.attention.dense.weight`, [h, h], 'columns'),
      tensor(`${prefix}.attention.dense.bias`, [h], 'copied'),
      tensor(`${prefix}.post_attention_layernorm.weight`, [h], 'copied'),
      tensor(`${prefix}.post_attention_layernorm.bias`, [h], 'copied'),
      linear(`${prefix}.mlp.dense_h_to_4h.weight`, [2 * f, h], 'glu-rows'),
      tensor(`${prefix}.mlp.dense_h_to_4h.bias`, [2 * f], 'glu-rows'),
      linear(`${prefix}.mlp.dense_4h_to_h.weight`, [h, f], 'columns'),
      tensor(`${prefix}.mlp.dense_4h_to_h.bias`, [h], 'copied'),
    );
  }
  tensors.push(tensor('transformer.final_layernorm.weight', [h], 'copied'), tensor('transformer.final_layernorm.bias', [h], 'copied'));
  return tensors;
}

/** Names of the store for a quantised `NAME.weight`. */
export function quantizedNames(weightName: string): { qweight: string; scales: string } {
  const stem = weightName.slice(0, -'.weight'.length);
  return { qweight: `${stem}.qweight`, scales: `${stem}.scales` };
}

function tensor(name: string, shape: GlmTensor['shape'], split: SplitKind): GlmTensor {
  return { name, shape, split, isQuantizable: false };
}

function linear(name: string, shape: readonly [number, number], split: SplitKind): GlmTensor {
  return { name, shape, split, isQuantizable: true };
}
