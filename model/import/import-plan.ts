import { createHash } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { ConfigError } from '../../common/errors.js';
import { glm130b, impliedTokenizer, localShare, modelConfigToJson, parseModelConfig, type ModelConfig } from '../model-config.js';
import { quantizedNames } from '../store/glm-tensors.js';
import { openRegularFile } from '../store/open-regular-file.js';
import type { Provenance } from '../store/partial-store.js';
import { readJsonFile } from '../store/read-json-file.js';
import type { PlannedTensor } from '../store/store-files.js';
import { tensorBytes, tokenizerFileName, type StoreQuantization } from '../store/store-format.js';
import type { QuantizedBits } from './quantize.js';
import type { SatCheckpoint } from './sat-checkpoint.js';
import { findSourceTensors, unknownTensorNames, type SourceTensor } from './source-tensors.js';

export interface PlanOptions {
  /** Null: config.json beside the checkpoint, or GLM-130B's own values where the tensors have its shape. */
  readonly configPath?: string | null;
  /** Null: the file that the configuration names, if it is beside it; else the store has no tokenizer. */
  readonly tokenizerPath?: string | null;
  /** Null: as in the checkpoint. */
  readonly quantize?: QuantizedBits | null;
  /** Only with `quantize`; null: `vector`. */
  readonly group?: 'vector' | 128 | null;
  /** Ranks whose column shards share vector-wise scales; only with `quantize`. Null: the checkpoint's own. */
  readonly ranks?: number | null;
}

/** What a store will hold, and of what it is made. */
export interface ImportPlan {
  readonly config: ModelConfig;
  readonly quantization: StoreQuantization | null;
  readonly tokenizerPath: string | null;
  /** In the order of the forward pass. */
  readonly tensors: readonly PlannedSource[];
  /** Of the store's tensors. */
  readonly bytes: number;
  readonly warnings: readonly string[];
}

export interface PlannedSource {
  readonly source: SourceTensor;
  /** What it becomes: itself, or quantised weights and scales. */
  readonly outputs: readonly PlannedTensor[];
}

/**
 * Decides everything about the store that a checkpoint becomes; of its data nothing is read.
 * @throws CheckpointError for what is wrong with the checkpoint, ConfigError for options and configuration
 */
export async function planImport(checkpoint: SatCheckpoint, options: PlanOptions): Promise<ImportPlan> {
  const warnings: string[] = [];
  const { config: shape, path: configPath } = await chooseConfig(checkpoint, options.configPath ?? null);
  const sources = findSourceTensors(checkpoint, shape);
  for (const name of unknownTensorNames(checkpoint, sources)) warnings.push(`tensor ${name} belongs to no GLM model and is ignored`);
  const tokenizerPath = await chooseTokenizer(shape, { given: options.tokenizerPath ?? null, configPath, warnings });
  const config = { ...shape, tokenizer: tokenizerPath === null ? null : storedTokenizer(shape) };
  const quantization = chooseQuantization(checkpoint, { config, sources, options });
  const tensors = sources.map((source) => ({ source, outputs: planOutputs(source, quantization) }));
  const bytes = tensors.flatMap(({ outputs }) => outputs).reduce((sum, { dtype, shape: dims }) => sum + tensorBytes(dtype, dims), 0);
  return { config, quantization, tokenizerPath, tensors, bytes, warnings };
}

/**
 * Source: shapes, types and CRC-32 of all that is read, so the same checkpoint in parts and unpacked is the same. Options: what else the bytes
 * of the store depend on.
 */
export function provenanceOf(checkpoint: SatCheckpoint, plan: ImportPlan): Provenance {
  const { config, quantization, tokenizerPath, tensors } = plan;
  const source = tensors.map(({ source: { tensor, shards, quantized } }) => [
    tensor.name,
    [shards, quantized?.scales ?? []].map((each) =>
      each.map(({ dtype, shape, strides, storageOffset, crc32 }) => [dtype, shape, strides, storageOffset, crc32]),
    ),
  ]);
  const tokenizer = tokenizerPath === null ? null : createHash('sha256').update(readFileSync(tokenizerPath)).digest('hex');
  const outputs = tensors.flatMap((each) => each.outputs);
  return {
    source: { digest: digest(source), label: checkpoint.label },
    options: { digest: digest([modelConfigToJson(config), quantization, tokenizer, outputs]), label: describeOptions(plan) },
  };
}

function describeOptions({ config, quantization, tokenizerPath, tensors }: ImportPlan): string {
  const group = quantization === null ? '' : quantization.group === 128 ? ' in groups of 128' : ` for ${quantization.ranks} ranks`;
  const weights = quantization === null ? `${tensors[0]!.outputs[0]!.dtype} weights` : `INT${quantization.bits} weights${group}`;
  return `${weights}, ${config.numLayers} layers, ${tokenizerPath === null ? 'no tokenizer' : `tokenizer ${tokenizerPath}`}`;
}

function digest(value: unknown): string {
  return createHash('sha256').update(JSON.stringify(value)).digest('hex');
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
  { config, sources, options }: { config: ModelConfig; sources: readonly SourceTensor[]; options: PlanOptions },
): StoreQuantization | null {
  const wanted = options.quantize ?? null;
  const group = options.group ?? 'vector';
  const numRanks = checkpoint.ranks.length;
  const ranks = options.ranks ?? numRanks;
  const linear = sources.filter(({ tensor }) => tensor.isQuantizable);
  const present = linear[0]!.quantized?.bits ?? null;
  if (present !== null) {
    if (wanted !== null && wanted !== present) {
      throw new ConfigError(`${checkpoint.label} is quantised to INT${present} already, --quantize int${wanted} needs the fp16 checkpoint`);
    }
    if (group !== 'vector' || ranks !== numRanks) {
      throw new ConfigError(
        `${checkpoint.label} is quantised already, vector-wise for ${numRanks} ranks; --group ${group} and --ranks ${ranks} need the fp16 checkpoint`,
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

/** Tensors of the store that one tensor of the model becomes: the weight, then its scales. */
function planOutputs({ tensor, shards }: SourceTensor, quantization: StoreQuantization | null): PlannedTensor[] {
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
