import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { ConfigError } from '../../common/errors.js';
import { glm130b, impliedTokenizer, localShare, parseModelConfig, type ModelConfig } from '../model-config.js';
import { quantizedNames } from '../store/glm-tensors.js';
import { openRegularFile } from '../store/open-regular-file.js';
import { readJsonFile } from '../store/read-json-file.js';
import { tensorBytes, tokenizerFileName, type StoreQuantization } from '../store/store-format.js';
import { StoreWriter, type PlannedTensor } from '../store/write-store.js';
import { quantizeRows, type QuantizedBits } from './quantize.js';
import type { TorchTensor } from './read-torch.js';
import { SatCheckpoint } from './sat-checkpoint.js';
import { findSourceTensors, unknownTensorNames, type SourceTensor } from './source-tensors.js';
import { mergeColumns, unsplitRowOrder } from './split.js';

export interface ImportOptions {
  /** SAT folder, with `latest` and the iteration's folder. */
  readonly from: string;
  /** Folder of the new store; absent or empty. */
  readonly to: string;
  /** Null: config.json in `from`, or GLM-130B's own values where the tensors have its shape. */
  readonly configPath?: string | null;
  /** Null: the file that the configuration names, if it is beside it; else the store has no tokenizer. */
  readonly tokenizerPath?: string | null;
  /** Null: as in the checkpoint. */
  readonly quantize?: QuantizedBits | null;
  /** Only with `quantize`; null: `vector`. */
  readonly group?: 'vector' | 128 | null;
  /** Ranks whose column shards share vector-wise scales; only with `quantize`. Null: the checkpoint's own. */
  readonly ranks?: number | null;
  readonly onProgress?: (progress: ImportProgress) => void;
  /** Aborting removes what was written. */
  readonly signal?: AbortSignal;
}

/** Sent when a tensor of the store is complete. */
export interface ImportProgress {
  readonly name: string;
  readonly tensors: number;
  readonly totalTensors: number;
  readonly bytes: number;
  readonly totalBytes: number;
}

export interface ImportResult {
  readonly config: ModelConfig;
  readonly quantization: StoreQuantization | null;
  readonly tensors: number;
  readonly bytes: number;
  /** One line each: what was ignored or looks odd. */
  readonly warnings: readonly string[];
}

/** Rows are read, merged and quantised in pieces of about this many bytes, so memory does not grow with the model. */
const pieceBytes = 32 * 2 ** 20;

/**
 * Turns a SAT checkpoint of any tensor-parallel degree, quantised or not, into a model store. Bits are kept, or quantised by
 * {@link quantizeRows}. The store appears complete or not at all.
 *
 * @throws CheckpointError for what is wrong with the checkpoint, ConfigError for options and configuration
 */
export async function importCheckpoint(options: ImportOptions): Promise<ImportResult> {
  const checkpoint = await SatCheckpoint.open(options.from);
  try {
    return await importOpened(checkpoint, options);
  } finally {
    await checkpoint.close();
  }
}

async function importOpened(checkpoint: SatCheckpoint, options: ImportOptions): Promise<ImportResult> {
  const warnings: string[] = [];
  const { config: shape, path: configPath } = await chooseConfig(checkpoint, options.configPath ?? null);
  const sources = findSourceTensors(checkpoint, shape);
  for (const name of unknownTensorNames(checkpoint, sources)) warnings.push(`tensor ${name} belongs to no GLM model and is ignored`);
  const tokenizerPath = await chooseTokenizer(shape, { given: options.tokenizerPath ?? null, configPath, warnings });
  const config = { ...shape, tokenizer: tokenizerPath === null ? null : storedTokenizer(shape) };
  const quantization = chooseQuantization(checkpoint, { config, sources, options });

  const outputs = sources.map((source) => ({ source, planned: planOutput(source, quantization) }));
  const plan = outputs.flatMap(({ planned }) => planned);
  const totalBytes = plan.reduce((sum, { dtype, shape: dims }) => sum + tensorBytes(dtype, dims), 0);
  const writer = await StoreWriter.create(options.to, plan);
  try {
    const done = { tensors: 0, bytes: 0 };
    for (const { source, planned } of outputs) {
      if (source.tensor.split === 'copied') await warnOfDifferentCopies(checkpoint, source, warnings);
      for await (const { name, bytes } of outputBytes(checkpoint, source, planned)) {
        options.signal?.throwIfAborted();
        await writer.append(name, bytes);
        done.bytes += bytes.length;
      }
      done.tensors += planned.length;
      options.onProgress?.({ name: source.tensor.name, ...done, totalTensors: plan.length, totalBytes });
    }
    await writer.commit({ config, quantization, tokenizerPath });
    return { config, quantization, tensors: plan.length, bytes: totalBytes, warnings };
  } finally {
    await writer.dispose();
  }
}

