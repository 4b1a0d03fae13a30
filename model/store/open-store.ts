import { existsSync } from 'node:fs';
import { stat } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { z } from 'zod';
import { CheckpointError } from '../../common/errors.js';
import { parseModelConfig, type ModelConfig } from '../model-config.js';
import { glmTensors, quantizedNames, type GlmTensor } from './glm-tensors.js';
import { readManifest } from './manifest.js';
import { readJsonFile } from './read-json-file.js';
import { readSafetensorsHeader, type SafetensorsEntry } from './safetensors-header.js';
import { configFileName, indexFileName, type StoreDtype, type StoreQuantization } from './store-format.js';

/** A checked store; tensor data has not been read. */
export interface Store {
  /** Absolute. */
  readonly dir: string;
  readonly config: ModelConfig;
  /** What config.json says; the tensors decide. */
  readonly quantization: StoreQuantization | null;
  /** In the order of {@link glmTensors}; a quantised weight is its qweight, then its scales. */
  readonly tensors: readonly StoreTensor[];
  /** Absolute; null: the store is served by token ids alone. */
  readonly tokenizerPath: string | null;
}

export interface StoreTensor {
  readonly name: string;
  /** Absolute path. */
  readonly file: string;
  /** Byte offset of the data in `file`. */
  readonly offset: number;
  readonly dtype: StoreDtype;
  readonly shape: readonly number[];
  readonly bytes: number;
  /** Recorded when the store was written, hexadecimal; null in a store of another origin. */
  readonly sha256: string | null;
}

/**
 * Opens the store of store/README.md and checks everything but the values: configuration, index, headers against the real files, and that
 * exactly the model's tensors are there in their shapes.
 * @throws CheckpointError, or ConfigError for a value of config.json
 */
export async function openStore(dir: string): Promise<Store> {
  const path = resolve(dir);
  const found = await stat(path).catch(() => null);
  if (!found) throw new CheckpointError(`model store ${path} does not exist; make one with \`tandem import\``);
  const configPath = join(path, configFileName);
  if (!found.isDirectory() || !existsSync(configPath)) {
    throw new CheckpointError(`${path} is no model store: it is not a folder with ${configFileName}; make one with \`tandem import\``);
  }
  const configJson = await readJsonFile(configPath, 2 ** 20);
  if ((configJson as { format?: unknown } | null)?.format !== 'tandem-store') {
    throw new CheckpointError(
      `${path} is no model store: ${configFileName} does not say "format": "tandem-store"; make one with \`tandem import\``,
    );
  }
  const config = parseModelConfig(configJson, configPath);
  const quantization = quantizationFile.safeParse(configJson);
  if (!quantization.success) throw new CheckpointError(`${configPath}: quantization: ${quantization.error.issues[0]!.message}`);

  const tensors = await readTensors(path);
  return {
    dir: path,
    config,
    quantization: quantization.data.quantization,
    tensors: selectTensors(tensors, config, path),
    tokenizerPath: await tokenizerPathOf(config, path),
  };
}

const quantizationFile = z.object({
  quantization: z
    .object({
      bits: z.union([z.literal(8), z.literal(4)]),
      group: z.union([z.literal('vector'), z.literal(128)]),
      ranks: z.int().min(1).nullable(),
    })
    .nullable(),
});

