/**
 * Runs llama.cpp through node-llama-cpp in a process of its own: loads, says `ready`, and then measures what it is asked to.
 *
 * The settings are those that are best for llama.cpp here: weights mapped and repacked for the instruction set (which it does by itself), flash
 * attention, prompts in one batch, an fp16 cache, greedy sampling. Tokens go round through the binding just above `llama_decode`: the package's queue
 * of evaluations is left out, as it is no part of what is compared.
 */
import { BATCH, promptTokens, SHORT_PROMPT, type Phase } from '../contestant.js';
import { importNodeLlamaCpp, type AddonContext, type AddonSampler } from './node-llama-cpp.js';
import type { PeerMessage, PeerOptions, PeerRequest } from './peer-messages.js';

const FLASH_ATTENTION = true;

const options = JSON.parse(process.argv[2]!) as PeerOptions;
const { lengths, vocabSize, threads } = options;
const send = (message: PeerMessage): boolean => process.send!(message);
const reply = (work: Promise<PeerMessage>): void =>
  void work.catch((error: unknown): PeerMessage => ({ kind: 'error', message: String(error) })).then(send);

process.on('disconnect', () => process.exit());
let context: AddonContext;
let samplers: readonly AddonSampler[];
reply(load());
process.on('message', ({ phase, seed }: PeerRequest) =>
  reply(PHASE_RUNS[phase](seed).then((rate) => ({ kind: 'result', tokensPerSecond: rate }))),
);

async function load(): Promise<PeerMessage> {
  const library = await importNodeLlamaCpp();
  const llama = await library.getLlama({
    build: 'never',
    skipDownload: true,
    gpu: false,
    maxThreads: threads,
    logLevel: 'error',
    progressLogs: false,
  });
  const model = await llama.loadModel({ modelPath: options.modelFile, gpuLayers: 0, useMmap: true });
  const contextSize = Math.max(lengths.prefillTokens, SHORT_PROMPT + lengths.decodeTokens);
  const created = await model.createContext({
    contextSize,
    sequences: BATCH,
    batchSize: lengths.prefillTokens,
    threads,
    flashAttention: FLASH_ATTENTION,
  });
  context = created._ctx;
  samplers = Array.from({ length: BATCH }, () => {
    const sampler = new llama._bindings.AddonSampler(model._model);
    sampler.applyConfig({ temperature: 0 });
    return sampler;
  });
  const features = llama.systemInfo.matchAll(/(\w+) = 1/g);
  return { kind: 'ready', description: `llama.cpp ${llama.llamaCppRelease.release}, ${[...features].map((match) => match[1]).join(' ')}` };
}

const PHASE_RUNS: Record<Phase, (seed: number) => Promise<number>> = {
  prefill: async (seed) => {
    const begin = performance.now();
    await step([promptTokens(lengths.prefillTokens, seed, vocabSize)], 0);
    const ms = performance.now() - begin;
    forget(1);
    return (lengths.prefillTokens * 1000) / ms;
  },
  decode: (seed) => decode([promptTokens(SHORT_PROMPT, seed, vocabSize)]),
  batch: (seed) => decode(Array.from({ length: BATCH }, (_, i) => promptTokens(SHORT_PROMPT, seed * 100 + i, vocabSize))),
};

/** Tokens per second of all sequences together, after the first of each. */
async function decode(prompts: readonly (readonly number[])[]): Promise<number> {
  let tokens = await step(prompts, 0);
  const steps = lengths.decodeTokens - 1;
  const begin = performance.now();
  for (let i = 0; i < steps; i++) {
    tokens = await step(
      tokens.map((token) => [token]),
      SHORT_PROMPT + i,
    );
  }
  const ms = performance.now() - begin;
  forget(prompts.length);
  return (prompts.length * steps * 1000) / ms;
}

/** One `llama_decode` of a run of tokens of each sequence, and the token that follows each. */
async function step(runs: readonly (readonly number[])[], position: number): Promise<number[]> {
  context.initBatch(runs.reduce((sum, run) => sum + run.length, 0));
  const places = runs.map((run, i) => context.addToBatch(i, position, Uint32Array.from(run), Uint32Array.of(run.length - 1))[0]!);
  await context.decodeBatch();
  const next = await Promise.all(places.map((place, i) => context.sampleToken(place, samplers[i]!)));
  if (next.some((token) => token < 0)) throw new Error('the peer has no next token');
  return next;
}

function forget(sequences: number): void {
  for (let i = 0; i < sequences; i++) context.disposeSequence(i);
}
