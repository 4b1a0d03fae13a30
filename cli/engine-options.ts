import type { Options } from 'yargs';

/** How workers compute: the flags that `serve` and the commands with a server of their own have in common. */
export interface EngineArgs {
  kvDtype: string;
  isa: string;
  activations: string;
  quantizeEmbedding: string;
}

export interface EngineFlags {
  readonly kvDtype: 'fp16' | 'fp32';
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
    'kv-dtype': choice(['fp16', 'fp32'], kvDtype, 'Precision of the KV cache'),
    activations: choice(
      ['int8', 'float'],
      activations,
      'How activations meet INT4 and INT8 weights: quantised per token and 128 columns (faster), or in floating point',
    ),
    'quantize-embedding': choice(['none', 'int8'], 'none', 'Word embeddings (and so the output projection): as in the store, or INT8'),
    isa: choice(['auto', 'avx512vnni', 'avx512', 'avx2', 'neon', 'generic'], 'auto', 'Instruction set of the kernels'),
  };
}

export function engineFlags({ kvDtype, isa, activations, quantizeEmbedding }: EngineArgs): EngineFlags {
  return {
    kvDtype: kvDtype === 'fp32' ? 'fp32' : 'fp16',
    isa,
    activations: activations === 'float' ? 'float' : 'int8',
    quantizeEmbedding: quantizeEmbedding === 'int8' ? 'int8' : 'none',
  };
}
