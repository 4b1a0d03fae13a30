import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { CheckpointError, ConfigError, EngineError, TandemError } from '../../common/errors.js';
import { packageRoot } from '../../common/package-root.js';

/**
 * The typed face of the native addon: JavaScript meets C++ here and nowhere else. Token ids, positions and block tables
 * are Uint32Array; "not given" is `null`, never a missing property. Errors are those of common/errors.ts, with the native
 * error and its {@link NativeErrorCode} as `cause`.
 */
export interface NativeAddon {
  readonly build: NativeBuild;
  /**
   * Meets the other ranks and loads this rank's shard, on the engine's own thread. Rejects with CheckpointError (a tensor),
   * ConfigError (an option, or too little memory) or EngineError.
   *
   * @param onStart gets a function that says how far loading is, at any time
   */
  createEngine(options: NativeEngineOptions, onStart?: (progress: () => LoadProgress) => void): Promise<NativeEngine>;
  /** A GPU of this machine; takes none of its memory. Throws ConfigError saying what is wrong: no CUDA in this build, no driver or too old a one, no such GPU. */
  describeGpu(gpu: number): GpuDescription;
  /** The distribution that `sample` would draw from, after all that `params` says: probabilities [V]. Pure. Throws EngineError. */
  distribution(logits: Float32Array, params: NativeSamplingParams): Float32Array;
  /** CRC-32 of zip archives, as `zlib.crc32`, several times as fast: of what `previous` is of, followed by `bytes`. Throws EngineError. */
  crc32(bytes: Uint8Array, previous: number): number;
  /** Quantises fp16 weights as model/import/quantize.ts says. Throws EngineError. */
  quantizeWeights(options: NativeQuantizeOptions): number;
  /** Bytes of a file will be read: the kernel fetches them meanwhile. Returns at once. Throws EngineError for arguments alone. */
  hintRead(fd: number, offset: number, length: number): void;
  /** Bytes of a file were written: the kernel puts them on the disk now and not later. Returns at once. Throws EngineError for arguments alone. */
  hintWritten(fd: number, offset: number, length: number): void;
  /** Sequential read bandwidth of main memory in bytes per second: the best of `repeats` passes over `bytes` on `threads` threads. */
  measureReadBandwidth(options: { bytes: number; threads: number; repeats: number }): Promise<number>;
  /** Products of INT4 weights with int8 activations per second that `threads` threads make in registers with the instructions of `isa`. */
  measureProductPeak(options: { isa: NativeIsa; threads: number }): Promise<number>;
}

export interface GpuDescription {
  readonly name: string;
  readonly totalBytes: number;
}

export interface NativeQuantizeOptions {
  /** fp16 [rows, columns]. */
  readonly weights: Uint16Array;
  readonly columns: number;
  readonly groups: number;
  readonly bits: 8 | 4;
  /** Written: a byte for each weight, or for two. */
  readonly qweight: Uint8Array;
  /** Written: fp16 [rows, groups]. The call returns the first row with an infinite or NaN weight, at which it ended, or -1. */
  readonly scales: Uint16Array;
}

export type NativeErrorCode = 'INVALID_ARGUMENT' | 'CHECKPOINT' | 'OUT_OF_MEMORY' | 'TIMEOUT' | 'ABORTED' | 'INTERNAL';

/** Instruction sets of the kernels, the best one first. */
export type NativeIsa = 'avx512vnni' | 'avx512' | 'avx2' | 'neon' | 'generic';

export interface NativeBuild {
  /** `cpu`, and `cuda` where it was built with nvcc. */
  readonly backends: readonly string[];
  readonly compiler: string;
  /** Instruction set in use: the best that this CPU has, or what the environment variable `TANDEM_ISA` names. */
  readonly isa: NativeIsa;
}

export interface NativeEngineOptions {
  readonly model: {
    readonly numLayers: number;
    readonly hiddenSize: number;
    readonly numAttentionHeads: number;
    readonly innerHiddenSize: number;
    readonly vocabSize: number;
    readonly maxSequenceLength: number;
    readonly layernormEpsilon: number;
    readonly rotaryBase: number;
    readonly rotaryPrecision: 'fp32' | 'half' | 'half_freq';
  };
  /** Every tensor of the store, whole and unsplit; the engine maps the files and takes its rows or columns. */
  readonly tensors: readonly NativeTensor[];
  readonly rank: number;
  readonly worldSize: number;
  readonly device: 'cpu' | 'cuda';
  /** Its number, as CUDA counts; of no meaning on the CPU. */
  readonly gpu: number;
  readonly threads: number;
  /** Where they run: each on its own, if there are enough, else all on all; empty: wherever the system puts them. Thread 0 is the engine's own. */
  readonly cpus: readonly number[];
  /** Null: `build.isa`. */
  readonly isa: NativeIsa | null;
  /** How activations meet INT8 and INT4 weights: quantised to int8 on their way, or in floating point. FP16 and FP32 weights take floats anyway. */
  readonly activations: Activations;
  /** The word embeddings (tied: the output projection too) as the store has them, or in INT8 with a scale for 128 columns of a row. */
  readonly quantizeEmbedding: QuantizeEmbedding;
  readonly kv: { readonly numBlocks: number; readonly blockSize: number; readonly dtype: KvDtype };
  /** Most tokens of all Extends of one step together; sizes the workspace. */
  readonly maxBatchTokens: number;
  /** Null at world size 1. `name` is the same on all ranks and never used twice. */
  readonly communicator: { readonly name: string; readonly timeoutMs: number } | null;
}

/** fp32 on the CPU alone, int8 on GPUs alone. */
export type KvDtype = 'fp16' | 'fp32' | 'int8';
export type Activations = 'int8' | 'float';
export type QuantizeEmbedding = 'none' | 'int8';

