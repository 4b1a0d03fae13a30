import { createRequire } from 'node:module';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { peerDir } from './install-peer.js';

/**
 * As much of node-llama-cpp as the bench uses, declared here because the package is no dependency of this one. The fields with an underscore are
 * its layer just above llama.cpp: a batch is what is put into it, and one call of `decodeBatch` is one of `llama_decode`.
 */
export interface NodeLlamaCpp {
  getLlama(options: {
    /** Nothing is compiled or fetched: the prebuilt binary is used, or there is an error. */
    readonly build: 'never';
    readonly skipDownload: true;
    readonly gpu: false;
    readonly maxThreads: number;
    readonly logLevel: 'error';
    readonly progressLogs: false;
  }): Promise<Llama>;
}

export interface Llama {
  readonly systemInfo: string;
  readonly llamaCppRelease: { readonly release: string };
  readonly _bindings: { readonly AddonSampler: new (model: unknown) => AddonSampler };
  loadModel(options: { readonly modelPath: string; readonly gpuLayers: 0; readonly useMmap: boolean }): Promise<LlamaModel>;
}

export interface LlamaModel {
  readonly _model: unknown;
  createContext(options: {
    /** Tokens of each sequence. */
    readonly contextSize: number;
    readonly sequences: number;
    readonly batchSize: number;
    readonly threads: number;
    readonly flashAttention: boolean;
  }): Promise<{ readonly _ctx: AddonContext }>;
}

export interface AddonContext {
  initBatch(tokens: number): void;
  /** @returns for each of `logitIndexes` (into `tokens`) where in the batch its logits will be */
  addToBatch(sequence: number, position: number, tokens: Uint32Array, logitIndexes: Uint32Array): Uint32Array;
  decodeBatch(): Promise<void>;
  /** @returns -1 where there is none */
  sampleToken(batchIndex: number, sampler: AddonSampler): Promise<number>;
  disposeSequence(sequence: number): void;
}

export interface AddonSampler {
  applyConfig(options: { readonly temperature: number }): void;
}

export async function importNodeLlamaCpp(): Promise<NodeLlamaCpp> {
  const file = createRequire(join(peerDir, 'package.json')).resolve('node-llama-cpp');
  return (await import(pathToFileURL(file).href)) as NodeLlamaCpp;
}
