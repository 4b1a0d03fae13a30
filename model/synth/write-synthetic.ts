import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { FileSink, type ByteSink } from '../export/byte-sink.js';
import { rankFileName, rankFileRoot, rotaryFrequencies, satTensors, type SatTensor, type SatWeights } from '../export/sat-tensors.js';
import { layOutTorchFile, plannedBytes, TorchFileWriter } from '../export/write-torch.js';
import { loadImportKernels } from '../import/import-kernels.js';
import type { QuantizedBits } from '../import/quantize.js';
import { localShare, modelConfigToJson, type ModelConfig } from '../model-config.js';
import { glmTensors, quantizedNames, type GlmTensor } from '../store/glm-tensors.js';
import { NewFolder } from '../store/new-folder.js';
import { configFileName, tensorBytes } from '../store/store-format.js';
import { StoreWriter, type PlannedTensor } from '../store/write-store.js';
import { SyntheticWeights } from './synthetic-weights.js';
import { TarPartsWriter, type PlannedTarFile } from './tar-parts.js';

export interface SynthOptions {
  readonly config: ModelConfig;
  readonly seed: string;
  /** Null: fp16. */
  readonly bits: QuantizedBits | null;
  /** Tensor-parallel degree: rank files of a SAT checkpoint, scale groups of the column-split matrices of a store. */
  readonly ranks: number;
  /** Folder; absent or empty. */
  readonly to: string;
  /** Called as bytes are made. */
  readonly onProgress?: (progress: SynthProgress) => void;
  readonly signal?: AbortSignal;
}

export interface SynthProgress {
  readonly bytes: number;
  readonly totalBytes: number;
}

export interface SynthResult {
  readonly tensors: number;
  /** Of tensor data. */
  readonly bytes: number;
}

const iteration = '49300';
const archiveName = 'glm-130b-sat.tar';
const archiveRoot = 'glm-130b-sat';
const pieceBytes = 8 * 2 ** 20;

/**
 * Writes a checkpoint of random values in the layout that GLM-130B is distributed in, with `config.json` beside it. The values of the unsplit
 * tensors depend on seed and shape only; quantised, the integers are what is random, and all ranks have the same scales.
 *
 * @param archiveParts null: the folder itself; else a tar archive of it, in this many parts
 */
export async function writeSyntheticSat(options: SynthOptions, archiveParts: number | null): Promise<SynthResult> {
  const { config, ranks, bits } = options;
  const tensors = satTensors(config, { ranks, bits });
  const progress = progressOf(options, ranks * tensors.reduce((sum, tensor) => sum + plannedBytes(tensor), 0));
  const rankFiles = Array.from({ length: ranks }, (_, rank) => ({ rank, layout: layOutTorchFile(rankFileRoot(rank), tensors) }));
  const shards = shardSource(options, tensors);
  const { crc32 } = loadImportKernels();
  const folder = await NewFolder.create(options.to);
  try {
    const { format: _, format_version: __, ...json } = { ...modelConfigToJson(config), tokenizer: null } as Record<string, unknown>;
    await writeFile(join(folder.path, configFileName), `${JSON.stringify(json, null, 2)}\n`, { flag: 'wx', flush: true });
    const writeRank = async (sink: ByteSink, { rank, layout }: (typeof rankFiles)[number]): Promise<void> => {
      const file = await TorchFileWriter.create(sink, layout, crc32);
      for (const { name, bytes } of shards(rank)) {
        await file.append(name, bytes);
        progress(bytes.length);
      }
      await file.finish();
    };
    if (archiveParts === null) await writeFolder(folder.path, rankFiles, writeRank);
    else await writeArchive({ dir: folder.path, parts: archiveParts }, rankFiles, writeRank);
    await folder.commit();
  } finally {
    await folder.dispose();
  }
  return { tensors: ranks * tensors.length, bytes: ranks * tensors.reduce((sum, tensor) => sum + plannedBytes(tensor), 0) };
}

interface RankFile {
  readonly rank: number;
  readonly layout: ReturnType<typeof layOutTorchFile>;
}
type WriteRank = (sink: ByteSink, file: RankFile) => Promise<void>;

async function writeFolder(dir: string, files: readonly RankFile[], writeRank: WriteRank): Promise<void> {
  await mkdir(join(dir, iteration));
  for (const file of files) {
    const sink = await FileSink.create(join(dir, iteration, rankFileName(file.rank)));
    try {
      await writeRank(sink, file);
      await sink.finish();
    } catch (error) {
      await sink.abandon();
      throw error;
    }
  }
  await writeFile(join(dir, 'latest'), iteration, { flag: 'wx', flush: true });
}

