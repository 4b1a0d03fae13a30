/** What the serving loop tells whoever measures: metrics, latency windows, traces. Calls come between steps and have to be cheap. */
export interface LoopObserver {
  step(step: StepStats): void;
  /** A running request got tokens, `ms` after its previous ones. */
  interToken(ms: number): void;
  /** A request got its first tokens, `ms` after it arrived. */
  firstToken(ms: number): void;
  ended(request: RequestStats): void;
  /** A request was refused before it was queued. */
  rejected(reason: RejectReason): void;
  preempted(): void;
}

export type RejectReason =
  'invalid' | 'queue_full' | 'rate_limited' | 'not_ready' | 'unauthenticated' | 'forbidden' | 'too_large' | 'other';

/** Milliseconds of one step, which follow one another: schedule, wire, compute + allReduce + sample (on the workers), emit. */
export interface StepStats {
  readonly scheduleMs: number;
  /** Round trip without the slowest rank's time; of which `codecMs` is encoding and decoding. */
  readonly wireMs: number;
  readonly codecMs: number;
  /** Of the slowest rank, without its collectives and without `sampleMs`. */
  readonly computeMs: number;
  readonly allReduceMs: number;
  readonly sampleMs: number;
  /** Applying the results, resuming strategies, handing tokens to clients. */
  readonly emitMs: number;
  readonly ranks: readonly { readonly computeMs: number; readonly collectiveMs: number }[];
  /** Tokens of Extends of one token, and of longer ones (a sliced one counts by its share of the layers). */
  readonly decodeTokens: number;
  readonly prefillTokens: number;
  /** New tokens that requests took from the results, all samples and beams. */
  readonly generatedTokens: number;
  readonly extends: number;
}

export interface RequestStats {
  readonly requestId: string;
  /** Name of the API key. */
  readonly key: string;
  readonly outcome: 'finished' | 'failed' | 'cancelled' | 'expired';
  /** `code` of the error; null for `finished`. */
  readonly errorCode: string | null;
  /** performance.now() of its arrival. */
  readonly arrivalMs: number;
  readonly timings: RequestTimings;
  readonly promptTokens: number;
  readonly cachedPromptTokens: number;
  readonly generatedTokens: number;
  readonly preemptions: number;
  /** The W3C header of that name that came with the request: its span becomes a child of the caller's. */
  readonly traceParent?: string | null;
}

/**
 * Milliseconds: arrival to first step; from there to the first result that carries tokens; from there to the end. `stallMs` of prefill
 * and decode passed without a step of this request.
 */
export interface RequestTimings {
  readonly queueMs: number;
  readonly prefillMs: number;
  readonly decodeMs: number;
  readonly stallMs: number;
}

/** One observer that tells several, in their order. */
export function observers(...all: readonly LoopObserver[]): LoopObserver {
  return {
    step: (step) => all.forEach((observer) => observer.step(step)),
    interToken: (ms) => all.forEach((observer) => observer.interToken(ms)),
    firstToken: (ms) => all.forEach((observer) => observer.firstToken(ms)),
    ended: (request) => all.forEach((observer) => observer.ended(request)),
    rejected: (reason) => all.forEach((observer) => observer.rejected(reason)),
    preempted: () => all.forEach((observer) => observer.preempted()),
  };
}

export const NO_OBSERVER: LoopObserver = {
  step: () => {},
  interToken: () => {},
  firstToken: () => {},
  ended: () => {},
  rejected: () => {},
  preempted: () => {},
};
