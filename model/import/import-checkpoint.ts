import { existsSync, statSync, readdirSync } from 'node:fs';
import { statfs } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { ConfigError } from '../../common/errors.js';
import type { ModelConfig } from '../model-config.js';
import { checkProvenance, isCommitted, partialFolder, PartialStore, removePartial } from '../store/partial-store.js';
import type { StoreQuantization } from '../store/store-format.js';
import { jobBytes, rowBytesOf, type CheckJob, type ConvertJob } from './convert-tensor.js';
import { chooseWorkers, runJobs, type Workers } from './import-jobs.js';
import { planImport, provenanceOf, type ImportPlan, type PlannedSource, type PlanOptions } from './import-plan.js';
import { SatCheckpoint } from './sat-checkpoint.js';

export interface ImportOptions extends PlanOptions {
  /** SAT folder, with `latest` and the iteration's folder; or a tar archive of it: its parts, one of them, or patterns for them. */
  readonly from: string | readonly string[];
  /** Folder of the new store; absent or empty. */
  readonly to: string;
  /** Bytes of memory that the process may take; null: 4 GiB. */
  readonly memoryLimit?: number | null;
  /** Null: as many as pay; 0: this one. */
  readonly threads?: number | null;
  /** Throws away what an unfinished import has left. */
  readonly restart?: boolean;
  readonly onProgress?: (progress: ImportProgress) => void;
  /** Aborting keeps the tensors that are finished, for another call with the same options. */
  readonly signal?: AbortSignal;
}

/** Sent when a tensor is finished, and several times a second. */
export interface ImportProgress {
  /** `check`: tensors that an earlier process had finished are compared with their checksums. */
  readonly phase: 'check' | 'import';
  /** Tensor that was finished last; empty: none yet. */
  readonly name: string;
  /** Finished tensors of the store. */
  readonly tensors: number;
  readonly totalTensors: number;
  /** That were read, of the checkpoint or of what is checked. */
  readonly bytes: number;
  readonly totalBytes: number;
}

export interface ImportResult {
  readonly config: ModelConfig;
  readonly quantization: StoreQuantization | null;
  readonly tensors: number;
  /** Of them, finished by an earlier process. */
  readonly keptTensors: number;
  readonly bytes: number;
  /** One line each: what was ignored or looks odd. */
  readonly warnings: readonly string[];
}

/** What an import would do. */
export interface ImportOutline {
  readonly plan: ImportPlan;
  readonly files: readonly string[];
  readonly ranks: number;
  readonly sourceBytes: number;
  /** Of the disk: what is still to be written, and what is free there. */
  readonly neededBytes: number;
  readonly freeBytes: number;
  readonly workers: Workers;
  /** Folder of an unfinished import that would go on; null: there is none. */
  readonly unfinished: string | null;
}

const defaultMemoryLimit = 4 * 2 ** 30;
/** Less than this is done before a thread has started. */
const smallBytes = 64 * 2 ** 20;

/**
 * Turns a SAT checkpoint of any tensor-parallel degree, quantised or not, into a model store. Bits are kept, or quantised by
 * {@link quantizeRows}. The store appears complete or not at all; what is finished when an import ends early is kept beside it, and the same
 * call goes on there.
 *
 * @throws CheckpointError for what is wrong with the checkpoint, ConfigError for options, configuration and the target
 */
export async function importCheckpoint(options: ImportOptions): Promise<ImportResult> {
  const checkpoint = await SatCheckpoint.open(options.from);
  try {
    return await importOpened(checkpoint, options);
  } catch (error) {
    throw checkpoint.explain(error);
  } finally {
    await checkpoint.close();
  }
}

/** What {@link importCheckpoint} would do; reads and checks all but the tensors' values, and writes nothing. */
export async function outlineImport(options: ImportOptions): Promise<ImportOutline> {
  const checkpoint = await SatCheckpoint.open(options.from);
  try {
    const plan = await planImport(checkpoint, options);
    const folder = partialFolder(options.to);
    const hasFolder = existsSync(folder) && !options.restart;
    if (hasFolder) await checkProvenance(folder, provenanceOf(checkpoint, plan));
    const jobs = plan.tensors.map((tensor) => convertJob(tensor, null));
    return {
      plan,
      files: checkpoint.files,
      ranks: checkpoint.ranks.length,
      sourceBytes: jobs.reduce((sum, job) => sum + jobBytes(job), 0),
      ...(await diskNeeds(plan, options.to)),
      workers: workersFor(jobs, options),
      unfinished: hasFolder ? folder : null,
    };
  } finally {
    await checkpoint.close();
  }
}