async function writeArchive(
  { dir, parts }: { dir: string; parts: number },
  files: readonly RankFile[],
  writeRank: WriteRank,
): Promise<void> {
  const latest = { name: `${archiveRoot}/latest`, bytes: iteration.length };
  const folders = [`${archiveRoot}/`, `${archiveRoot}/${iteration}/`].map((name): PlannedTarFile => ({ name, bytes: 0 }));
  const rankFiles = files.map((file) => ({
    file,
    planned: { name: `${archiveRoot}/${iteration}/${rankFileName(file.rank)}`, bytes: file.layout.bytes },
  }));
  const archive = new TarPartsWriter(dir, archiveName, parts, [...folders, ...rankFiles.map(({ planned }) => planned), latest]);
  try {
    for (const folder of folders) await archive.startFile(folder);
    for (const { file, planned } of rankFiles) {
      await archive.startFile(planned);
      await writeRank(archive, file);
    }
    await archive.startFile(latest);
    await archive.write(Buffer.from(iteration));
    await archive.finish();
  } catch (error) {
    await archive.abandon();
    throw error;
  }
}

/** Writes a store of random values, quantised vector-wise for `ranks` ranks if at all. */
export async function writeSyntheticStore(options: SynthOptions): Promise<SynthResult> {
  const { config, bits, ranks } = options;
  localShare(config, ranks); // throws
  const outputs = glmTensors(config).map((source) => ({ source, planned: planStored(source, options) }));
  const plan = outputs.flatMap(({ planned }) => planned);
  const totalBytes = plan.reduce((sum, { dtype, shape }) => sum + tensorBytes(dtype, shape), 0);
  const progress = progressOf(options, totalBytes);
  const weights = new SyntheticWeights(options.seed);
  const pieces = new Pieces();
  const writer = await StoreWriter.create(options.to, plan);
  try {
    for (const { source, planned } of outputs) {
      for (const [part, { name, dtype, shape }] of planned.entries()) {
        const [rows, columns = 1] = shape as readonly [number, number?];
        // Ranks' scales of one row are the same number in every group.
        const fill = part === 1 ? rowScales(weights, source, bits!) : wholeRows(weights, source, bits);
        for (const bytes of pieces.of(rows, tensorBytes(dtype, [columns]), (begin, out) => fill({ begin, columns }, out))) {
          await writer.append(name, bytes);
          progress(bytes.length);
        }
      }
    }
    await writer.commit({
      config: { ...config, tokenizer: null },
      quantization: bits === null ? null : { bits, group: 'vector', ranks },
      tokenizerPath: null,
    });
  } finally {
    await writer.dispose();
  }
  return { tensors: plan.length, bytes: totalBytes };
}

function planStored({ name, shape, split, isQuantizable }: GlmTensor, { bits, ranks }: SynthOptions): PlannedTensor[] {
  if (bits === null || !isQuantizable) return [{ name, dtype: 'F16', shape }];
  const [rows, columns] = shape as readonly [number, number];
  const { qweight, scales } = quantizedNames(name);
  return [
    bits === 8 ? { name: qweight, dtype: 'I8', shape: [rows, columns] } : { name: qweight, dtype: 'U8', shape: [rows, columns / 2] },
    { name: scales, dtype: 'F16', shape: [rows, split === 'columns' ? ranks : 1] },
  ];
}

/** Fills whole rows from row `begin` on; `columns` as stored. */
type FillRows = (rows: { begin: number; columns: number }, out: Uint8Array) => void;

function wholeRows(weights: SyntheticWeights, source: GlmTensor, bits: QuantizedBits | null): FillRows {
  return ({ begin, columns }, out) => fillRun(weights, { source, bits }, begin * columns, out);
}

function rowScales(weights: SyntheticWeights, { name }: GlmTensor, bits: QuantizedBits): FillRows {
  return ({ begin, columns }, out) => {
    const whole = halves(out);
    const rows = new Uint16Array(whole.length / columns);
    weights.fillScales(name, bits, begin, rows);
    for (const [row, scale] of rows.entries()) whole.fill(scale, row * columns, (row + 1) * columns);
  };
}

