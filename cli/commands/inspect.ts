import type { CommandModule } from 'yargs';
import { openStore, type Store, type StoreTensor } from '../../model/store/open-store.js';
import { verifyTensor } from '../../model/store/verify-tensor.js';
import { modelConfigToJson, possibleWorldSizes } from '../../model/model-config.js';
import { formatBytes, formatTable } from '../format.js';

interface InspectArgs {
  store: string;
  json: boolean;
  verify: boolean;
}

export const inspectCommand: CommandModule<unknown, InspectArgs> = {
  command: 'inspect <store>',
  describe: 'Show what a model store holds',
  builder: (yargs) =>
    yargs
      .positional('store', { type: 'string', demandOption: true, describe: 'Folder of the store' })
      .option('json', { type: 'boolean', default: false, describe: 'Print JSON' })
      .option('verify', {
        type: 'boolean',
        default: false,
        describe: 'Read every tensor and compare its SHA-256 with the recorded one',
      }),
  async handler({ store: dir, json, verify }) {
    const store = await openStore(dir);
    if (verify) for (const tensor of store.tensors) await verifyTensor(tensor);
    process.stdout.write(json ? `${JSON.stringify(describeStore(store, verify), null, 2)}\n` : formatStore(store, verify));
  },
};

function describeStore(store: Store, verified: boolean): unknown {
  return {
    dir: store.dir,
    config: { ...modelConfigToJson(store.config), quantization: store.quantization },
    tokenizer: store.tokenizerPath,
    world_sizes: possibleWorldSizes(store.config),
    tensors: store.tensors.map(({ name, dtype, shape, bytes, sha256 }) => ({ name, dtype, shape, bytes, sha256 })),
    total_bytes: totalBytes(store.tensors),
    verified,
  };
}

function formatStore(store: Store, verified: boolean): string {
  const { config, quantization, tensors } = store;
  const lines = [
    `store         ${store.dir}`,
    `model         ${config.numLayers} layers, hidden ${config.hiddenSize}, ${config.numAttentionHeads} heads, inner ${config.innerHiddenSize}, ` +
      `vocabulary ${config.vocabSize}, context ${config.maxSequenceLength}`,
    `rotary        ${config.rotaryPrecision}`,
    `weights       ${describeQuantization(quantization, tensors)}`,
    `tokenizer     ${store.tokenizerPath ?? 'none, served by token ids alone'}`,
    `world sizes   ${possibleWorldSizes(config).join(', ')}`,
    '',
    formatTable(
      ['name', 'dtype', 'shape', 'bytes', 'sha256'],
      tensors.map(({ name, dtype, shape, bytes, sha256 }) => [name, dtype, shape.join(' x '), String(bytes), sha256 ?? 'not recorded']),
    ),
    '',
    `${tensors.length} tensors, ${totalBytes(tensors)} bytes (${formatBytes(totalBytes(tensors))})${verified ? ', all equal to their recorded SHA-256' : ''}`,
  ];
  return `${lines.join('\n')}\n`;
}

function describeQuantization(quantization: Store['quantization'], tensors: readonly StoreTensor[]): string {
  if (quantization === null) return [...new Set(tensors.map(({ dtype }) => dtype))].join(', ');
  const { bits, group, ranks } = quantization;
  return `INT${bits}, ${group === 128 ? 'a scale for each 128 columns' : `vector-wise for ${ranks} rank${ranks === 1 ? '' : 's'}`}`;
}

function totalBytes(tensors: readonly StoreTensor[]): number {
  return tensors.reduce((sum, { bytes }) => sum + bytes, 0);
}