async function chooseConfig(checkpoint: SatCheckpoint, given: string | null): Promise<{ config: ModelConfig; path: string | null }> {
  const beside = join(checkpoint.dir, 'config.json');
  const path = given ?? (existsSync(beside) ? beside : null);
  if (path !== null) return { config: parseModelConfig(await readJsonFile(path, 2 ** 20), path), path };
  const seen = shapeOf(checkpoint);
  if (seen.numLayers === glm130b.numLayers && seen.vocabSize === glm130b.vocabSize && seen.hiddenSize === glm130b.hiddenSize) {
    return { config: glm130b, path: null };
  }
  throw new ConfigError(
    `${checkpoint.dir} has no config.json, and ${seen.numLayers} layers, vocabulary ${seen.vocabSize}, hidden size ${seen.hiddenSize} are not ` +
      "GLM-130B's 70, 150528, 12288; give --config FILE with num_layers, hidden_size, num_attention_heads, inner_hidden_size, vocab_size, " +
      'max_sequence_length and special_tokens',
  );
}

/** As far as tensors tell it; the number of heads and the context length they do not. */
function shapeOf(checkpoint: SatCheckpoint): { numLayers: number; vocabSize: number; hiddenSize: number } {
  const { tensors } = checkpoint.ranks[0]!;
  const [localVocab = 0, hiddenSize = 0] = tensors.get('transformer.word_embeddings.weight')?.shape ?? [];
  const numLayers = [...tensors.keys()].filter((name) => /^transformer\.layers\.\d+\.input_layernorm\.weight$/.test(name)).length;
  return { numLayers, vocabSize: localVocab * checkpoint.ranks.length, hiddenSize };
}

async function chooseTokenizer(
  config: ModelConfig,
  { given, configPath, warnings }: { given: string | null; configPath: string | null; warnings: string[] },
): Promise<string | null> {
  const named = config.tokenizer === null || configPath === null ? null : join(dirname(configPath), config.tokenizer.file);
  const path = given ?? (named !== null && existsSync(named) ? named : null);
  if (path === null) {
    const reason = named === null ? 'no tokenizer was given' : `${named} does not exist`;
    warnings.push(`${reason}: the store will take token ids but no text; give --tokenizer FILE for text`);
    return null;
  }
  await (await openRegularFile(path)).handle.close();
  return path;
}

function storedTokenizer(config: ModelConfig): ModelConfig['tokenizer'] {
  const layout = config.tokenizer ?? impliedTokenizer(config.specialTokens);
  if (layout === null) {
    throw new ConfigError(
      'a tokenizer was given, but the configuration names no image_token_offset and num_text_pieces, and the special tokens imply none',
    );
  }
  return { ...layout, file: tokenizerFileName };
}

/** What the store's weights will be, and whether that can be had from this checkpoint. */
function chooseQuantization(
  checkpoint: SatCheckpoint,
  { config, sources, options }: { config: ModelConfig; sources: readonly SourceTensor[]; options: ImportOptions },
): StoreQuantization | null {
  const wanted = options.quantize ?? null;
  const group = options.group ?? 'vector';
  const numRanks = checkpoint.ranks.length;
  const ranks = options.ranks ?? numRanks;
  const linear = sources.filter(({ tensor }) => tensor.isQuantizable);
  const present = linear[0]!.quantized?.bits ?? null;
  if (present !== null) {
    if (wanted !== null && wanted !== present) {
      throw new ConfigError(`${checkpoint.dir} is quantised to INT${present} already, --quantize int${wanted} needs the fp16 checkpoint`);
    }
    if (group !== 'vector' || ranks !== numRanks) {
      throw new ConfigError(
        `${checkpoint.dir} is quantised already, vector-wise for ${numRanks} ranks; --group ${group} and --ranks ${ranks} need the fp16 checkpoint`,
      );
    }
    return { bits: present, group, ranks };
  }
  if (wanted === null) {
    if ((options.group ?? options.ranks ?? null) === null) return null;
    throw new ConfigError('--group and --ranks say how to quantise; give --quantize int8 or int4 with them');
  }
  const float32 = linear.find(({ shards }) => shards[0]!.dtype !== 'float16');
  if (float32 !== undefined) {
    throw new ConfigError(`${float32.tensor.name} is ${float32.shards[0]!.dtype}; only fp16 weights are quantised`);
  }
  if (group === 128 && (options.ranks ?? null) !== null) {
    throw new ConfigError('--ranks belongs to --group vector; groups of 128 do not depend on ranks');
  }
  if (group === 'vector') localShare(config, ranks); // throws where a row of a column-split matrix has no such shards
  for (const { tensor } of linear) {
    const columns = tensor.shape[1]!;
    const groupSize = group === 128 ? 128 : tensor.split === 'columns' ? columns / ranks : columns;
    if (columns % groupSize !== 0 || (wanted === 4 && groupSize % 2 !== 0)) {
      throw new ConfigError(
        `${tensor.name} has ${columns} columns, which groups of ${groupSize} do not divide${wanted === 4 ? ' into even parts' : ''}; use --group vector or other --ranks`,
      );
    }
  }
  return { bits: wanted, group, ranks: group === 128 ? null : ranks };
}

