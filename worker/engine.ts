import {
  loadAddon,
  nativeErrorCode,
  type GpuDescription,
  type LoadProgress,
  type NativeAddon,
  type NativeEngine,
  type NativeEngineOptions,
  type NativeIsa,
  type KvDtype as NativeKvDtype,
} from '../native/binding/addon.js';
import type { Device } from '../common/device.js';
import { openStore } from '../model/store/open-store.js';
import type { Assignment__Output } from '../proto/generated/tandem/v1/Assignment.js';

export type { LoadProgress, NativeEngine };

/** The native addon's description, for the Hello; throws a ConfigError if the addon is not built. */
export function nativeBuild(): NativeAddon['build'] {
  return loadAddon().build;
}

/** @throws ConfigError as NativeAddon.describeGpu */
export function describeGpu(gpu: number): GpuDescription {
  return loadAddon().describeGpu(gpu);
}

/**
 * What the failure of a step means:
 * - `in-step`: all ranks can go on; it was refused alike by every rank before anything ran;
 * - `aborted`: another rank ended the collectives; why, the coordinator learns from that rank;
 * - `fatal`: the ranks are in different states.
 */
export function failureKind(stepError: unknown): 'in-step' | 'aborted' | 'fatal' {
  const code = nativeErrorCode(stepError);
  if (code === 'INVALID_ARGUMENT') return 'in-step';
  return code === 'ABORTED' ? 'aborted' : 'fatal';
}

/** Opens the store and loads this rank's shard; the files are checked against their index before a byte of them is used. */
export async function loadEngine(
  assignment: Assignment__Output,
  {
    rank,
    device,
    cpus,
    onStart,
  }: { rank: number; device: Device; cpus: readonly number[]; onStart: (progress: () => LoadProgress) => void },
): Promise<NativeEngine> {
  const store = await openStore(assignment.modelPath);
  const { config } = store;
  const options: NativeEngineOptions = {
    model: {
      numLayers: config.numLayers,
      hiddenSize: config.hiddenSize,
      numAttentionHeads: config.numAttentionHeads,
      innerHiddenSize: config.innerHiddenSize,
      vocabSize: config.vocabSize,
      maxSequenceLength: config.maxSequenceLength,
      layernormEpsilon: config.layernormEpsilon,
      rotaryBase: config.rotaryBase,
      rotaryPrecision: config.rotaryPrecision,
    },
    tensors: store.tensors,
    rank,
    worldSize: assignment.worldSize,
    device: device.kind,
    gpu: device.kind === 'cuda' ? device.gpu : 0,
    threads: assignment.threads,
    cpus,
    isa: assignment.isa === 'auto' ? null : (assignment.isa as NativeIsa),
    activations: assignment.activations === 'float' ? 'float' : 'int8',
    quantizeEmbedding: assignment.quantizeEmbedding === 'int8' ? 'int8' : 'none',
    kv: { numBlocks: assignment.kvBlocks, blockSize: assignment.kvBlockSize, dtype: assignment.kvDtype as NativeKvDtype },
    maxBatchTokens: assignment.maxBatchTokens,
    communicator: assignment.worldSize === 1 ? null : { name: assignment.communicator, timeoutMs: assignment.collectiveTimeoutMs },
  };
  return loadAddon().createEngine(options, onStart);
}