/** The tensors of a rank's file, in their order and in pieces of whole rows. */
function shardSource(
  { config, seed, ranks, bits }: SynthOptions,
  tensors: readonly SatTensor[],
): (rank: number) => Generator<{ name: string; bytes: Uint8Array }> {
  const weights = new SyntheticWeights(seed);
  const pieces = new Pieces();
  return function* (rank) {
    for (const tensor of tensors) {
      if (tensor.part === 'frequencies') {
        yield { name: tensor.name, bytes: rotaryFrequencies(config) };
        continue;
      }
      const [rows, ...rowShape] = tensor.shape as [number, ...number[]];
      const rowBytes = plannedBytes({ ...tensor, shape: rowShape });
      const fill: Fill = (begin, out) => {
        for (const run of wholeRuns(tensor, { rank, ranks }, { begin, end: begin + out.length / rowBytes })) {
          const part = out.subarray(run.at * itemBytes(tensor), (run.at + run.count) * itemBytes(tensor));
          if (tensor.part === 'scales') weights.fillScales(tensor.source.name, bits!, run.element, halves(part));
          else fillRun(weights, { source: tensor.source, bits }, run.element, part);
        }
      };
      for (const bytes of pieces.of(rows, rowBytes, fill)) yield { name: tensor.name, bytes };
    }
  };
}

function itemBytes({ dtype }: SatWeights): number {
  return plannedBytes({ name: '', dtype, shape: [] });
}

/** `count` elements of the whole tensor from `element` on are at `at` in the shard's rows. */
interface WholeRun {
  readonly element: number;
  readonly at: number;
  readonly count: number;
}

/** Where rows [begin, end) of a rank's shard lie in the whole tensor (model-spec section 1.2), in elements as they are stored. */
function* wholeRuns(
  { shape, source, part }: SatWeights,
  { rank, ranks }: { rank: number; ranks: number },
  { begin, end }: { begin: number; end: number },
): Generator<WholeRun> {
  const [shardRows, columns = 1] = shape as readonly [number, number?];
  const split = part === 'scales' && source.split === 'columns' ? 'copied' : source.split;
  if (split === 'columns') {
    for (let row = begin; row < end; row++) {
      yield { element: (row * ranks + rank) * columns, at: (row - begin) * columns, count: columns };
    }
    return;
  }
  const blocks = split === 'glu-rows' ? 2 : 1;
  const blockRows = shardRows / blocks;
  for (let block = 0; block < blocks; block++) {
    const from = Math.max(begin, block * blockRows);
    const to = Math.min(end, (block + 1) * blockRows);
    if (from >= to) continue;
    const first = split === 'copied' ? 0 : (block * ranks + rank) * blockRows;
    yield { element: (first + from - block * blockRows) * columns, at: (from - begin) * columns, count: (to - from) * columns };
  }
}

function fillRun(
  weights: SyntheticWeights,
  { source, bits }: { source: GlmTensor; bits: QuantizedBits | null },
  element: number,
  out: Uint8Array,
): void {
  if (bits !== null && source.isQuantizable) weights.fillQuantized(source.name, bits, element, out);
  else if (source.name.endsWith('layernorm.weight')) weights.fillGains(source.name, element, halves(out));
  else weights.fillHalves(source.name, element, halves(out));
}

/** Fills rows from `begin` on, as many as `out` has room for. */
type Fill = (begin: number, out: Uint8Array) => void;

/** Cuts tensors into pieces of whole rows, in two buffers in turn: one is being written while the other is filled. */
class Pieces {
  private readonly buffers: Buffer[] = [];
  private turn = 0;

  *of(rows: number, rowBytes: number, fill: Fill): Generator<Uint8Array> {
    const step = Math.max(1, Math.floor(pieceBytes / rowBytes));
    for (let begin = 0; begin < rows; begin += step) {
      const bytes = this.nextBuffer(rowBytes).subarray(0, Math.min(step, rows - begin) * rowBytes);
      fill(begin, bytes);
      yield bytes;
    }
  }

  private nextBuffer(rowBytes: number): Buffer {
    this.turn ^= 1;
    const known = this.buffers[this.turn];
    if (known !== undefined && known.length >= rowBytes) return known;
    return (this.buffers[this.turn] = Buffer.alloc(Math.max(pieceBytes, rowBytes)));
  }
}

/** Tells how far it is, and ends where that is wanted. */
function progressOf({ onProgress, signal }: SynthOptions, totalBytes: number): (bytes: number) => void {
  let done = 0;
  return (bytes) => {
    signal?.throwIfAborted();
    done += bytes;
    onProgress?.({ bytes: done, totalBytes });
  };
}

function halves(bytes: Uint8Array): Uint16Array {
  return new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.length / 2);
}