/** Tensors of the store that one tensor of the model becomes, in the order in which {@link outputBytes} yields them. */
function planOutput({ tensor, shards }: SourceTensor, quantization: StoreQuantization | null): PlannedTensor[] {
  if (!tensor.isQuantizable || quantization === null) {
    return [{ name: tensor.name, dtype: shards[0]!.dtype === 'float32' ? 'F32' : 'F16', shape: tensor.shape }];
  }
  const [rows, columns] = tensor.shape as readonly [number, number];
  const { qweight, scales } = quantizedNames(tensor.name);
  const { bits, group, ranks } = quantization;
  const groups = group === 128 ? columns / 128 : tensor.split === 'columns' ? ranks! : 1;
  return [
    bits === 8 ? { name: qweight, dtype: 'I8', shape: [rows, columns] } : { name: qweight, dtype: 'U8', shape: [rows, columns / 2] },
    { name: scales, dtype: 'F16', shape: [rows, groups] },
  ];
}

async function* outputBytes(
  checkpoint: SatCheckpoint,
  { tensor, shards, quantized }: SourceTensor,
  planned: readonly PlannedTensor[],
): AsyncGenerator<{ name: string; bytes: Uint8Array }> {
  const [weight, scales] = planned as [PlannedTensor, PlannedTensor?];
  if (scales === undefined) {
    for await (const bytes of unsplitRows(checkpoint, tensor.split, shards)) yield { name: weight.name, bytes };
  } else if (quantized !== null) {
    for await (const bytes of unsplitRows(checkpoint, tensor.split, shards)) yield { name: weight.name, bytes };
    // A rank's scales are a column: one number for each of its rows.
    for await (const bytes of unsplitRows(checkpoint, tensor.split, quantized.scales)) yield { name: scales.name, bytes };
  } else {
    const bits = weight.dtype === 'I8' ? 8 : 4;
    const pieces: Uint8Array[] = [];
    for await (const bytes of unsplitRows(checkpoint, tensor.split, shards)) {
      const rows = quantizeRows(asUint16(bytes), tensor.shape[1]!, { groups: scales.shape[1]!, bits, name: tensor.name });
      pieces.push(asBytes(rows.scales));
      yield { name: weight.name, bytes: rows.qweight };
    }
    yield { name: scales.name, bytes: Buffer.concat(pieces) };
  }
}

/** Rows of the unsplit tensor in their order, in pieces of whole rows. */
async function* unsplitRows(
  checkpoint: SatCheckpoint,
  split: SourceTensor['tensor']['split'],
  shards: readonly TorchTensor[],
): AsyncGenerator<Uint8Array> {
  const rows = shards[0]!.shape[0]!;
  if (split === 'columns') {
    for (const [begin, end] of pieces(0, rows, rowBytesOf(shards[0]!) * shards.length)) {
      const parts: Buffer[] = [];
      for (const [rank, shard] of shards.entries()) parts.push(await checkpoint.ranks[rank]!.readRows(shard, begin, end));
      yield mergeColumns(parts, end - begin);
    }
    return;
  }
  const segments = split === 'copied' ? [{ rank: 0, begin: 0, end: rows }] : unsplitRowOrder(split, rows, shards.length);
  for (const segment of segments) {
    for (const [begin, end] of pieces(segment.begin, segment.end, rowBytesOf(shards[0]!))) {
      yield await checkpoint.ranks[segment.rank]!.readRows(shards[segment.rank]!, begin, end);
    }
  }
}

function* pieces(begin: number, end: number, rowBytes: number): Generator<[begin: number, end: number]> {
  const step = Math.max(1, Math.floor(pieceBytes / rowBytes));
  for (let row = begin; row < end; row += step) yield [row, Math.min(end, row + step)];
}

function rowBytesOf(tensor: TorchTensor): number {
  return tensor.shape.slice(1).reduce((bytes, count) => bytes * count, tensor.itemBytes);
}

/** The first rank's copy is taken, as the original does; other bits in another rank mean that the files do not belong together. */
async function warnOfDifferentCopies(checkpoint: SatCheckpoint, { tensor, shards }: SourceTensor, warnings: string[]): Promise<void> {
  const first = await checkpoint.ranks[0]!.readTensor(shards[0]!);
  for (let rank = 1; rank < shards.length; rank++) {
    if (first.equals(await checkpoint.ranks[rank]!.readTensor(shards[rank]!))) continue;
    warnings.push(
      `tensor ${tensor.name} differs between rank 0 and rank ${rank}; rank 0's is used. Do these files belong to one checkpoint?`,
    );
  }
}

function asUint16(bytes: Uint8Array): Uint16Array {
  const aligned = bytes.byteOffset % 2 === 0 ? bytes : new Uint8Array(bytes);
  return new Uint16Array(aligned.buffer, aligned.byteOffset, aligned.length / 2);
}

function asBytes(halves: Uint16Array): Uint8Array {
  return new Uint8Array(halves.buffer, halves.byteOffset, halves.byteLength);
}
