import { createHash, randomBytes, type Hash } from 'node:crypto';
import { mkdir, open, readdir, readFile, rename, rm, writeFile, type FileHandle } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { ConfigError } from '../../common/errors.js';
import { modelConfigToJson, type ModelConfig } from '../model-config.js';
import { manifestFileName, type ManifestEntry, type StoreManifest } from './manifest.js';
import { configFileName, indexFileName, tensorBytes, tokenizerFileName, type StoreDtype, type StoreQuantization } from './store-format.js';

export interface PlannedTensor {
  readonly name: string;
  readonly dtype: StoreDtype;
  readonly shape: readonly number[];
}

export interface StoreDescription {
  readonly config: ModelConfig;
  readonly quantization: StoreQuantization | null;
  /** SentencePiece file to copy in; null where `config.tokenizer` is null. */
  readonly tokenizerPath: string | null;
}

/** Data bytes of one safetensors file; a single larger tensor gets a file of its own. */
const maxShardBytes = 4 * 2 ** 30;

interface ShardFile {
  readonly name: string;
  readonly tensors: PlannedTensor[];
}

/**
 * Writes a store into a temporary folder beside the target and renames it there at the end, synced to disk: the target is either absent or
 * complete. What is to be written is known up front, so every header precedes its data and tensors stream through.
 */
export class StoreWriter {
  private readonly checksums: Record<string, string> = {};
  private readonly files: Record<string, ManifestEntry> = {};
  private readonly queue: { tensor: PlannedTensor; shard: ShardFile }[];
  private file: { shard: ShardFile; handle: FileHandle } | null = null;
  private current: { bytesLeft: number; hash: Hash } | null = null;

  private constructor(
    private readonly target: string,
    private readonly folder: string,
    private readonly shards: readonly ShardFile[],
  ) {
    this.queue = shards.flatMap((shard) => shard.tensors.map((tensor) => ({ tensor, shard })));
  }

  /** @throws ConfigError where the target exists and is not an empty folder, or cannot be created */
  static async create(target: string, tensors: readonly PlannedTensor[], shardBytes = maxShardBytes): Promise<StoreWriter> {
    const path = resolve(target);
    await refuseExistingTarget(path);
    const folder = join(dirname(path), `.${basename(path)}.partial-${process.pid}-${randomBytes(4).toString('hex')}`);
    await mkdir(folder, { recursive: true }).catch((error: NodeJS.ErrnoException) => {
      throw new ConfigError(`${dirname(path)} cannot be written to (${error.code}); choose another target`);
    });
    return new StoreWriter(path, folder, planShards(tensors, shardBytes));
  }

  /** Appends bytes to the tensor `name`; tensors come in the planned order, each in any number of pieces. */
  async append(name: string, bytes: Uint8Array): Promise<void> {
    const next = this.queue[0];
    if (next?.tensor.name !== name) throw new Error(`tensor ${name} is written where ${next?.tensor.name ?? 'nothing'} is due`);
    this.current ??= { bytesLeft: tensorBytes(next.tensor.dtype, next.tensor.shape), hash: createHash('sha256') };
    if (bytes.length > this.current.bytesLeft) throw new Error(`tensor ${name} gets more bytes than its shape has`);
    const handle = await this.openShard(next.shard);
    await handle.writeFile(bytes); // at the handle's position, all of it
    this.current.hash.update(bytes);
    this.current.bytesLeft -= bytes.length;
    if (this.current.bytesLeft > 0) return;
    this.checksums[name] = this.current.hash.digest('hex');
    this.current = null;
    this.queue.shift();
  }

