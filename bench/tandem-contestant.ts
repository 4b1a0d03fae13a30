import type { TandemClient } from '../cli/client.js';
import type { EngineFlags } from '../cli/engine-options.js';
import { startLocalCluster } from '../cli/local-cluster.js';
import { BATCH, promptTokens, SHORT_PROMPT, type Contestant, type Entrant, type Lengths, type Phase, type Sample } from './contestant.js';

/** Blocks of 16 tokens: the streams of a batch, or the long prompt, and some more. */
const KV_BLOCKS = 192;
/** [gMASK] and <sop>, which the server adds to a prompt. */
const ADDED_TOKENS = 2;

export interface TandemOptions {
  readonly storeDir: string;
  readonly vocabSize: number;
  readonly storeBytes: number;
  readonly lengths: Lengths;
  readonly engine: Partial<EngineFlags>;
  readonly layout: Layout;
}

export interface Layout {
  readonly workers: number;
  readonly threads: number;
}

/** This project: a real server with its workers, measured through its public API. */
export function tandemEntrant(options: TandemOptions): Entrant {
  const { workers, threads } = options.layout;
  return { name: `${workers} x ${threads}`, memoryBytes: options.storeBytes * 1.5 + 1e9, start: () => start(options) };
}

async function start({ storeDir, vocabSize, lengths, engine, layout: { workers, threads } }: TandemOptions): Promise<Contestant> {
  const cluster = await startLocalCluster({ model: storeDir, worldSize: workers, threads, kvBlocks: KV_BLOCKS, engine });
  const { client } = cluster;
  const status = await client.status();
  const phases: Record<Phase, (seed: number) => Promise<Sample>> = {
    prefill: async (seed) => {
      const { prefillMs } = await generate(client, promptTokens(lengths.prefillTokens - ADDED_TOKENS, seed, vocabSize), 1);
      return { tokensPerSecond: (lengths.prefillTokens * 1000) / prefillMs, stepMs: null };
    },
    decode: (seed) => decode(client, promptTokens(SHORT_PROMPT - ADDED_TOKENS, seed, vocabSize), lengths.decodeTokens),
    batch: async (seed) => {
      const prompts = Array.from({ length: BATCH }, (_, i) => promptTokens(SHORT_PROMPT - ADDED_TOKENS, seed * 100 + i, vocabSize));
      const begin = performance.now();
      const streams = await Promise.all(prompts.map((prompt) => generate(client, prompt, lengths.decodeTokens)));
      const ms = performance.now() - begin - Math.max(...streams.map(({ prefillMs }) => prefillMs));
      return { tokensPerSecond: (BATCH * (lengths.decodeTokens - 1) * 1000) / ms, stepMs: null };
    },
  };
  return {
    bytesPerToken: status.workers.reduce((sum, { weightBytes }) => sum + weightBytes, 0),
    description: [`${status.workers[0]!.isa} kernels`, ...Object.entries(engine).map(([flag, value]) => `${flag} ${value}`)].join(', '),
    run: (phase, seed) => phases[phase](seed),
    close: () => cluster.close(),
  };
}

async function decode(client: TandemClient, prompt: readonly number[], tokens: number): Promise<Sample> {
  const before = (await client.status()).totals!;
  const { prefillMs, decodeMs } = await generate(client, prompt, tokens);
  const after = (await client.status()).totals!;
  const steps = after.steps - before.steps;
  return {
    tokensPerSecond: ((tokens - 1) * 1000) / decodeMs,
    stepMs: {
      total: (prefillMs + decodeMs) / steps,
      compute: ((after.stepSeconds - before.stepSeconds) * 1000) / steps,
      collectives: ((after.collectiveSeconds - before.collectiveSeconds) * 1000) / steps,
    },
  };
}

/** Exactly `newTokens` greedy ones after the prompt. */
async function generate(client: TandemClient, prompt: readonly number[], newTokens: number) {
  const finish = await client.generate({
    ids: { ids: [...prompt] },
    mode: 'MODE_GMASK',
    temperature: 0,
    maxNewTokens: newTokens,
    endTokens: { ids: [] },
  });
  if (finish.usage!.generatedTokens !== newTokens) throw new Error(`${finish.usage!.generatedTokens} tokens instead of ${newTokens}`);
  return finish.timings!;
}
