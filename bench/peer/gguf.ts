/** The GGUF container (version 3) as llama.cpp reads it: header, metadata, tensor directory, aligned data. Format: ggml's docs/gguf.md. */

/** What a tensor's data consists of: blocks of so many values, in so many bytes. */
export const GGUF_TYPES = {
  F32: { id: 0, blockValues: 1, blockBytes: 4 },
  F16: { id: 1, blockValues: 1, blockBytes: 2 },
  Q4_0: { id: 2, blockValues: 32, blockBytes: 18 },
  Q8_0: { id: 8, blockValues: 32, blockBytes: 34 },
  Q6_K: { id: 14, blockValues: 256, blockBytes: 210 },
} as const;
export type GgufType = keyof typeof GGUF_TYPES;

export interface GgufTensor {
  readonly name: string;
  readonly type: GgufType;
  /** Rows and columns, as everywhere in this project; GGUF has them the other way round. */
  readonly shape: readonly number[];
}

export type GgufValue =
  | { readonly type: 'uint32'; readonly value: number }
  | { readonly type: 'float32'; readonly value: number }
  | { readonly type: 'string'; readonly value: string }
  | { readonly type: 'strings'; readonly value: readonly string[] }
  | { readonly type: 'int32s'; readonly value: readonly number[] }
  | { readonly type: 'float32s'; readonly value: readonly number[] };

export const GGUF_ALIGNMENT = 32;
const VERSION = 3;
const VALUE_IDS = { uint32: 4, int32: 5, float32: 6, string: 8, array: 9 } as const;

/** @throws Error where a row is no whole number of blocks */
export function ggufTensorBytes({ name, type, shape }: GgufTensor): number {
  const { blockValues, blockBytes } = GGUF_TYPES[type];
  const columns = shape.at(-1)!;
  if (columns % blockValues !== 0) throw new Error(`${name}: rows of ${columns} values are no whole blocks of ${blockValues} (${type})`);
  return (shape.reduce((product, size) => product * size, 1) / blockValues) * blockBytes;
}

/** Bytes from the end of one tensor's data to the beginning of the next's. */
export function ggufPadding(bytes: number): number {
  return -bytes & (GGUF_ALIGNMENT - 1);
}

/** All that comes before the data; each tensor's data follows in this order, with {@link ggufPadding} behind it. */
export function ggufHeader(metadata: Readonly<Record<string, GgufValue>>, tensors: readonly GgufTensor[]): Buffer {
  const parts: Buffer[] = [Buffer.from('GGUF'), uint32(VERSION), uint64(tensors.length), uint64(Object.keys(metadata).length)];
  for (const [key, entry] of Object.entries(metadata)) parts.push(string(key), encodeValue(entry));
  let offset = 0;
  for (const tensor of tensors) {
    const sizes = [...tensor.shape].reverse();
    parts.push(string(tensor.name), uint32(sizes.length), ...sizes.map(uint64), uint32(GGUF_TYPES[tensor.type].id), uint64(offset));
    const bytes = ggufTensorBytes(tensor);
    offset += bytes + ggufPadding(bytes);
  }
  const header = Buffer.concat(parts);
  return Buffer.concat([header, Buffer.alloc(ggufPadding(header.length))]);
}

/** The value behind its type. */
function encodeValue(entry: GgufValue): Buffer {
  const array = (id: number, items: readonly Buffer[]): Buffer[] => [uint32(VALUE_IDS.array), uint32(id), uint64(items.length), ...items];
  const encode = (): Buffer[] => {
    switch (entry.type) {
      case 'uint32':
        return [uint32(VALUE_IDS.uint32), uint32(entry.value)];
      case 'float32':
        return [uint32(VALUE_IDS.float32), float32(entry.value)];
      case 'string':
        return [uint32(VALUE_IDS.string), string(entry.value)];
      case 'strings':
        return array(VALUE_IDS.string, entry.value.map(string));
      case 'int32s':
        return array(
          VALUE_IDS.int32,
          entry.value.map((value) => uint32(value >>> 0)),
        );
      case 'float32s':
        return array(VALUE_IDS.float32, entry.value.map(float32));
    }
  };
  return Buffer.concat(encode());
}

function string(text: string): Buffer {
  const bytes = Buffer.from(text, 'utf8');
  return Buffer.concat([uint64(bytes.length), bytes]);
}

function uint32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}

function float32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeFloatLE(value);
  return bytes;
}

function uint64(value: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(value));
  return bytes;
}