  /** Writes configuration and index, syncs everything and puts the store in its place. */
  async commit({ config, quantization, tokenizerPath }: StoreDescription): Promise<void> {
    if (this.queue.length > 0) throw new Error(`tensor ${this.queue[0]!.tensor.name} was never written`);
    await this.closeShard();
    if (tokenizerPath !== null) await this.writeFile(tokenizerFileName, await readFile(tokenizerPath));
    await this.writeFile(indexFileName, json(this.index()));
    await this.writeFile(configFileName, json({ ...modelConfigToJson(config), quantization }));
    await this.writeFile(manifestFileName, json(this.manifest()));
    await syncPath(this.folder);
    await refuseExistingTarget(this.target);
    await rename(this.folder, this.target).catch((error: NodeJS.ErrnoException) => {
      // rename(2) replaces an empty folder and no other: somebody else was faster.
      throw error.code === 'ENOTEMPTY' || error.code === 'EEXIST' ? existingTargetError(this.target) : error;
    });
    await syncPath(dirname(this.target));
  }

  /** Removes what was written. After {@link commit} there is nothing to remove. */
  async dispose(): Promise<void> {
    await this.file?.handle.close();
    this.file = null;
    await rm(this.folder, { recursive: true, force: true });
  }

  private async openShard(shard: ShardFile): Promise<FileHandle> {
    if (this.file?.shard === shard) return this.file.handle;
    await this.closeShard();
    const handle = await open(join(this.folder, shard.name), 'wx');
    this.file = { shard, handle };
    await handle.writeFile(header(shard.tensors));
    return handle;
  }

  private async closeShard(): Promise<void> {
    if (this.file === null) return;
    await this.file.handle.sync();
    await this.file.handle.close();
    this.file = null;
  }

  private index(): unknown {
    const tensors = this.tensors();
    const total = tensors.reduce((sum, { bytes }) => sum + bytes, 0);
    return { metadata: { total_size: total }, weight_map: Object.fromEntries(tensors.map(({ name, file }) => [name, file])) };
  }

  private manifest(): StoreManifest {
    const tensors = this.tensors().map(({ name, ...rest }) => [name, { ...rest, sha256: this.checksums[name]! }] as const);
    return { version: 1, hash: 'sha256', tensors: Object.fromEntries(tensors), files: this.files };
  }

  private tensors(): { name: string; file: string; bytes: number }[] {
    return this.shards.flatMap((shard) =>
      shard.tensors.map(({ name, dtype, shape }) => ({ name, file: shard.name, bytes: tensorBytes(dtype, shape) })),
    );
  }

  private async writeFile(name: string, content: Uint8Array): Promise<void> {
    await writeFile(join(this.folder, name), content, { flag: 'wx', flush: true });
    this.files[name] = { bytes: content.length, sha256: createHash('sha256').update(content).digest('hex') };
  }
}

function json(value: unknown): Buffer {
  return Buffer.from(`${JSON.stringify(value, null, 2)}\n`);
}

async function refuseExistingTarget(path: string): Promise<void> {
  const content = await readdir(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return [];
    throw new ConfigError(`target ${path} is no folder or cannot be read (${error.code}); choose another target`);
  });
  if (content.length > 0) throw existingTargetError(path);
}

function existingTargetError(path: string): ConfigError {
  return new ConfigError(`target ${path} exists and is not empty; remove it or choose another target`);
}

function planShards(tensors: readonly PlannedTensor[], shardBytes: number): ShardFile[] {
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
  return groups.map((group, i) => ({ name: `model-${number(i + 1)}-of-${number(groups.length)}.safetensors`, tensors: group }));
}

/** Length and JSON of a safetensors header, padded with spaces so that the data starts at a multiple of 64 bytes. */
function header(tensors: readonly PlannedTensor[]): Buffer {
  const entries: Record<string, unknown> = { __metadata__: { format: 'tandem-store' } };
  let offset = 0;
  for (const { name, dtype, shape } of tensors) {
    const end = offset + tensorBytes(dtype, shape);
    entries[name] = { dtype, shape, data_offsets: [offset, end] };
    offset = end;
  }
  const json = Buffer.from(JSON.stringify(entries), 'utf8');
  const padded = Buffer.alloc(Math.ceil((8 + json.length) / 64) * 64, ' ');
  padded.writeBigUInt64LE(BigInt(padded.length - 8));
  json.copy(padded, 8);
  return padded;
}

async function syncPath(path: string): Promise<void> {
  const handle = await open(path, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}
