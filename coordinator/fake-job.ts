import type { Sequences, Strategy, Want } from './generation/strategy.js';
import type { Job } from './job.js';

/** Of the engines that tests run these jobs on. */
export const BLOCK_SIZE = 4;

export interface Shape {
  readonly prompt: number;
  readonly newTokens: number;
  readonly samples: number;
}

/** Once round the event loop: a step of the fake engine at most. */
export const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

export async function turnsUntil(isTrue: () => boolean): Promise<void> {
  for (let i = 0; !isTrue(); i++) {
    if (i === 10_000) throw new Error('it never came to that');
    await turn();
  }
}

/** For tests of the loop: prefill, then `samples` forks that decode `newTokens` each; the seed makes requests of equal shape different. */
export function fakeJob({ prompt, newTokens, samples }: Shape, seed: number, changes: Partial<Job<number[][]>> = {}): Job<number[][]> {
  function* strategy(sequences: Sequences): Strategy<number[][]> {
    const context = sequences.create();
    const tokens = Array.from({ length: prompt }, (_, i) => (seed * 31 + i * 7) % 997);
    yield [{ sequence: context, tokens, positions: tokens.map((_, i) => i), bidirectionalTokens: prompt, want: { kind: 'none' } }];
    const rows = Array.from({ length: samples }, () => ({ sequence: sequences.fork(context), tokens: [seed % 997] }));
    sequences.release(context);
    for (let i = 0; i < newTokens; i++) {
      const results = yield rows.map(({ sequence, tokens: own }, stream) => ({
        sequence,
        tokens: [own.at(-1)!],
        positions: [prompt + i],
        bidirectionalTokens: 0,
        want: wantedSample(seed, stream, i),
      }));
      results.forEach((result, stream) => {
        if (result.kind !== 'sample') throw new Error(`got ${result.kind}`);
        rows[stream]!.tokens.push(result.token);
      });
    }
    return rows.map(({ tokens: own }) => own);
  }
  const perSample = Math.ceil((prompt + newTokens) / BLOCK_SIZE) + 1;
  return {
    requestId: `request-${nextRequest++}`,
    caller: { name: '', weight: 1, maxStreams: null, maxTokensPerMinute: null },
    priority: 0,
    timeoutMs: null,
    promptTokens: prompt,
    maxBlocks: Math.ceil(prompt / BLOCK_SIZE) + samples * perSample,
    maxSequences: samples + 1,
    start: strategy,
    ...changes,
  };
}

let nextRequest = 1;

export function wantedSample(seed: number, stream: number, position: number): Want {
  return {
    kind: 'sample',
    params: {
      temperature: 1,
      topK: 0,
      topP: 0,
      bannedTokens: [],
      biasTokens: [],
      biases: [],
      repetitionPenalty: 1,
      repeatedTokens: [],
    },
    noise: { seed: BigInt(seed), stream, position },
    topLogprobs: 0,
  };
}

/** Who asks, by the name of the API key. */
export function callerNamed(name: string, changes: Partial<Job<unknown>['caller']> = {}): Job<unknown>['caller'] {
  return { name, weight: 1, maxStreams: null, maxTokensPerMinute: null, ...changes };
}
