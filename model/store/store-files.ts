import { createHash } from 'node:crypto';
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { modelConfigToJson, type ModelConfig } from '../model-config.js';
import { manifestFileName, type ManifestEntry, type StoreManifest } from './manifest.js';
import { configFileName, indexFileName, tensorBytes, tokenizerFileName, type StoreDtype, type StoreQuantization } from './store-format.js';

export interface PlannedTensor {
  readonly name: string;
  readonly dtype: StoreDtype;
  readonly shape: readonly number[];
}

/** A safetensors file as it is going to be. */
export interface PlannedFile {
  readonly name: string;
  /** Length and JSON of the safetensors header. */
  readonly header: Buffer;
  readonly bytes: number;
  readonly tensors: readonly PlacedTensor[];
}

export interface PlacedTensor {
  readonly name: string;
  /** First byte of its data in the file. */
  readonly offset: number;
  readonly bytes: number;
}

export interface StoreDescription {
  readonly config: ModelConfig;
  readonly quantization: StoreQuantization | null;
  /** SentencePiece file to copy in; null where `config.tokenizer` is null. */
  readonly tokenizerPath: string | null;
}

/** Data bytes of one safetensors file; a single larger tensor gets a file of its own. */
export const maxShardBytes = 4 * 2 ** 30;

/** Which tensor goes where, in their order; the same for the same tensors. */
export function planFiles(tensors: readonly PlannedTensor[], shardBytes = maxShardBytes): PlannedFile[] {
  const groups: PlannedTensor[][] = [];
  let bytes = Infinity;
  for (const tensor of tensors) {
    const size = tensorBytes(tensor.dtype, tensor.shape);
    if (bytes + size > shardBytes) {
      groups.push([]);
      bytes = 0;
    }
    groups.at(-1)!.push(tensor);
    bytes += size;
  }
  const number = (value: number) => String(value).padStart(5, '0');
  return groups.map((group, i) => planFile(`model-${number(i + 1)}-of-${number(groups.length)}.safetensors`, group));
}

/**
 * Writes everything but the tensors, synced to disk: tokenizer, index, configuration, manifest.
 * @param checksums SHA-256 of every tensor, hexadecimal
 */
export async function writeDescription(
  folder: string,
  files: readonly PlannedFile[],
  checksums: Readonly<Record<string, string>>,
  { config, quantization, tokenizerPath }: StoreDescription,
): Promise<void> {
  const tensors = files.flatMap((file) => file.tensors.map(({ name, bytes }) => ({ name, bytes, file: file.name })));
  const index = {
    metadata: { total_size: tensors.reduce((sum, { bytes }) => sum + bytes, 0) },
    weight_map: Object.fromEntries(tensors.map(({ name, file }) => [name, file])),
  };
  const others: Record<string, ManifestEntry> = {};
  const write = async (name: string, content: Uint8Array): Promise<void> => {
    await writeFile(join(folder, name), content, { flush: true });
    others[name] = { bytes: content.length, sha256: createHash('sha256').update(content).digest('hex') };
  };
  if (tokenizerPath !== null) await write(tokenizerFileName, await readFile(tokenizerPath));
  await write(indexFileName, json(index));
  await write(configFileName, json({ ...modelConfigToJson(config), quantization }));
  const manifest: StoreManifest = {
    version: 1,
    hash: 'sha256',
    tensors: Object.fromEntries(tensors.map(({ name, file, bytes }) => [name, { file, bytes, sha256: checksums[name]! }])),
    files: { ...others },
  };
  await write(manifestFileName, json(manifest));
}

/** The header is padded with spaces so that the data starts at a multiple of 64 bytes. */
function planFile(name: string, tensors: readonly PlannedTensor[]): PlannedFile {
  const entries: Record<string, unknown> = { __metadata__: { format: 'tandem-store' } };
  const placed: PlacedTensor[] = [];
  let begin = 0;
  for (const { name: tensor, dtype, shape } of tensors) {
    const bytes = tensorBytes(dtype, shape);
    entries[tensor] = { dtype, shape, data_offsets: [begin, begin + bytes] };
    placed.push({ name: tensor, offset: begin, bytes });
    begin += bytes;
  }
  const text = Buffer.from(JSON.stringify(entries), 'utf8');
  const header = Buffer.alloc(Math.ceil((8 + text.length) / 64) * 64, ' ');
  header.writeBigUInt64LE(BigInt(header.length - 8));
  text.copy(header, 8);
  return {
    name,
    header,
    bytes: header.length + begin,
    tensors: placed.map((tensor) => ({ ...tensor, offset: header.length + tensor.offset })),
  };
}

function json(value: unknown): Buffer {
  return Buffer.from(`${JSON.stringify(value, null, 2)}\n`);
}
