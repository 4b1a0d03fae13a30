import { basename } from 'node:path';
import { CheckpointError } from '../../common/errors.js';
import type { ModelConfig } from '../model-config.js';
import { glmTensors, type GlmTensor } from '../store/glm-tensors.js';
import type { QuantizedBits } from './quantize.js';
import type { TorchTensor } from './torch-tensor.js';
import type { SatCheckpoint } from './sat-checkpoint.js';
import { shardShape } from './split.js';

/** One tensor of the model and where its shards are; `quantized` where the checkpoint holds it quantised. */
export interface SourceTensor {
  readonly tensor: GlmTensor;
  /** Indexed by rank. */
  readonly shards: readonly TorchTensor[];
  readonly quantized: { readonly bits: QuantizedBits; readonly scales: readonly TorchTensor[] } | null;
}

/**
 * Finds every tensor of the model in every rank of the checkpoint and checks its shape there.
 * @throws CheckpointError names the tensor, the rank's file, the shape seen and the shape expected
 */
export function findSourceTensors(checkpoint: SatCheckpoint, config: ModelConfig): SourceTensor[] {
  const sources = glmTensors(config).map((tensor) => findSourceTensor(checkpoint, tensor));
  const linear = sources.filter(({ tensor }) => tensor.isQuantizable);
  const bits = linear[0]!.quantized?.bits ?? null;
  const other = linear.find(({ quantized }) => (quantized?.bits ?? null) !== bits);
  if (other !== undefined) {
    throw new CheckpointError(
      `${checkpoint.label}: ${linear[0]!.tensor.name} is ${describeBits(bits)} but ${other.tensor.name} is ${describeBits(other.quantized?.bits ?? null)}; ` +
        'a checkpoint is quantised as a whole or not at all',
    );
  }
  return sources;
}

/** Names that no model has, `inv_freq` aside: the model computes its own. Each once, in the order of the first file. */
export function unknownTensorNames(checkpoint: SatCheckpoint, sources: readonly SourceTensor[]): string[] {
  const known = new Set(sources.flatMap(({ tensor, quantized }) => (quantized ? [tensor.name, `${tensor.name}_scale`] : [tensor.name])));
  const all = new Set(checkpoint.ranks.flatMap((file) => [...file.tensors.keys()]));
  return [...all].filter((name) => !known.has(name) && !name.endsWith('rotary_emb.inv_freq'));
}

function findSourceTensor(checkpoint: SatCheckpoint, tensor: GlmTensor): SourceTensor {
  const shards = findShards(checkpoint, tensor.name);
  const numRanks = checkpoint.ranks.length;
  const expected = shardShape(tensor.split, tensor.shape, numRanks);
  if (expected === null) {
    throw new CheckpointError(
      `${checkpoint.label}: ${numRanks} ranks do not divide ${tensor.name} ${shapeText(tensor.shape)}; a rank file is missing, or the configuration is another model's`,
    );
  }
  const [first] = shards;
  const hasScale = checkpoint.ranks.some((file) => file.tensors.has(`${tensor.name}_scale`));
  if (!tensor.isQuantizable || !hasScale) {
    expectTensor(checkpoint, first!, { shape: expected, dtypes: ['float16', 'float32'] });
    return { tensor, shards, quantized: null };
  }
  const [rows, columns] = expected as [number, number];
  const bits = first!.shape[1] === columns / 2 ? 4 : 8;
  expectTensor(checkpoint, first!, { shape: bits === 4 ? [rows, columns / 2] : [rows, columns], dtypes: ['int8'] });
  const scales = findShards(checkpoint, `${tensor.name}_scale`);
  expectTensor(checkpoint, scales[0]!, { shape: [rows], dtypes: ['float16'] });
  return { tensor, shards, quantized: { bits, scales } };
}

/** One tensor in every rank, of one shape and type. */
function findShards(checkpoint: SatCheckpoint, name: string): TorchTensor[] {
  const shards = checkpoint.ranks.map((file) => {
    const shard = file.tensors.get(name);
    if (shard === undefined) throw new CheckpointError(`${file.path}: tensor ${name} is missing`);
    return shard;
  });
  const first = shards[0]!;
  for (const [rank, shard] of shards.entries()) {
    if (describe(shard) !== describe(first)) {
      throw new CheckpointError(
        `${checkpoint.label}: tensor ${name} is ${describe(first)} in ${rankName(checkpoint, 0)} but ${describe(shard)} in ${rankName(checkpoint, rank)}`,
      );
    }
  }
  return shards;
}

function expectTensor(
  checkpoint: SatCheckpoint,
  seen: TorchTensor,
  expected: { shape: readonly number[]; dtypes: readonly string[] },
): void {
  if (expected.dtypes.includes(seen.dtype) && shapeText(seen.shape) === shapeText(expected.shape)) return;
  throw new CheckpointError(
    `${checkpoint.label}: tensor ${seen.name} is ${describe(seen)} in each of ${checkpoint.ranks.length} rank files, ` +
      `expected ${expected.dtypes.join(' or ')} ${shapeText(expected.shape)}; a rank file is missing, or the configuration is another model's`,
  );
}

function rankName(checkpoint: SatCheckpoint, rank: number): string {
  return basename(checkpoint.ranks[rank]!.path);
}

function describe(tensor: TorchTensor): string {
  return `${tensor.dtype} ${shapeText(tensor.shape)}`;
}

function describeBits(bits: QuantizedBits | null): string {
  return bits === null ? 'not quantised' : `INT${bits}`;
}

function shapeText(shape: readonly number[]): string {
  return `[${shape.join(', ')}]`;
}
