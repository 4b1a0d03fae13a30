/** What is sent: request number i is the same for the same options, whatever the server answers and whenever it is sent. */
import { drawLength, type Distribution } from './distribution.js';
import { createRandom } from './random.js';

export interface WorkloadOptions {
  readonly seed: number;
  readonly prompts: PromptSource;
  readonly outputTokens: Distribution;
  /** Share of requests that leave in mid-stream. */
  readonly cancelFraction: number;
  /** Taken in turn; empty: none. */
  readonly keys: readonly string[];
}

export type PromptSource =
  | { readonly kind: 'texts'; readonly texts: readonly string[] }
  | {
      readonly kind: 'ids';
      readonly lengths: Distribution;
      /** Ordinary tokens: from `low` to `high`, both included. */
      readonly low: number;
      readonly high: number;
      /** Tokens that prompt and output may have together; null: any. */
      readonly maxTokens: number | null;
      /** Different prompts that all requests but `uniqueFraction` have in common. */
      readonly sharedContexts: number;
      readonly uniqueFraction: number;
    };

export interface PlannedRequest {
  readonly index: number;
  readonly prompt: { readonly text: string } | { readonly ids: readonly number[] };
  readonly outputTokens: number;
  /** The prompt was cut to leave room for the output. */
  readonly isCut: boolean;
  /** Leaves after so many tokens; null: stays. */
  readonly cancelAfter: number | null;
  readonly key: string | null;
}

export function planRequest(index: number, options: WorkloadOptions): PlannedRequest {
  const random = createRandom(options.seed, index);
  // Drawn in this order and always all of them: one option changes nothing of what the others give.
  const outputTokens = drawLength(options.outputTokens, random);
  const isCancelled = random.uniform() < options.cancelFraction;
  const cancelShare = random.uniform();
  const choice = random.uniform();
  const isUnique = random.uniform();
  const { prompt, isCut } = draw(options, index, { choice, isUnique, outputTokens });
  return {
    index,
    prompt,
    outputTokens,
    isCut,
    cancelAfter: isCancelled && outputTokens > 1 ? 1 + Math.floor(cancelShare * (outputTokens - 1)) : null,
    key: options.keys[index % Math.max(1, options.keys.length)] ?? null,
  };
}

function draw(
  { prompts, seed }: WorkloadOptions,
  index: number,
  { choice, isUnique, outputTokens }: { readonly choice: number; readonly isUnique: number; readonly outputTokens: number },
): Pick<PlannedRequest, 'prompt' | 'isCut'> {
  if (prompts.kind === 'texts') return { prompt: { text: prompts.texts[Math.floor(choice * prompts.texts.length)]! }, isCut: false };
  const isShared = prompts.sharedContexts > 0 && isUnique >= prompts.uniqueFraction;
  const stream = isShared ? SHARED + Math.floor(choice * prompts.sharedContexts) : UNIQUE + index;
  const random = createRandom(seed, stream);
  const length = drawLength(prompts.lengths, random);
  const room = prompts.maxTokens === null ? Infinity : Math.max(1, prompts.maxTokens - outputTokens);
  const ids = Array.from({ length: Math.min(length, room) }, () => random.integer(prompts.low, prompts.high));
  return { prompt: { ids }, isCut: length > room };
}

/** Seeds of prompts, apart from those of requests. */
const SHARED = 2 ** 40;
const UNIQUE = 2 ** 41;
