/**
 * Test support: a small random GLM written as the engine reads one, and a plain double-precision forward pass of the same
 * weights, written from model-spec section 2 alone.
 */
import { writeFileSync } from 'node:fs';
import path from 'node:path';
import type { NativeEngineOptions, NativeTensor } from './addon.js';

export type WeightFormat = 'fp32' | 'fp16' | 'int8' | 'int4';

export interface RandomModel {
  readonly config: NativeEngineOptions['model'];
  readonly tensors: readonly NativeTensor[];
  /** Values as the engine sees them (dequantised), by name without `.qweight` and `.scales`. */
  readonly values: ReadonlyMap<string, Float64Array>;
}

/** Sizes that no vector width divides; 4 ranks cut INT4 columns inside a group of 8. */
export const smallConfig: NativeEngineOptions['model'] = {
  numLayers: 3,
  hiddenSize: 48,
  numAttentionHeads: 4,
  innerHiddenSize: 56,
  vocabSize: 132,
  maxSequenceLength: 128,
  layernormEpsilon: 1e-5,
  rotaryBase: 10000,
  rotaryPrecision: 'fp32',
};

/** mulberry32: numbers in [0, 1). */
export function randomNumbers(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Writes `weights.bin` and `norms.bin` into `folder`. */
export function writeRandomModel(folder: string, format: WeightFormat, seed: number, config = smallConfig): RandomModel {
  const { numLayers, hiddenSize: h, innerHiddenSize: f, vocabSize } = config;
  const random = randomNumbers(seed);
  const values = new Map<string, Float64Array>();
  const tensors: NativeTensor[] = [];
  const files = new Map<string, Buffer[]>();
  const store = (name: string, file: string, dtype: NativeTensor['dtype'], shape: number[], bytes: Buffer): void => {
    const parts = files.get(file) ?? [];
    files.set(file, parts);
    parts.push(Buffer.from([0xee])); // so that tensors begin anywhere
    const offset = parts.reduce((sum, part) => sum + part.length, 0);
    parts.push(bytes);
    tensors.push({ name, file: path.join(folder, file), offset, dtype, shape });
  };

  const uniform = (count: number, scale: number, offset = 0): Float64Array =>
    Float64Array.from({ length: count }, () => offset + (Math.floor(random() * 1023) - 511) * scale * 2 ** -9);
  const plain = (name: string, file: string, shape: number[], exact: Float64Array, half: boolean): void => {
    const data = exact.map((value) => (half ? fromHalf(toHalf(value)) : Math.fround(value)));
    values.set(name, data);
    const bytes = half ? Buffer.from(Uint16Array.from(data, toHalf).buffer) : Buffer.from(Float32Array.from(data).buffer);
    store(name, file, half ? 'F16' : 'F32', shape, bytes);
  };
  const vector = (name: string, size: number, scale: number, offset: number): void =>
    plain(name, 'norms.bin', [size], uniform(size, scale, offset), format !== 'fp32');
  const linear = (name: string, rows: number, columns: number, groups: number): void => {
    const scale = 2 ** -2; // sub-layers then matter as much as the residual
    if (format === 'fp32' || format === 'fp16') {
      plain(`${name}.weight`, 'weights.bin', [rows, columns], uniform(rows * columns, scale), format === 'fp16');
      return;
    }
    const most = format === 'int8' ? 127 : 7;
    const q = Int8Array.from({ length: rows * columns }, () => Math.floor(random() * (2 * most + 1)) - most);
    const scales = Float64Array.from({ length: rows * groups }, () => fromHalf(toHalf(((0.5 + random()) * scale) / most)));
    const size = columns / groups;
    values.set(
      `${name}.weight`,
      Float64Array.from(q, (value, i) => value * scales[Math.floor(i / columns) * groups + Math.floor((i % columns) / size)]!),
    );
    const packed = Buffer.alloc((rows * columns) / 2);
    for (let j = 0; j < packed.length; j++) packed[j] = ((q[2 * j]! & 15) << 4) | (q[2 * j + 1]! & 15);
    if (format === 'int8') store(`${name}.qweight`, 'weights.bin', 'I8', [rows, columns], Buffer.from(q.buffer));
    else store(`${name}.qweight`, 'weights.bin', 'U8', [rows, columns / 2], packed);
    store(`${name}.scales`, 'weights.bin', 'F16', [rows, groups], Buffer.from(Uint16Array.from(scales, toHalf).buffer));
  };

  plain('transformer.word_embeddings.weight', 'weights.bin', [vocabSize, h], uniform(vocabSize * h, 0.5), format !== 'fp32');
  for (let layer = 0; layer < numLayers; layer++) {
    const prefix = `transformer.layers.${layer}`;
    for (const norm of ['input_layernorm', 'post_attention_layernorm']) {
      vector(`${prefix}.${norm}.weight`, h, 0.25, 1);
      vector(`${prefix}.${norm}.bias`, h, 0.25, 0);
    }
    linear(`${prefix}.attention.query_key_value`, 3 * h, h, format === 'int4' ? h / 8 : 1);
    vector(`${prefix}.attention.query_key_value.bias`, 3 * h, 0.25, 0);
    linear(`${prefix}.attention.dense`, h, h, format === 'int4' ? h / 8 : 2);
    vector(`${prefix}.attention.dense.bias`, h, 0.25, 0);
    linear(`${prefix}.mlp.dense_h_to_4h`, 2 * f, h, format === 'int4' ? h / 8 : 1);
    vector(`${prefix}.mlp.dense_h_to_4h.bias`, 2 * f, 0.25, 0);
    linear(`${prefix}.mlp.dense_4h_to_h`, h, f, format === 'int4' ? f / 8 : 2);
    vector(`${prefix}.mlp.dense_4h_to_h.bias`, h, 0.25, 0);
  }
  vector('transformer.final_layernorm.weight', h, 0.25, 1);
  vector('transformer.final_layernorm.bias', h, 0.25, 0);
  for (const [file, parts] of files) writeFileSync(path.join(folder, file), Buffer.concat(parts));
  return { config, tensors, values };
}

/** A run of tokens of one sequence, as an Extend takes it. */
export interface ReferenceRun {
  readonly tokens: readonly number[];
  readonly positions: readonly number[];
  readonly bidirectionalTokens: number;
}

/** Logits [rows][V] of all rows of a sequence that was appended to run by run. */
export function referenceLogits(model: RandomModel, runs: readonly ReferenceRun[]): Float64Array[] {
  const { numLayers, hiddenSize: h, numAttentionHeads: heads, innerHiddenSize: f, vocabSize } = model.config;
  const get = (name: string): Float64Array => model.values.get(name)!;
  const tokens = runs.flatMap((run) => run.tokens);
  const positions = runs.flatMap((run) => run.positions);
  const visible: number[] = [];
  for (const run of runs) {
    const cached = visible.length;
    for (let i = 0; i < run.tokens.length; i++) visible.push(cached + Math.max(i + 1, run.bidirectionalTokens));
  }

  const embeddings = get('transformer.word_embeddings.weight');
  const alpha = Math.sqrt(2 * numLayers);
  let x = tokens.map((token) => embeddings.slice(token * h, (token + 1) * h));
  for (let layer = 0; layer < numLayers; layer++) {
    const prefix = `transformer.layers.${layer}`;
    const norm = (rows: Float64Array[], name: string): Float64Array[] =>
      rows.map((row) => layerNorm(row, get(`${name}.weight`), get(`${name}.bias`), model.config.layernormEpsilon));
    const linear = (rows: Float64Array[], name: string): Float64Array[] =>
      rows.map((row) => product(get(`${prefix}.${name}.weight`), row, get(`${prefix}.${name}.bias`)));

    const a = norm(x, `${prefix}.input_layernorm`);
    const attended = attention(linear(a, 'attention.query_key_value'), positions, visible, heads, h / heads, model.config.rotaryBase);
    const attentionOut = linear(attended, 'attention.dense');
    x = a.map((row, i) => row.map((value, c) => alpha * value + attentionOut[i]![c]!));
    const m = norm(x, `${prefix}.post_attention_layernorm`);
    const gated = linear(m, 'mlp.dense_h_to_4h').map((u) => Float64Array.from({ length: f }, (_, j) => u[j]! * gelu(u[f + j]!)));
    const mlpOut = linear(gated, 'mlp.dense_4h_to_h');
    x = m.map((row, i) => row.map((value, c) => alpha * value + mlpOut[i]![c]!));
  }
  const final = 'transformer.final_layernorm';
  return x.map((row) => {
    const y = layerNorm(row, get(`${final}.weight`), get(`${final}.bias`), model.config.layernormEpsilon);
    return product(embeddings, y, new Float64Array(vocabSize));
  });
}

/** log softmax(logits). */
export function logProbabilities(logits: ArrayLike<number>): Float64Array {
  const values = Float64Array.from(logits);
  const max = values.reduce((a, b) => Math.max(a, b));
  const sum = values.reduce((total, value) => total + Math.exp(value - max), 0);
  return values.map((value) => value - max - Math.log(sum));
}

function layerNorm(x: Float64Array, weight: Float64Array, bias: Float64Array, epsilon: number): Float64Array {
  const mean = x.reduce((a, b) => a + b) / x.length;
  const variance = x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / x.length;
  return x.map((value, i) => ((value - mean) / Math.sqrt(variance + epsilon)) * weight[i]! + bias[i]!);
}

/** W x + b with W [b.length, x.length]. */
function product(weight: Float64Array, x: Float64Array, bias: Float64Array): Float64Array {
  return bias.map((b, o) => {
    let sum = b;
    for (let c = 0; c < x.length; c++) sum += weight[o * x.length + c]! * x[c]!;
    return sum;
  });
}

function attention(
  qkv: Float64Array[],
  positions: readonly number[],
  visible: readonly number[],
  heads: number,
  d: number,
  base: number,
): Float64Array[] {
  const out = qkv.map(() => new Float64Array(heads * d));
  for (let head = 0; head < heads; head++) {
    const part = (row: Float64Array, which: number): Float64Array => row.slice((3 * head + which) * d, (3 * head + which + 1) * d);
    const q = qkv.map((row, i) => rotate(part(row, 0), positions[i]!, base));
    const k = qkv.map((row, i) => rotate(part(row, 1), positions[i]!, base));
    const v = qkv.map((row) => part(row, 2));
    for (const [i, query] of q.entries()) {
      const scores = k.slice(0, visible[i]).map((key) => key.reduce((sum, value, c) => sum + value * query[c]!, 0) / Math.sqrt(d));
      const weights = logProbabilities(scores).map(Math.exp);
      for (const [j, weight] of weights.entries()) for (let c = 0; c < d; c++) out[i]![head * d + c]! += weight * v[j]![c]!;
    }
  }
  return out;
}

/** Angles in fp32, as the specification has them; the rest in double precision. */
function rotate(x: Float64Array, position: number, base: number): Float64Array {
  const half = x.length / 2;
  return x.map((value, i) => {
    const j = i % half;
    const angle = Math.fround(position * Math.fround(base ** ((-2 * j) / x.length)));
    return i < half ? value * Math.cos(angle) - x[i + half]! * Math.sin(angle) : value * Math.cos(angle) + x[i - half]! * Math.sin(angle);
  });
}

function gelu(x: number): number {
  return 0.5 * x * (1 + erf(x / Math.SQRT2));
}

/** By its Taylor series, or beyond 3 by the continued fraction of erfc: exact to about 1e-14. */
function erf(x: number): number {
  const a = Math.abs(x);
  if (a > 6) return Math.sign(x);
  if (a > 3) {
    let fraction = 0;
    for (let k = 60; k >= 1; k--) fraction = k / 2 / (a + fraction);
    return Math.sign(x) * (1 - Math.exp(-a * a) / (Math.sqrt(Math.PI) * (a + fraction)));
  }
  let term = x;
  let sum = x;
  for (let n = 1; n < 100; n++) {
    term *= (-x * x) / n;
    sum += term / (2 * n + 1);
  }
  return (2 / Math.sqrt(Math.PI)) * sum;
}

function fromHalf(bits: number): number {
  const exponent = (bits >> 10) & 31;
  const mantissa = bits & 1023;
  const magnitude = exponent === 0 ? mantissa * 2 ** -24 : (1 + mantissa / 1024) * 2 ** (exponent - 15);
  return bits & 0x8000 ? -magnitude : magnitude;
}

/** Bits of the nearest fp16; |x| below 65504. */
function toHalf(x: number): number {
  const sign = x < 0 || Object.is(x, -0) ? 0x8000 : 0;
  const a = Math.abs(x);
  if (a < 2 ** -14) return sign | Math.round(a * 2 ** 24);
  let exponent = Math.floor(Math.log2(a));
  if (2 ** exponent > a) exponent -= 1;
  const mantissa = Math.round((a / 2 ** exponent - 1) * 1024); // 1024 carries into the exponent, as it should
  return sign | (((exponent + 15) << 10) + mantissa);
}
