import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import type { EngineFlags } from '../cli/engine-options.js';
import type { ModelConfig } from '../model/model-config.js';
import { openStore } from '../model/store/open-store.js';
import { ensureTinyStore } from '../model/tiny/tiny-model.js';
import { THREADS, type Entrant, type Lengths } from './contestant.js';
import { llamaBytesPerToken, writeLlamaModel } from './peer/llama-model.js';
import { peerEntrant } from './peer/peer-contestant.js';
import { SYNTHETIC_CONFIG, writeSyntheticStore } from './synthetic-store.js';
import { tandemEntrant } from './tandem-contestant.js';

/** One model, and who is measured with it. */
export interface ModelCase {
  readonly name: CaseName;
  readonly title: string;
  readonly lengths: Lengths;
  /** Multiplications of integers that a token of a prompt takes; null where they are of floating point. */
  readonly productsPerToken: number | null;
  readonly entrants: readonly Entrant[];
}

export const CASE_TITLES = {
  tiny: 'tiny, FP16',
  peer: 'synthetic, INT4, INT8 embedding',
  int4: 'synthetic, INT4, FP16 embedding',
  int8: 'synthetic, INT8, FP16 embedding',
} as const;
export type CaseName = keyof typeof CASE_TITLES;
export const CASE_NAMES = Object.keys(CASE_TITLES) as readonly CaseName[];

const LAYOUTS = [
  { workers: 1, threads: THREADS },
  { workers: THREADS, threads: 1 },
] as const;
const TINY_LENGTHS: Lengths = { prefillTokens: 256, decodeTokens: 200 };
const SYNTHETIC_LENGTHS: Lengths = { prefillTokens: 512, decodeTokens: 24 };

export interface CaseFiles {
  /** A folder for models; what is in it is used again. */
  readonly scratch: string;
  readonly withPeer: boolean;
  readonly progress: (message: string) => void;
}

export async function prepareCase(name: CaseName, files: CaseFiles): Promise<ModelCase> {
  if (name === 'tiny') return tinyCase();
  const bits = name === 'int8' ? 8 : 4;
  const engine = { activations: 'int8', quantizeEmbedding: name === 'peer' ? 'int8' : 'none' } as const;
  const storeDir = await once(join(files.scratch, `int${bits}`), `writing the synthetic model, INT${bits}`, files, async (dir) => {
    await writeSyntheticStore(dir, SYNTHETIC_CONFIG, bits);
  });
  const tandem = await tandemEntrants(storeDir, engine, SYNTHETIC_LENGTHS);
  const peer = name === 'peer' && files.withPeer ? [await llamaEntrant(files)] : [];
  const productsPerToken = productsOf(SYNTHETIC_CONFIG);
  return { name, title: CASE_TITLES[name], lengths: SYNTHETIC_LENGTHS, productsPerToken, entrants: [...peer, ...tandem] };
}

async function tinyCase(): Promise<ModelCase> {
  const entrants = await tandemEntrants(await ensureTinyStore(), {}, TINY_LENGTHS);
  return { name: 'tiny', title: CASE_TITLES.tiny, lengths: TINY_LENGTHS, productsPerToken: null, entrants };
}

async function tandemEntrants(storeDir: string, engine: Partial<EngineFlags>, lengths: Lengths): Promise<Entrant[]> {
  const { tensors, config } = await openStore(storeDir);
  const storeBytes = tensors.reduce((sum, { bytes }) => sum + bytes, 0);
  return LAYOUTS.map((layout) => tandemEntrant({ storeDir, storeBytes, vocabSize: config.vocabSize, lengths, engine, layout }));
}

async function llamaEntrant(files: CaseFiles): Promise<Entrant> {
  const modelFile = join(files.scratch, 'llama-q4_0.gguf');
  await once(modelFile, "writing the peer's model", files, (file) => writeLlamaModel(file, SYNTHETIC_CONFIG));
  const options = { modelFile, vocabSize: SYNTHETIC_CONFIG.vocabSize, threads: THREADS, lengths: SYNTHETIC_LENGTHS };
  return peerEntrant(options, (await stat(modelFile)).size, llamaBytesPerToken(SYNTHETIC_CONFIG));
}

async function once(path: string, what: string, { progress }: CaseFiles, write: (path: string) => Promise<void>): Promise<string> {
  if (await stat(path).catch(() => null)) return path;
  progress(what);
  await write(path);
  return path;
}

/** Of the matrices of all layers; the output projection is for the last token only, and attention is left out. */
function productsOf({ numLayers, hiddenSize: h, innerHiddenSize: f }: ModelConfig): number {
  return numLayers * (4 * h * h + 3 * h * f);
}