async function importOpened(checkpoint: SatCheckpoint, options: ImportOptions): Promise<ImportResult> {
  const plan = await planImport(checkpoint, options);
  const provenance = provenanceOf(checkpoint, plan);
  const total = plan.tensors.reduce((sum, { outputs }) => sum + outputs.length, 0);
  const { config, quantization, bytes } = plan;
  const result = { config, quantization, tensors: total, keptTensors: 0, bytes };
  if (options.restart) await removePartial(options.to);
  else if (isCommitted(options.to)) {
    await checkProvenance(partialFolder(options.to), provenance);
    await removePartial(options.to);
    return { ...result, keptTensors: total, warnings: plan.warnings };
  }
  const workers = workersFor(
    plan.tensors.map((tensor) => convertJob(tensor, null)),
    options,
  );
  const { neededBytes, freeBytes } = await diskNeeds(plan, options.to);
  if (neededBytes > freeBytes) {
    throw new ConfigError(`the store needs ${neededBytes} more bytes where ${options.to} is to be, of which ${freeBytes} are free`);
  }
  const outputs = plan.tensors.flatMap((tensor) => tensor.outputs);
  const store = await PartialStore.open(options.to, outputs, provenance);
  try {
    const run = { workers, ...options };
    const warnings = [...plan.warnings, ...(await checkKept(store, plan, { ...run, total }))];
    const keptTensors = store.done;
    const left = plan.tensors.filter((tensor) => !isKept(tensor, store)).map((tensor) => convertJob(tensor, store));
    warnings.push(
      ...(await runJobs(left, run, {
        onResult: ({ outputs: written }, { sha256 }) => store.finish(written.map(({ name }, i) => ({ name, sha256: sha256[i]! }))),
        onBytes: (progress) => options.onProgress?.({ phase: 'import', ...progress, tensors: store.done, totalTensors: total }),
      })),
    );
    await store.commit({ config, quantization, tokenizerPath: plan.tokenizerPath });
    return { ...result, keptTensors, warnings };
  } finally {
    await store.close();
  }
}

/** Compares what the journal of an earlier process lists with the bytes that are there. @returns warnings of what has to be made again */
async function checkKept(
  store: PartialStore,
  plan: ImportPlan,
  { total, ...run }: ImportOptions & { workers: Workers; total: number },
): Promise<string[]> {
  const warnings: string[] = [];
  const jobs = plan.tensors
    .filter(({ outputs }) => outputs.every(({ name }) => store.recorded.has(name)))
    .map(({ source, outputs }): CheckJob => ({
      kind: 'check',
      name: source.tensor.name,
      outputs: outputs.map(({ name }) => store.range(name)),
    }));
  await runJobs(jobs, run, {
    onResult: ({ name, outputs }, { sha256 }) => {
      const isIntact = outputs.every((output, i) => store.recorded.get(output.name) === sha256[i]);
      if (isIntact) for (const output of outputs) store.confirm(output.name);
      else warnings.push(`tensor ${name} of the unfinished import is not what it was when it was written; it is made again`);
    },
    onBytes: (progress) => run.onProgress?.({ phase: 'check', ...progress, tensors: store.done, totalTensors: total }),
  });
  return warnings;
}

function isKept({ outputs }: PlannedSource, store: PartialStore): boolean {
  return outputs.every(({ name }) => store.isDone(name));
}

/** @param store null: for a plan, without a place for the outputs */
function convertJob({ source: { tensor, shards, quantized }, outputs }: PlannedSource, store: PartialStore | null): ConvertJob {
  const [, scales] = outputs;
  const isQuantized = scales !== undefined && quantized === null;
  return {
    kind: 'convert',
    name: tensor.name,
    split: tensor.split,
    shards,
    scaleShards: quantized?.scales ?? null,
    quantize: isQuantized ? { bits: outputs[0]!.dtype === 'I8' ? 8 : 4, groups: scales.shape[1]! } : null,
    outputs: store === null ? [] : outputs.map(({ name }) => store.range(name)),
  };
}

function workersFor(jobs: readonly ConvertJob[], { memoryLimit, threads }: ImportOptions): Workers {
  const isSmall = jobs.reduce((sum, job) => sum + jobBytes(job), 0) <= smallBytes;
  return chooseWorkers({
    memoryLimit: memoryLimit ?? defaultMemoryLimit,
    threads: threads ?? (isSmall ? 0 : null),
    largestRowBytes: Math.max(...jobs.map(rowBytesOf)),
  });
}

async function diskNeeds(plan: ImportPlan, to: string): Promise<{ neededBytes: number; freeBytes: number }> {
  let folder = dirname(resolve(to));
  while (!existsSync(folder)) folder = dirname(folder);
  const { bavail, bsize } = await statfs(folder);
  return { neededBytes: Math.max(0, plan.bytes - allocatedBytes(join(partialFolder(to), 'store'))), freeBytes: bavail * bsize };
}

/** Files of an unfinished store have their full length from the beginning, but only what was written takes room. */
function allocatedBytes(folder: string): number {
  if (!existsSync(folder)) return 0;
  return readdirSync(folder).reduce((sum, name) => sum + 512 * statSync(join(folder, name)).blocks, 0);
}
