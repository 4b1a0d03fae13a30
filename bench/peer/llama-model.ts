import { randomFillSync } from 'node:crypto';
import { open } from 'node:fs/promises';
import type { ModelConfig } from '../../model/model-config.js';
import { GGUF_TYPES, ggufHeader, ggufPadding, ggufTensorBytes, type GgufTensor, type GgufType, type GgufValue } from './gguf.js';

/** Types of the matrices and of the output projection: what llama.cpp's own quantiser makes of a model for "Q4_0". */
const MATRIX_TYPE = 'Q4_0';
const OUTPUT_TYPE = 'Q6_K';
const EMBEDDING = 'token_embd.weight';
/** Spread of the random weights, as usual in such models: no activation overflows, no logit is NaN. */
const SPREAD = 0.02;
const PIECE_BLOCKS = 1 << 16;

/**
 * Writes a llama model (RMSNorm, rotary, SwiGLU, no biases) of random weights whose matrices have the shapes of the GLM model `config`:
 * attention without grouped queries, a gated unit of the same inner size. It is run on token ids: the vocabulary has the pieces that llama.cpp
 * insists on, and fillers.
 */
export async function writeLlamaModel(file: string, config: ModelConfig): Promise<void> {
  const tensors = llamaTensors(config);
  const pieces = new Map<GgufType, Buffer>();
  const handle = await open(file, 'wx');
  try {
    await handle.writeFile(ggufHeader(llamaMetadata(config), tensors));
    for (const tensor of tensors) {
      if (!pieces.has(tensor.type)) pieces.set(tensor.type, randomBlocks(tensor.type, PIECE_BLOCKS));
      const piece = pieces.get(tensor.type)!;
      const bytes = ggufTensorBytes(tensor);
      for (let offset = 0; offset < bytes; offset += piece.length)
        await handle.writeFile(piece.subarray(0, Math.min(piece.length, bytes - offset)));
      await handle.writeFile(Buffer.alloc(ggufPadding(bytes)));
    }
  } finally {
    await handle.close();
  }
}

/** Weights that one decoded token needs: every tensor but the embedding once, and one row of that. */
export function llamaBytesPerToken(config: ModelConfig): number {
  const rows = (name: string): number => (name === EMBEDDING ? config.vocabSize : 1);
  return llamaTensors(config).reduce((sum, tensor) => sum + ggufTensorBytes(tensor) / rows(tensor.name), 0);
}

/** In the order of the forward pass. */
export function llamaTensors(config: ModelConfig): GgufTensor[] {
  const { hiddenSize: h, innerHiddenSize: f, vocabSize, numLayers } = config;
  const tensors: GgufTensor[] = [{ name: EMBEDDING, type: MATRIX_TYPE, shape: [vocabSize, h] }];
  for (let layer = 0; layer < numLayers; layer++) {
    const norm = (name: string): GgufTensor => ({ name: `blk.${layer}.${name}.weight`, type: 'F32', shape: [h] });
    const matrix = (name: string, rows: number, columns: number): GgufTensor => ({
      name: `blk.${layer}.${name}.weight`,
      type: MATRIX_TYPE,
      shape: [rows, columns],
    });
    tensors.push(norm('attn_norm'), ...['attn_q', 'attn_k', 'attn_v', 'attn_output'].map((name) => matrix(name, h, h)));
    tensors.push(norm('ffn_norm'), matrix('ffn_gate', f, h), matrix('ffn_up', f, h), matrix('ffn_down', h, f));
  }
  tensors.push(
    { name: 'output_norm.weight', type: 'F32', shape: [h] },
    { name: 'output.weight', type: OUTPUT_TYPE, shape: [vocabSize, h] },
  );
  return tensors;
}

/** The keys that llama.cpp needs of a "llama". */
export function llamaMetadata(config: ModelConfig): Record<string, GgufValue> {
  const uint32 = (value: number): GgufValue => ({ type: 'uint32', value });
  const headDim = config.hiddenSize / config.numAttentionHeads;
  return {
    'general.architecture': { type: 'string', value: 'llama' },
    'general.name': { type: 'string', value: 'random weights' },
    'general.file_type': uint32(2), // mostly Q4_0
    'general.quantization_version': uint32(2),
    ...vocabulary(config.vocabSize),
    'llama.vocab_size': uint32(config.vocabSize),
    'llama.context_length': uint32(config.maxSequenceLength),
    'llama.embedding_length': uint32(config.hiddenSize),
    'llama.block_count': uint32(config.numLayers),
    'llama.feed_forward_length': uint32(config.innerHiddenSize),
    'llama.attention.head_count': uint32(config.numAttentionHeads),
    'llama.attention.head_count_kv': uint32(config.numAttentionHeads),
    'llama.attention.layer_norm_rms_epsilon': { type: 'float32', value: 1e-5 },
    'llama.rope.dimension_count': uint32(headDim),
    'llama.rope.freq_base': { type: 'float32', value: config.rotaryBase },
  };
}

/** SentencePiece's three special tokens, one for each byte, fillers. */
function vocabulary(size: number): Record<string, GgufValue> {
  const [normal, unknown, control, byte] = [1, 2, 3, 6] as const;
  const special = ['<unk>', '<s>', '</s>'];
  const bytes = Array.from({ length: 256 }, (_, value) => `<0x${value.toString(16).toUpperCase().padStart(2, '0')}>`);
  const fillers = Array.from({ length: size - special.length - bytes.length }, (_, i) => `filler${i}`);
  return {
    'tokenizer.ggml.model': { type: 'string', value: 'llama' },
    'tokenizer.ggml.tokens': { type: 'strings', value: [...special, ...bytes, ...fillers] },
    'tokenizer.ggml.scores': { type: 'float32s', value: new Array<number>(size).fill(0) },
    'tokenizer.ggml.token_type': {
      type: 'int32s',
      value: [unknown, control, control, ...bytes.map(() => byte), ...fillers.map(() => normal)],
    },
    'tokenizer.ggml.unknown_token_id': { type: 'uint32', value: 0 },
    'tokenizer.ggml.bos_token_id': { type: 'uint32', value: 1 },
    'tokenizer.ggml.eos_token_id': { type: 'uint32', value: 2 },
  };
}

/** Blocks of random values with mean 0 and the usual spread; ones where the type is a norm's. */
function randomBlocks(type: GgufType, count: number): Buffer {
  const { blockBytes } = GGUF_TYPES[type];
  const blocks = randomFillSync(Buffer.alloc(count * blockBytes));
  for (let offset = 0; offset < blocks.length; offset += blockBytes) {
    if (type === 'F32') blocks.writeFloatLE(1, offset);
    else if (type === 'Q4_0') blocks.writeUInt16LE(half(SPREAD / rootMeanSquare(16)), offset);
    else if (type === 'Q6_K') {
      // 128 + 64 bytes of 6-bit values, 16 int8 scales, the scale of the scales
      blocks.fill(8, offset + 192, offset + 208);
      blocks.writeUInt16LE(half(SPREAD / (8 * rootMeanSquare(64))), offset + 208);
    } else throw new Error(`no random blocks of ${type}`);
  }
  return blocks;
}

/** Of integers spread evenly over `values` of them around zero. */
function rootMeanSquare(values: number): number {
  return Math.sqrt((values * values - 1) / 12);
}

/** Bits of a positive normal fp16, cut off. */
function half(value: number): number {
  const exponent = Math.floor(Math.log2(value));
  return ((exponent + 15) << 10) | Math.floor((value / 2 ** exponent - 1) * 1024);
}
