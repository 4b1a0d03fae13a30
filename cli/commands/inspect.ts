import { existsSync } from 'node:fs';
import { basename, join } from 'node:path';
import type { CommandModule } from 'yargs';
import { SatCheckpoint } from '../../model/import/sat-checkpoint.js';
import { modelConfigToJson, possibleWorldSizes } from '../../model/model-config.js';
import { readManifest } from '../../model/store/manifest.js';
import { openStore, type Store, type StoreTensor } from '../../model/store/open-store.js';
import { formatBytes, formatTable } from '../format.js';

interface InspectArgs {
  folder: string;
  json: boolean;
  tensors: boolean;
}

export const inspectCommand: CommandModule<unknown, InspectArgs> = {
  command: 'inspect <folder>',
  describe: 'Show what a model store or a SAT checkpoint holds, without reading its data',
  builder: (yargs) =>
    yargs
      .positional('folder', {
        type: 'string',
        demandOption: true,
        describe: 'Folder of the store, or the one with the file "latest"; or parts of its archive',
      })
      .option('json', { type: 'boolean', default: false, describe: 'Print JSON, with every tensor' })
      .option('tensors', { type: 'boolean', default: false, describe: 'List every tensor' }),
  async handler({ folder, json, tensors }) {
    const isArchive = /\.tar\b|[*?]/.test(basename(folder));
    const isCheckpoint = isArchive || existsSync(join(folder, 'latest'));
    const text = isCheckpoint ? await inspectCheckpoint(folder, { json, tensors }) : await inspectStore(folder, { json, tensors });
    process.stdout.write(`${text}\n`);
  },
};

interface Shown {
  readonly json: boolean;
  readonly tensors: boolean;
}

async function inspectStore(dir: string, { json, tensors: listed }: Shown): Promise<string> {
  const store = await openStore(dir);
  const { config, quantization, tensors } = store;
  const hasManifest = (await readManifest(store.dir)) !== null;
  if (json) {
    return toJson({
      dir: store.dir,
      config: { ...modelConfigToJson(config), quantization },
      tokenizer: store.tokenizerPath,
      manifest: hasManifest,
      world_sizes: possibleWorldSizes(config),
      tensors: tensors.map(({ name, dtype, shape, bytes, sha256 }) => ({ name, dtype, shape, bytes, sha256 })),
      total_bytes: totalBytes(tensors),
    });
  }
  const lines = [
    `store         ${store.dir}`,
    `model         ${config.numLayers} layers, hidden ${config.hiddenSize}, ${config.numAttentionHeads} heads, inner ${config.innerHiddenSize}, ` +
      `vocabulary ${config.vocabSize}, context ${config.maxSequenceLength}`,
    `rotary        ${config.rotaryPrecision}`,
    `weights       ${describeQuantization(quantization, tensors)}`,
    `tokenizer     ${store.tokenizerPath ?? 'none, served by token ids alone'}`,
    `world sizes   ${possibleWorldSizes(config).join(', ')}`,
    `checksums     ${describeChecksums(hasManifest, tensors)}`,
    '',
    formatTable(['part', 'tensors', 'bytes', 'size'], sizesByPart(tensors)),
  ];
  if (listed) {
    const rows = tensors.map(({ name, dtype, shape, bytes, sha256 }) => [
      name,
      dtype,
      shape.join(' x '),
      String(bytes),
      sha256 ?? 'not recorded',
    ]);
    lines.push('', formatTable(['name', 'dtype', 'shape', 'bytes', 'sha256'], rows));
  }
  lines.push('', `${tensors.length} tensors, ${totalBytes(tensors)} bytes (${formatBytes(totalBytes(tensors))})`);
  return lines.join('\n');
}

function describeQuantization(quantization: Store['quantization'], tensors: readonly StoreTensor[]): string {
  if (quantization === null) return [...new Set(tensors.map(({ dtype }) => dtype))].join(', ');
  const { bits, group, ranks } = quantization;
  return `INT${bits}, ${group === 128 ? 'a scale for each 128 columns' : `vector-wise for ${ranks} rank${ranks === 1 ? '' : 's'}`}`;
}

