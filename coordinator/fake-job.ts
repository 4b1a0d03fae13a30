import { NOTHING_NEXT, type Sequences, type Strategy, type Want } from './generation/strategy.js';
import type { Job } from './job.js';

/** Of the engines that tests run these jobs on. */
export const BLOCK_SIZE = 4;

export interface Shape {
  readonly prompt: number;
  readonly newTokens: number;
  readonly samples: number;
  /** What follows a token is said before it is there: default true. */
  readonly foresees?: boolean;
  /** A sample ends with a token that can be divided by it. */
  readonly endsWith?: number;
}

/** Once round the event loop: a step of the fake engine at most. */
export const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

export async function turnsUntil(isTrue: () => boolean): Promise<void> {
  for (let i = 0; !isTrue(); i++) {
    if (i === 10_000) throw new Error('it never came to that');
    await turn();
  }
}

/** For tests of the loop: prefill, then `samples` forks that decode `newTokens` each at most; the seed makes requests of equal shape different. */
export function fakeJob(
  { prompt, newTokens, samples, foresees = true, endsWith }: Shape,
  seed: number,
  changes: Partial<Job<number[][]>> = {},
): Job<number[][]> {
  function* strategy(sequences: Sequences): Strategy<number[][]> {
    const context = sequences.create();
    const tokens = Array.from({ length: prompt }, (_, i) => (seed * 31 + i * 7) % 997);
    yield [{ sequence: context, tokens, positions: tokens.map((_, i) => i), bidirectionalTokens: prompt, want: { kind: 'none' } }];
    const rows = Array.from({ length: samples }, (_, stream) => ({
      sequence: sequences.fork(context),
      stream,
      tokens: [seed % 997],
      want: wantedSample(seed, stream, 0),
    }));
    sequences.release(context);
    let left = rows;
    for (let i = 0; i < newTokens && left.length > 0; i++) {
      const isLast = i === newTokens - 1;
      const following = left.map(({ stream }) => wantedSample(seed, stream, i + 1));
      const results = yield left.map(({ sequence, tokens: own, want }, at) => ({
        sequence,
        tokens: [own.at(-1)!],
        positions: [prompt + i],
        bidirectionalTokens: 0,
        want,
        next: isLast ? NOTHING_NEXT : foresees ? { position: prompt + i + 1, want: following[at]! } : undefined,
      }));
      left = left.filter((row, at) => {
        const result = results[at]!;
        if (result.kind !== 'sample') throw new Error(`got ${result.kind}`);
        row.tokens.push(result.token);
        row.want = following[at]!;
        const goesOn = endsWith === undefined || result.token % endsWith > 0;
        if (!goesOn) sequences.release(row.sequence);
        return goesOn;
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
