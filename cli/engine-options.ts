import type { Options } from 'yargs';
import { ConfigError } from '../common/errors.js';
import type { KvDtype } from '../model/kv-blocks.js';

/** How workers compute: the flags that `serve` and the commands with a server of their own have in common. */
export interface EngineArgs {
  device: string;
  kvDtype: string;
  isa: string;
  activations: string;
  quantizeEmbedding: string;
}

export interface EngineFlags {
  /** `cuda`: rank N takes GPU N. */
  readonly device: 'cpu' | 'cuda';
  readonly kvDtype: KvDtype;
  readonly isa: string;
  readonly activations: 'int8' | 'float';
  readonly quantizeEmbedding: 'none' | 'int8';
}

export function engineOptions({ kvDtype, activations }: Pick<EngineFlags, 'kvDtype' | 'activations'>, group?: string) {
  const choice = (choices: readonly string[], usual: string, describe: string): Options => ({
    ...{ choices, default: usual, requiresArg: true, describe },
    ...(group === undefined ? {} : { group }),
  });
  return {
    device: choice(['cpu', 'cuda'], 'cpu', 'What workers compute on; cuda: each on a GPU of its own, rank 0 on the first'),
    'kv-dtype': choice(['fp16', 'fp32', 'int8'], kvDtype, 'Precision of the KV cache; fp32 is for CPUs, int8 for GPUs'),
    activations: choice(
      ['int8', 'float'],
      activations,
      'How activations meet INT4 and INT8 weights: quantised per token and 128 columns (faster), or in floating point',
    ),
    'quantize-embedding': choice(['none', 'int8'], 'none', 'Word embeddings (and so the output projection): as in the store, or INT8'),
    isa: choice(['auto', 'avx512vnni', 'avx512', 'avx2', 'neon', 'generic'], 'auto', 'Instruction set of the kernels'),
  };
}

export function engineFlags({ device, kvDtype, isa, activations, quantizeEmbedding }: EngineArgs): EngineFlags {
  return {
    device: device === 'cuda' ? 'cuda' : 'cpu',
    kvDtype: kvDtype === 'fp32' || kvDtype === 'int8' ? kvDtype : 'fp16',
    isa,
    activations: activations === 'float' ? 'float' : 'int8',
    quantizeEmbedding: quantizeEmbedding === 'int8' ? 'int8' : 'none',
  };
}

/** The flags of workers that are started here. @throws ConfigError for what their device does not do */
export function localEngineFlags(args: EngineArgs): EngineFlags {
  const flags = engineFlags(args);
  const { device, kvDtype } = flags;
  if (device === 'cpu' && kvDtype === 'int8') throw new ConfigError('--kv-dtype int8 is for GPUs (--device cuda); CPUs have fp16 and fp32');
  if (device === 'cuda' && kvDtype === 'fp32') throw new ConfigError('--kv-dtype fp32 is for CPUs; GPUs have fp16 and int8');
  return flags;
}
