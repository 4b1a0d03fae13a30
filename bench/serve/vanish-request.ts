import { createRandom } from '../../cli/load/random.js';

/** What `vanish-clients` sends to its parent. */
export interface VanishResult {
  readonly vanished: number;
  /** Of clients that stayed, with a number each. */
  readonly finished: readonly { readonly client: number; readonly tokens: readonly number[] }[];
  readonly failures: readonly { readonly client: number; readonly error: string }[];
}

export const VANISH_OUTPUT_TOKENS = 32;
const PROMPT_TOKENS = 24;

/** The request of a client; greedy, and different from that of any other. */
export function vanishRequest(client: number) {
  const random = createRandom(77, client);
  return {
    ids: { ids: Array.from({ length: PROMPT_TOKENS }, () => random.integer(1000, 3700)) },
    mode: 'MODE_GMASK' as const,
    temperature: 0,
    maxNewTokens: VANISH_OUTPUT_TOKENS,
    endTokens: { ids: [] },
  };
}
