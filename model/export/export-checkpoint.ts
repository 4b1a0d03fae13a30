import { copyFile, mkdir, writeFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { CheckpointError, ConfigError } from '../../common/errors.js';
import { loadImportKernels, type ImportKernels } from '../import/import-kernels.js';
import type { QuantizedBits } from '../import/quantize.js';
import { splitColumns, unsplitRowOrder } from '../import/split.js';
import { modelConfigToJson, type ModelConfig } from '../model-config.js';
import { glmTensors, quantizedNames, type GlmTensor } from '../store/glm-tensors.js';
import { NewFolder } from '../store/new-folder.js';
import { openRegularFile, readExactly, type OpenFile } from '../store/open-regular-file.js';
import { openStore, type Store, type StoreTensor } from '../store/open-store.js';
import { configFileName } from '../store/store-format.js';
import { FileSink } from './byte-sink.js';
import { rankFileName, rankFileRoot, rotaryFrequencies, satTensors, type SatTensor, type SatWeights } from './sat-tensors.js';
import { layOutTorchFile, plannedBytes, TorchFileWriter, type TorchLayout } from './write-torch.js';

export interface ExportOptions {
  /** Folder of the store. */
  readonly from: string;
  /** SAT folder to write; absent or empty. */
  readonly to: string;
  /** Tensor-parallel degree: the number of rank files. */
  readonly ranks: number;
  /** Null: as in the store. */
  readonly quantize?: QuantizedBits | null;
  /** What `latest` will say, and the folder's name; an integer > 0 or `release`. */
  readonly iteration?: string;
  readonly onProgress?: (progress: ExportProgress) => void;
  /** Aborting removes what was written. */
  readonly signal?: AbortSignal;
}

export interface ExportProgress {
  readonly bytes: number;
  readonly totalBytes: number;
}

export interface ExportResult {
  /** In each rank's file. */
  readonly tensors: number;
  /** Of tensor data, all ranks together. */
  readonly bytes: number;
}

/** Rows are read, split and quantised in pieces of about this many bytes, so memory does not grow with the model. */
const pieceBytes = 16 * 2 ** 20;

/**
 * Writes a store as a SAT checkpoint, tensor for tensor what the original's converter makes of the fp16 checkpoint (model-spec section 1:
 * split to the degree first, then quantised rank by rank). `config.json` and the tokenizer, if the store has one, are put beside `latest`.
 * The folder appears complete or not at all.
 *
 * @throws CheckpointError for what is wrong with the store, ConfigError where it can not be had at this degree or precision
 */
export async function exportCheckpoint(options: ExportOptions): Promise<ExportResult> {
  const { ranks, iteration = 'release', signal, onProgress } = options;
  const store = await openStore(options.from);
  const present = bitsOfStore(store);
  const bits = chooseBits(store, present, options);
  const found = new Map(store.tensors.map((tensor) => [tensor.name, tensor]));
  const dtypeOf = ({ name }: GlmTensor): 'float16' | 'float32' => (found.get(name)?.dtype === 'F32' ? 'float32' : 'float16');
  const tensors = satTensors(store.config, { ranks, bits, dtypeOf });
  const totalBytes = ranks * tensors.reduce((sum, tensor) => sum + plannedBytes(tensor), 0);

  const folder = await NewFolder.create(options.to);
  const files = new StoreFiles();
  const kernels = loadImportKernels();
  const outputs: RankOutput[] = [];
  try {
    await mkdir(join(folder.path, iteration));
    for (let rank = 0; rank < ranks; rank++) {
      outputs.push(
        await RankOutput.create(join(folder.path, iteration, rankFileName(rank)), layOutTorchFile(rankFileRoot(rank), tensors), kernels),
      );
    }
    let bytes = 0;
    for await (const piece of rankPieces({
      config: store.config,
      found,
      files,
      kernels,
      tensors,
      ranks,
      quantize: present === null ? bits : null,
    })) {
      signal?.throwIfAborted();
      await outputs[piece.rank]!.writer.append(piece.name, piece.bytes);
      bytes += piece.bytes.length;
      onProgress?.({ bytes, totalBytes });
    }
    for (const output of outputs) await output.finish();
    await writeFile(join(folder.path, 'latest'), iteration, { flag: 'wx', flush: true });
    await describe(store, folder.path);
    await folder.commit();
    return { tensors: tensors.length, bytes: totalBytes };
  } finally {
    for (const output of outputs) await output.abandon();
    await files.close();
    await folder.dispose();
  }
}

/** Of the four linear weights of every layer; null: not quantised. @throws CheckpointError where they differ */
function bitsOfStore({ dir, config, tensors }: Store): QuantizedBits | null {
  const dtypes = new Map(tensors.map(({ name, dtype }) => [name, dtype]));
  const bits = linearTensors(config).map(({ name }) => {
    const dtype = dtypes.get(quantizedNames(name).qweight);
    return dtype === undefined ? null : dtype === 'U8' ? 4 : 8;
  });
  if (new Set(bits).size > 1) throw new CheckpointError(`${dir}: some linear weights are quantised in another way than others`);
  return bits[0]!;
}

/** Bits of the exported linear weights, if they can be had from this store. */
function chooseBits(
  { dir, config, tensors, quantization }: Store,
  present: QuantizedBits | null,
  options: ExportOptions,
): QuantizedBits | null {
  const { ranks, quantize = null } = options;
  const byName = new Map(tensors.map((tensor) => [tensor.name, tensor]));
  if (present === null) {
    const float32 = quantize === null ? undefined : linearTensors(config).find(({ name }) => byName.get(name)!.dtype === 'F32');
    if (float32 !== undefined) throw new ConfigError(`${float32.name} is fp32; only fp16 weights are quantised`);
    return quantize;
  }
  if (quantize !== null && quantize !== present) {
    throw new ConfigError(`${dir} is quantised to INT${present} already, --quantize int${quantize} needs the fp16 store`);
  }
  for (const { name, split } of linearTensors(config)) {
    const groups = byName.get(quantizedNames(name).scales)!.shape[1]!;
    const needed = split === 'columns' ? ranks : 1;
    if (groups === needed) continue;
    const scheme =
      quantization?.group === 128 ? 'with a scale for each 128 columns' : `vector-wise for ${quantization?.ranks ?? groups} ranks`;
    throw new ConfigError(
      `${dir} is quantised already, ${scheme}: a row of ${name} has ${groups} scales, the original's format for --tp ${ranks} has ${needed}; ` +
        `export the fp16 store with --quantize int${present}`,
    );
  }
  return present;
}

function linearTensors(config: ModelConfig): GlmTensor[] {
  return glmTensors(config).filter(({ isQuantizable }) => isQuantizable);
}

interface RankPiece {
  readonly rank: number;
  readonly name: string;
  readonly bytes: Uint8Array;
}

interface Source {
  readonly config: ModelConfig;
  readonly found: ReadonlyMap<string, StoreTensor>;
  readonly files: StoreFiles;
  readonly kernels: ImportKernels;
  readonly tensors: readonly SatTensor[];
  readonly ranks: number;
  /** Null: nothing is quantised on the way. */
  readonly quantize: QuantizedBits | null;
}

/** Everything that the rank files hold, for each file in its order. */
async function* rankPieces({ config, found, files, kernels, tensors, ranks, quantize }: Source): AsyncGenerator<RankPiece> {
  /** Of the weight that has just been quantised, by rank; they follow it. */
  let newScales: Uint8Array[][] = [];
  for (const tensor of tensors) {
    const { name } = tensor;
    if (tensor.part === 'frequencies') {
      for (let rank = 0; rank < ranks; rank++) yield { rank, name, bytes: rotaryFrequencies(config) };
    } else if (quantize === null || !tensor.source.isQuantizable) {
      // A row's scales lie side by side as its columns do.
      const stored = storedTensor(found, tensor);
      for await (const { rank, bytes } of splitRows(files, stored, { split: tensor.source.split, ranks })) yield { rank, name, bytes };
    } else if (tensor.part === 'scales') {
      for (const [rank, pieces] of newScales.entries()) yield { rank, name, bytes: Buffer.concat(pieces) };
    } else {
      newScales = Array.from({ length: ranks }, () => []);
      const { split, shape } = tensor.source;
      const columns = shape[1]! / (split === 'columns' ? ranks : 1);
      for await (const { rank, bytes } of splitRows(files, storedTensor(found, tensor), { split, ranks })) {
        const weights = asUint16(bytes);
        const qweight = new Uint8Array((weights.length * quantize) / 8);
        const scales = new Uint16Array(weights.length / columns);
        kernels.quantizeRows(weights, columns, { groups: 1, bits: quantize, name }, { qweight, scales });
        newScales[rank]!.push(asBytes(scales));
        yield { rank, name, bytes: qweight };
      }
    }
  }
}

function storedTensor(found: ReadonlyMap<string, StoreTensor>, { source, part }: SatWeights): StoreTensor {
  const { qweight, scales } = quantizedNames(source.name);
  return found.get(part === 'scales' ? scales : qweight) ?? found.get(source.name)!; // openStore has seen that it is there
}

/** A whole tensor, cut for the ranks; for each rank in the order of its rows. */
async function* splitRows(
  files: StoreFiles,
  stored: StoreTensor,
  { split, ranks }: { split: GlmTensor['split']; ranks: number },
): AsyncGenerator<{ rank: number; bytes: Uint8Array }> {
  const rows = stored.shape[0]!;
  const rowBytes = stored.bytes / rows;
  if (split === 'rows' || split === 'glu-rows') {
    let row = 0;
    for (const { rank, begin, end } of unsplitRowOrder(split, rows / ranks, ranks)) {
      for (const [from, to] of pieces(row, row + end - begin, rowBytes))
        yield { rank, bytes: await files.read(stored, from * rowBytes, to * rowBytes) };
      row += end - begin;
    }
    return;
  }
  for (const [from, to] of pieces(0, rows, rowBytes)) {
    const whole = await files.read(stored, from * rowBytes, to * rowBytes);
    const shards = split === 'columns' ? splitColumns(whole, to - from, ranks) : Array.from({ length: ranks }, () => whole);
    for (const [rank, bytes] of shards.entries()) yield { rank, bytes };
  }
}

function* pieces(begin: number, end: number, rowBytes: number): Generator<[begin: number, end: number]> {
  const step = Math.max(1, Math.floor(pieceBytes / rowBytes));
  for (let row = begin; row < end; row += step) yield [row, Math.min(end, row + step)];
}

/** One rank's file while it is written. */
class RankOutput {
  private constructor(
    private readonly sink: FileSink,
    readonly writer: TorchFileWriter,
  ) {}

  static async create(path: string, layout: TorchLayout, { crc32 }: ImportKernels): Promise<RankOutput> {
    const sink = await FileSink.create(path);
    return new RankOutput(sink, await TorchFileWriter.create(sink, layout, crc32));
  }

  async finish(): Promise<void> {
    await this.writer.finish();
    await this.sink.finish();
  }

  async abandon(): Promise<void> {
    await this.sink.abandon();
  }
}

/** The files of a store, opened once. */
class StoreFiles {
  private readonly opened = new Map<string, OpenFile>();

  /** Bytes [begin, end) of a tensor. */
  async read({ file, offset }: StoreTensor, begin: number, end: number): Promise<Buffer> {
    let open = this.opened.get(file);
    if (open === undefined) this.opened.set(file, (open = await openRegularFile(file)));
    return readExactly(open, offset + begin, end - begin, file);
  }

  async close(): Promise<void> {
    for (const { handle } of this.opened.values()) await handle.close();
  }
}

/** What `tandem import` finds beside a checkpoint. */
async function describe({ config, tokenizerPath }: Store, dir: string): Promise<void> {
  const { format: _, format_version: __, ...json } = modelConfigToJson(config);
  await writeFile(join(dir, configFileName), `${JSON.stringify(json, null, 2)}\n`, { flag: 'wx', flush: true });
  if (tokenizerPath !== null) await copyFile(tokenizerPath, join(dir, basename(tokenizerPath)));
}

function asUint16(bytes: Uint8Array): Uint16Array {
  const aligned = bytes.byteOffset % 2 === 0 ? bytes : new Uint8Array(bytes);
  return new Uint16Array(aligned.buffer, aligned.byteOffset, aligned.length / 2);
}

function asBytes(halves: Uint16Array): Uint8Array {
  return new Uint8Array(halves.buffer, halves.byteOffset, halves.byteLength);
}