const indexFile = z.object({
  // The checksums of stores from before there was a manifest.
  metadata: z.object({ sha256: z.record(z.string(), z.string().regex(/^[0-9a-f]{64}$/)).optional() }).optional(),
  // A plain name: nothing that an index says leads out of the store's folder.
  weight_map: z.record(z.string(), z.string().regex(/^[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors$/)),
});

/** All tensors that the index lists, by name. */
async function readTensors(dir: string): Promise<Map<string, StoreTensor>> {
  const indexPath = join(dir, indexFileName);
  const parsed = indexFile.safeParse(await readJsonFile(indexPath, 64 * 2 ** 20));
  if (!parsed.success) {
    const issue = parsed.error.issues[0]!;
    throw new CheckpointError(
      `${indexPath}: ${issue.path.join('.')}: ${issue.message}; weight_map maps tensor names to files of the same folder`,
    );
  }
  const { weight_map: weightMap, metadata } = parsed.data;
  const manifest = await readManifest(dir);
  const headers = new Map<string, Map<string, SafetensorsEntry>>();
  for (const file of new Set(Object.values(weightMap))) headers.set(file, await readSafetensorsHeader(join(dir, file)));

  const tensors = new Map<string, StoreTensor>();
  for (const [name, file] of Object.entries(weightMap)) {
    const entry = headers.get(file)!.get(name);
    if (entry === undefined) throw new CheckpointError(`${indexPath} says that tensor ${name} is in ${file}, which does not have it`);
    const sha256 = manifest?.tensors[name]?.sha256 ?? metadata?.sha256?.[name] ?? null;
    tensors.set(name, { name, file: join(dir, file), ...entry, sha256 });
  }
  for (const [file, header] of headers) {
    for (const name of header.keys()) {
      if (weightMap[name] !== file) {
        throw new CheckpointError(`${join(dir, file)} has tensor ${name}, which ${indexFileName} does not list there`);
      }
    }
  }
  return tensors;
}

/** The model's tensors out of all that were found, none missing and none left. */
function selectTensors(found: ReadonlyMap<string, StoreTensor>, config: ModelConfig, dir: string): StoreTensor[] {
  const selected = glmTensors(config).flatMap((tensor) => {
    const { qweight, scales } = quantizedNames(tensor.name);
    if (tensor.isQuantizable && found.has(qweight)) return selectQuantized(tensor, found.get(qweight)!, found.get(scales), dir);
    const weight = found.get(tensor.name);
    if (weight === undefined) {
      throw new CheckpointError(`${dir}: tensor ${tensor.name} is missing, expected F16 or F32 ${shapeText(tensor.shape)}`);
    }
    if ((weight.dtype !== 'F16' && weight.dtype !== 'F32') || !sameShape(weight.shape, tensor.shape)) {
      throw new CheckpointError(
        `${dir}: tensor ${weight.name} is ${weight.dtype} ${shapeText(weight.shape)}, expected F16 or F32 ${shapeText(tensor.shape)}`,
      );
    }
    return [weight];
  });
  const names = new Set(selected.map(({ name }) => name));
  for (const name of found.keys()) {
    if (!names.has(name)) {
      throw new CheckpointError(`${dir}: tensor ${name} belongs to no model of this configuration, or its weight is there twice`);
    }
  }
  return selected;
}

function selectQuantized(tensor: GlmTensor, qweight: StoreTensor, scales: StoreTensor | undefined, dir: string): StoreTensor[] {
  const [rows, columns] = tensor.shape as readonly [number, number];
  const isInt4 = qweight.dtype === 'U8';
  const expected = [rows, isInt4 ? columns / 2 : columns];
  if ((qweight.dtype !== 'U8' && qweight.dtype !== 'I8') || !sameShape(qweight.shape, expected)) {
    throw new CheckpointError(
      `${dir}: tensor ${qweight.name} is ${qweight.dtype} ${shapeText(qweight.shape)}, ` +
        `expected I8 ${shapeText([rows, columns])} or U8 ${shapeText([rows, columns / 2])}`,
    );
  }
  if (scales === undefined) {
    throw new CheckpointError(`${dir}: tensor ${quantizedNames(tensor.name).scales} is missing, expected F16 [${rows}, groups]`);
  }
  const groups = scales.shape.length === 2 && scales.shape[0] === rows ? scales.shape[1]! : 0;
  const groupSize = columns / groups;
  if (scales.dtype !== 'F16' || !Number.isInteger(groupSize) || (isInt4 && groupSize % 2 !== 0)) {
    throw new CheckpointError(
      `${dir}: tensor ${scales.name} is ${scales.dtype} ${shapeText(scales.shape)}, expected F16 [${rows}, groups] with groups dividing ${columns}` +
        (isInt4 ? ' into even parts' : ''),
    );
  }
  return [qweight, scales];
}

async function tokenizerPathOf(config: ModelConfig, dir: string): Promise<string | null> {
  if (config.tokenizer === null) return null;
  const path = join(dir, config.tokenizer.file);
  const found = await stat(path).catch(() => null);
  if (!found?.isFile()) throw new CheckpointError(`${path} does not exist, ${configFileName} names it as the tokenizer`);
  return path;
}

function sameShape(a: readonly number[], b: readonly number[]): boolean {
  return a.length === b.length && a.every((count, axis) => count === b[axis]);
}

function shapeText(shape: readonly number[]): string {
  return `[${shape.join(', ')}]`;
}