export interface NativeTensor {
  readonly name: string;
  readonly file: string;
  /** Byte offset of the tensor's data in `file`. */
  readonly offset: number;
  readonly dtype: 'F32' | 'F16' | 'I8' | 'U8';
  readonly shape: readonly number[];
}

/** Of the weight matrices that a rank reads; `totalBytes` is 0 until the ranks have met. */
export interface LoadProgress {
  readonly doneBytes: number;
  readonly totalBytes: number;
}

/** One rank of a loaded model. Steps run in the order of the calls, on the engine's own thread; the event loop is never blocked. */
export interface NativeEngine {
  /**
   * @param body as common/step-codec.ts encodes a step, so that JavaScript need not look into what passes it on its way to the engine
   * Rejects with EngineError; after one whose cause is not INVALID_ARGUMENT the ranks may be out of step.
   */
  step(stepId: number, body: Uint8Array): Promise<NativeStepResult>;
  readonly memory: { readonly weightBytes: number; readonly kvBytes: number; readonly workspaceBytes: number };
  /** Wakes collectives that wait for a lost rank; all queued and later steps reject. Any thread, any time. */
  abort(): void;
  /** Frees everything once running work has ended. Safe to call twice. */
  dispose(): Promise<void>;
}

export interface NativeSamplingParams {
  /** 0: the token of the largest logit, the lowest id among equals. */
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
  readonly bannedTokens: Uint32Array;
  /** Added to the logits of `biasTokens`, before the repetition penalty and the temperature. */
  readonly biasTokens: Uint32Array;
  readonly biases: Float32Array;
  /** Positive logits of `repeatedTokens` are divided by it, negative ones multiplied; 1: off. */
  readonly repetitionPenalty: number;
  readonly repeatedTokens: Uint32Array;
}

export interface NativeStepResult {
  readonly stepId: number;
  /** As common/step-codec.ts encodes results: one for each Extend on rank 0, none on the other ranks. */
  readonly body: Uint8Array;
  readonly computeMicros: number;
  /** Of which in collectives, waiting included. */
  readonly collectiveMicros: number;
  /** Of which sampling and looking at logits; rank 0. */
  readonly evaluateMicros: number;
}

/** Loads the addon that `npm run build:native` made. @throws ConfigError if there is none, or it does not load here */
export function loadAddon(): NativeAddon {
  const name = process.env['TANDEM_CUDA_ON_CPU'] === '1' ? 'tandem_addon_on_cpu.node' : 'tandem_addon.node'; // for tests: slow, and right
  const file = path.join(packageRoot, 'native', 'build', 'Release', name);
  if (!existsSync(file)) throw new ConfigError(`native addon not built: there is no ${file}; run \`npm run build:native\``);
  let raw: NativeAddon;
  try {
    raw = createRequire(import.meta.url)(file) as NativeAddon;
  } catch (error) {
    throw new ConfigError(`native addon ${file} does not load: ${messageOf(error)}; run \`npm run build:native\``, { cause: error });
  }
  return {
    build: raw.build,
    createEngine: async (options, onStart) => {
      const loading = raw.createEngine(options) as Promise<NativeEngine> & { progress?: () => LoadProgress }; // none where the options are refused
      if (loading.progress) onStart?.(loading.progress);
      return wrapEngine(await loading.catch(rethrow(creationError)));
    },
    describeGpu: (gpu) => throwing(() => raw.describeGpu(gpu), creationError),
    distribution: (logits, params) => throwing(() => raw.distribution(logits, params)),
    crc32: (bytes, previous) => throwing(() => raw.crc32(bytes, previous)),
    quantizeWeights: (options) => throwing(() => raw.quantizeWeights(options)),
    hintRead: (fd, offset, length) => throwing(() => raw.hintRead(fd, offset, length)),
    hintWritten: (fd, offset, length) => throwing(() => raw.hintWritten(fd, offset, length)),
    measureReadBandwidth: (options) => raw.measureReadBandwidth(options).catch(rethrow(creationError)),
    measureProductPeak: (options) => raw.measureProductPeak(options).catch(rethrow(creationError)),
  };
}

function wrapEngine(raw: NativeEngine): NativeEngine {
  let disposed: Promise<void> | null = null;
  return {
    memory: raw.memory,
    step: (stepId, body) => raw.step(stepId, body).catch(rethrow(stepError)),
    abort: () => raw.abort(),
    dispose: () => (disposed ??= raw.dispose().catch(rethrow(stepError))),
  };
}

/** The code of the native error behind what {@link NativeEngine} rejects with; null for any other error. */
export function nativeErrorCode(error: unknown): NativeErrorCode | null {
  return error instanceof TandemError ? codeOf(error.cause) : null;
}

function throwing<Result>(call: () => Result, convert: (error: unknown) => TandemError = stepError): Result {
  try {
    return call();
  } catch (error) {
    throw convert(error);
  }
}

function rethrow(convert: (error: unknown) => TandemError): (error: unknown) => never {
  return (error) => {
    throw convert(error);
  };
}

function creationError(error: unknown): TandemError {
  const code = codeOf(error);
  if (code === 'CHECKPOINT') return new CheckpointError(messageOf(error), { cause: error });
  if (code === 'INVALID_ARGUMENT' || code === 'OUT_OF_MEMORY') return new ConfigError(messageOf(error), { cause: error });
  return stepError(error);
}

function stepError(error: unknown): TandemError {
  return new EngineError(messageOf(error), { cause: error });
}

function codeOf(error: unknown): NativeErrorCode | null {
  return error instanceof Error && 'code' in error ? (error.code as NativeErrorCode) : null;
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