function describeChecksums(hasManifest: boolean, tensors: readonly StoreTensor[]): string {
  const recorded = tensors.filter(({ sha256 }) => sha256 !== null).length;
  if (recorded === 0) return 'none recorded';
  const of = recorded === tensors.length ? 'every tensor' : `${recorded} of ${tensors.length} tensors`;
  return `SHA-256 of ${of} in ${hasManifest ? 'manifest.json' : 'the index'}; tandem verify compares them`;
}

/** Layers alike are added up: a model has hundreds of tensors, but few kinds of them. */
function sizesByPart(tensors: readonly StoreTensor[]): string[][] {
  const parts = new Map<string, StoreTensor[]>();
  for (const tensor of tensors) {
    const part = tensor.name.replace(/^transformer\./, '').replace(/^layers\.\d+\./, 'layers.*.');
    parts.set(part, [...(parts.get(part) ?? []), tensor]);
  }
  return [...parts].map(([part, list]) => [part, String(list.length), String(totalBytes(list)), formatBytes(totalBytes(list))]);
}

async function inspectCheckpoint(dir: string, { json, tensors: listed }: Shown): Promise<string> {
  const checkpoint = await SatCheckpoint.open(dir);
  try {
    const ranks = checkpoint.ranks.map(({ path, tensors }) => ({
      path,
      tensors: [...tensors.values()].map(({ name, dtype, shape, itemBytes }) => {
        return { name, dtype, shape, bytes: shape.reduce((product, count) => product * count, itemBytes) };
      }),
    }));
    if (json) return toJson({ checkpoint: checkpoint.label, files: checkpoint.files, ranks });
    const first = ranks[0]!.tensors;
    const numLayers = first.filter(({ name }) => /^transformer\.layers\.\d+\.input_layernorm\.weight$/.test(name)).length;
    const lines = [
      `checkpoint    ${checkpoint.label} (SAT)`,
      `files         ${checkpoint.files.length}`,
      `ranks         ${ranks.length}`,
      `layers        ${numLayers}`,
      `weights       ${describePrecision(first)}`,
      '',
      formatTable(
        ['rank', 'tensors', 'bytes', 'size', 'file'],
        ranks.map(({ path, tensors }, rank) => [
          String(rank),
          String(tensors.length),
          String(totalBytes(tensors)),
          formatBytes(totalBytes(tensors)),
          path,
        ]),
      ),
    ];
    if (listed) {
      const rows = first.map(({ name, dtype, shape, bytes }) => [name, dtype, shape.join(' x '), String(bytes)]);
      lines.push('', 'tensors of rank 0:', formatTable(['name', 'dtype', 'shape', 'bytes'], rows));
    }
    const all = ranks.flatMap(({ tensors }) => tensors);
    lines.push('', `${all.length} tensors, ${totalBytes(all)} bytes (${formatBytes(totalBytes(all))})`);
    return lines.join('\n');
  } finally {
    await checkpoint.close();
  }
}

/** A quantised checkpoint does not say its bits: scales tell that it is quantised, and the width of a weight how (model-spec section 1.3). */
function describePrecision(tensors: readonly { name: string; dtype: string; shape: readonly number[] }[]): string {
  const quantized = tensors.find(({ name }) => tensors.some((other) => other.name === `${name}_scale`));
  if (quantized === undefined) return [...new Set(tensors.map(({ dtype }) => dtype))].join(', ');
  const hiddenSize = tensors.find(({ name }) => name === 'transformer.word_embeddings.weight')?.shape[1];
  const qkv = tensors.find(({ name }) => name.endsWith('attention.query_key_value.weight'))?.shape[1];
  return qkv === hiddenSize ? 'INT8' : 'INT4';
}

function totalBytes(tensors: readonly { readonly bytes: number }[]): number {
  return tensors.reduce((sum, { bytes }) => sum + bytes, 0);
}

function toJson(value: unknown): string {
  return JSON.stringify(value, null, 2);
}
