import { DeadlineError, type TandemError } from '../common/errors.js';
import type { Caller } from './access/caller.js';
import type { Sequences, Strategy } from './generation/strategy.js';
import type { RequestTimings } from './status/observer.js';

/** One request as the loop sees it: a strategy to drive, how it is to be scheduled, and what it can come to need. */
export interface Job<R> {
  /** Unique among the requests that wait or run. */
  readonly requestId: string;
  readonly caller: Pick<Caller, 'name' | 'weight' | 'maxStreams' | 'maxTokensPerMinute'>;
  /** Higher goes first. */
  readonly priority: number;
  /** From its arrival to the end, waiting included; null: none. */
  readonly timeoutMs: number | null;
  /** Of which before the submission; default 0. */
  readonly elapsedMs?: number;
  readonly promptTokens: number;
  /** KV blocks that it can hold at once, at worst. */
  readonly maxBlocks: number;
  /** Sequences that it can have at once, at worst. */
  readonly maxSequences: number;
  /** W3C trace context of the caller, for the traces. */
  readonly traceParent?: string | null;
  start(sequences: Sequences): Strategy<R>;
}

export interface Ticket<R> {
  readonly requestId: string;
  /** Rejects with a TandemError. */
  readonly done: Promise<Completed<R>>;
  /** Ends the request before the next step; `done` rejects with the error, a CancelledError if none is given. No effect once it has ended. */
  cancel(reason?: TandemError): void;
}

export interface Completed<R> {
  readonly value: R;
  readonly timings: RequestTimings;
  /** Prompt tokens that were found computed. */
  readonly cachedPromptTokens: number;
}

export function notDoneWithin(timeoutMs: number): DeadlineError {
  return new DeadlineError(`not done within its ${timeoutMs} ms`);
}
