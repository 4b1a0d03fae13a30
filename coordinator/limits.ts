import { ConfigError } from '../common/errors.js';

/**
 * Every bound of what clients may ask for, with its default. The one table: flags, checks and messages come from it. 0 where
 * it is allowed means "no bound but the model's or the machine's".
 */
export const LIMITS = {
  maxQueuedRequests: { default: 1024, min: 1, max: 1_000_000, what: 'requests that may wait' },
  maxQueuedTokens: { default: 1_000_000, min: 1, max: 1_000_000_000, what: 'prompt tokens of all requests that wait' },
  maxPromptTokens: { default: 0, min: 0, max: 1_000_000, what: 'tokens of a prompt (0: what the model takes)' },
  maxNewTokens: { default: 0, min: 0, max: 1_000_000, what: 'new tokens of a blank (0: what the model takes)' },
  maxSamples: { default: 64, min: 1, max: 256, what: 'samples of a request' },
  maxBeams: { default: 64, min: 1, max: 256, what: 'beams of a request' },
  maxChoices: { default: 256, min: 1, max: 4096, what: 'choices of a scoring request' },
  maxStopStrings: { default: 16, min: 0, max: 1024, what: 'stop strings of a request' },
  maxStopStringBytes: { default: 256, min: 1, max: 65_536, what: 'bytes of a stop string' },
  maxEndTokens: { default: 64, min: 0, max: 4096, what: 'end tokens of a request' },
  maxBannedTokens: { default: 4096, min: 0, max: 1_000_000, what: 'banned tokens of a request' },
  maxBannedPrefixes: { default: 256, min: 0, max: 4096, what: 'banned prefixes of a beam search' },
  maxBannedPrefixTokens: { default: 16, min: 1, max: 1024, what: 'tokens of a banned prefix' },
  maxLogitBiases: { default: 1024, min: 0, max: 65_536, what: 'logit biases of a request' },
  maxLogprobs: { default: 20, min: 0, max: 1024, what: 'best tokens whose log-probabilities are reported' },
  maxTextBytes: { default: 1024 * 1024, min: 1, max: 64 * 1024 * 1024, what: 'bytes of a text' },
  maxDetokenizedIds: { default: 65_536, min: 1, max: 16_777_216, what: 'ids of a detokenize call' },
  maxBatchedPrompts: { default: 64, min: 1, max: 4096, what: 'prompts of one HTTP completion' },
  maxMessageBytes: { default: 4 * 1024 * 1024, min: 1024, max: 256 * 1024 * 1024, what: 'bytes of a message or body' },
  maxHeaderBytes: { default: 16 * 1024, min: 1024, max: 1024 * 1024, what: 'bytes of the headers of a call' },
  maxConnections: { default: 4096, min: 1, max: 1_000_000, what: 'connections of each listener' },
  maxStreamsPerKey: { default: 4096, min: 1, max: 1_000_000, what: 'requests of one API key that may wait or run' },
  maxTokensPerMinute: { default: 0, min: 0, max: 1_000_000_000_000, what: 'tokens of one API key in a minute (0: any)' },
  maxBufferedBytes: { default: 1024 * 1024, min: 1024, max: 1024 * 1024 * 1024, what: 'bytes that a slow reader may leave unread' },
} as const satisfies Record<string, { default: number; min: number; max: number; what: string }>;

export type LimitName = keyof typeof LIMITS;
export type Limits = Readonly<Record<LimitName, number>>;

export const DEFAULT_LIMITS = limitsFrom({});

/** @throws ConfigError naming a limit that is out of its bounds */
export function limitsFrom(given: Partial<Record<LimitName, number | undefined>>): Limits {
  const entries = Object.entries(LIMITS).map(([name, { default: usual, min, max }]) => {
    const value = given[name as LimitName] ?? usual;
    if (!Number.isInteger(value) || value < min || value > max) {
      throw new ConfigError(`${name} is ${value}, allowed are whole numbers from ${min} to ${max}`);
    }
    return [name, value];
  });
  return Object.freeze(Object.fromEntries(entries) as Record<LimitName, number>);
}

/** Tokens of one step before a longer run goes through the layers in several. */
export const DEFAULT_STEP_TOKENS = 256;
