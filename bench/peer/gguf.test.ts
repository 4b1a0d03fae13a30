import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, test } from 'vitest';
import { SYNTHETIC_CONFIG } from '../synthetic-store.js';
import { GGUF_ALIGNMENT, ggufHeader, ggufTensorBytes } from './gguf.js';
import { llamaBytesPerToken, llamaMetadata, llamaTensors, writeLlamaModel } from './llama-model.js';

const folder = mkdtempSync(join(tmpdir(), 'tandem-gguf-test-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const config = { ...SYNTHETIC_CONFIG, numLayers: 2, hiddenSize: 256, numAttentionHeads: 4, innerHiddenSize: 96, vocabSize: 300 };

interface ParsedTensor {
  readonly sizes: number[];
  readonly type: number;
  readonly offset: number;
}

/** A reader of its own, after ggml's docs/gguf.md. */
function parse(bytes: Buffer) {
  let at = 0;
  const u32 = (): number => bytes.readUInt32LE((at += 4) - 4);
  const u64 = (): number => Number(bytes.readBigUInt64LE((at += 8) - 8));
  const text = (): string => {
    const length = u64();
    return bytes.toString('utf8', at, (at += length));
  };
  const value = (type: number): unknown => {
    if (type === 4) return u32();
    if (type === 5) return bytes.readInt32LE((at += 4) - 4);
    if (type === 6) return bytes.readFloatLE((at += 4) - 4);
    if (type === 8) return text();
    if (type !== 9) throw new Error(`type ${type}`);
    const [itemType, count] = [u32(), u64()];
    return Array.from({ length: count }, () => value(itemType));
  };
  const magic = bytes.toString('latin1', 0, (at = 4));
  const [version, numTensors, numEntries] = [u32(), u64(), u64()];
  const metadata: Record<string, unknown> = {};
  for (let i = 0; i < numEntries; i++) {
    const key = text();
    metadata[key] = value(u32());
  }
  const tensors: Record<string, ParsedTensor> = {};
  for (let i = 0; i < numTensors; i++) {
    const name = text();
    const sizes = Array.from({ length: u32() }, u64);
    tensors[name] = { sizes, type: u32(), offset: u64() };
  }
  return { magic, version, metadata, tensors, headerBytes: Math.ceil(at / GGUF_ALIGNMENT) * GGUF_ALIGNMENT };
}

test('a header reads back as it was given', () => {
  const header = ggufHeader(
    {
      a: { type: 'uint32', value: 7 },
      b: { type: 'string', value: 'wörter' },
      c: { type: 'float32', value: 0.5 },
      d: { type: 'strings', value: ['x', ''] },
      e: { type: 'int32s', value: [1, -2] },
      f: { type: 'float32s', value: [] },
    },
    [
      { name: 'norm', type: 'F32', shape: [3] },
      { name: 'matrix', type: 'Q4_0', shape: [5, 64] },
      { name: 'next', type: 'F16', shape: [1, 2] },
    ],
  );
  const parsed = parse(header);
  expect(parsed).toEqual({
    ...{ magic: 'GGUF', version: 3, headerBytes: header.length },
    metadata: { a: 7, b: 'wörter', c: 0.5, d: ['x', ''], e: [1, -2], f: [] },
    tensors: {
      norm: { sizes: [3], type: 0, offset: 0 },
      matrix: { sizes: [64, 5], type: 2, offset: 32 },
      next: { sizes: [2, 1], type: 1, offset: 32 + 192 }, // 5 x 2 blocks of 18 bytes, and padding
    },
  });
});

test('rows that are no whole blocks are refused', () => {
  expect(() => ggufTensorBytes({ name: 'w', type: 'Q6_K', shape: [4, 128] })).toThrow('w: rows of 128 values');
});

test('a model file has every tensor of a llama, each where the header says, with finite weights of the usual spread', async () => {
  const file = join(folder, 'model.gguf');
  await writeLlamaModel(file, config);
  const bytes = readFileSync(file);
  const { metadata, tensors, headerBytes } = parse(bytes);
  expect(Object.keys(tensors)).toHaveLength(3 + 9 * config.numLayers);
  expect(tensors['blk.1.ffn_down.weight']!.sizes).toEqual([96, 256]);
  expect(metadata['tokenizer.ggml.tokens']).toHaveLength(config.vocabSize);
  expect(new Set(metadata['tokenizer.ggml.tokens'] as string[]).size).toBe(config.vocabSize);
  expect(metadata).toMatchObject({ 'general.architecture': 'llama', 'llama.attention.head_count_kv': 4, 'llama.rope.dimension_count': 64 });

  const last = llamaTensors(config).at(-1)!;
  const end = headerBytes + tensors[last.name]!.offset + ggufTensorBytes(last);
  expect(bytes.length).toBe(Math.ceil(end / GGUF_ALIGNMENT) * GGUF_ALIGNMENT);

  const ofTensor = (name: string): Buffer => bytes.subarray(headerBytes + tensors[name]!.offset);
  expect(spread(dequantizeQ4(ofTensor('blk.0.attn_q.weight'), 256))).toBeCloseTo(0.02, 3);
  expect(spread(dequantizeQ6(ofTensor('output.weight'), 32))).toBeCloseTo(0.02, 3);
  const norm = ofTensor('output_norm.weight');
  for (let i = 0; i < config.hiddenSize; i++) expect(norm.readFloatLE(4 * i)).toBe(1);
});

test('a decoded token needs every matrix once, and one row of the embedding', () => {
  const { numLayers, hiddenSize: h, innerHiddenSize: f, vocabSize } = SYNTHETIC_CONFIG;
  const layers = (numLayers * (4 * h * h + 3 * h * f) * 18) / 32;
  const output = (vocabSize * h * 210) / 256;
  const norms = (2 * numLayers + 1) * h * 4;
  expect(llamaBytesPerToken(SYNTHETIC_CONFIG)).toBe(layers + output + norms + (h * 18) / 32);
  expect(llamaMetadata(SYNTHETIC_CONFIG)['llama.vocab_size']).toEqual({ type: 'uint32', value: vocabSize });
});

function dequantizeQ4(bytes: Buffer, blocks: number): number[] {
  return Array.from({ length: blocks }, (_, block) => {
    const scale = fromHalf(bytes.readUInt16LE(block * 18));
    return [...bytes.subarray(block * 18 + 2, block * 18 + 18)].flatMap((byte) => [scale * ((byte & 15) - 8), scale * ((byte >> 4) - 8)]);
  }).flat();
}

/** In another order than llama.cpp's, which makes no difference to the spread. */
function dequantizeQ6(bytes: Buffer, blocks: number): number[] {
  return Array.from({ length: blocks }, (_, block) => {
    const [low, high] = [bytes.subarray(block * 210, block * 210 + 128), bytes.subarray(block * 210 + 128, block * 210 + 192)];
    const scale = fromHalf(bytes.readUInt16LE(block * 210 + 208));
    return Array.from({ length: 256 }, (_, i) => {
      const bits = ((low[i >> 1]! >> (4 * (i & 1))) & 15) | (((high[i >> 2]! >> (2 * (i & 3))) & 3) << 4);
      return scale * bytes.readInt8(block * 210 + 192 + (i >> 4)) * (bits - 32);
    });
  }).flat();
}

function fromHalf(bits: number): number {
  const [exponent, fraction] = [(bits >> 10) & 31, bits & 1023];
  return exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15);
}

function spread(values: readonly number[]): number {
  expect(values.every(Number.isFinite)).toBe(true);
  return Math.sqrt(values.reduce((sum, value) => sum + value * value, 0) / values.length);
}
