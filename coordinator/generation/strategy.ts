/**
 * What a generation strategy is written against: sequences that can be extended, forked and released, and the results of
 * Extends. A strategy is a generator: it yields the Extends that it wants next and is resumed with their results, in the
 * same order. It knows no clock, queue, block or worker.
 */
export type Strategy<R> = Generator<readonly ExtendOp[], R, readonly ExtendResult[]>;

/** One token stream with its KV cache; made by {@link Sequences}. */
export interface Sequence {
  readonly id: number;
  /** Tokens appended so far, those of not yet executed Extends included. */
  readonly length: number;
}

export interface Sequences {
  create(): Sequence;
  /** A sequence with the same tokens that shares the parent's KV blocks until one of the two writes. */
  fork(parent: Sequence): Sequence;
  /** Gives the blocks back. Whatever a strategy leaves over is released when it ends. */
  release(sequence: Sequence): void;
}

export interface ExtendOp {
  readonly sequence: Sequence;
  readonly tokens: readonly number[];
  readonly positions: readonly number[];
  /** Token i of the run sees all earlier tokens of the sequence and run tokens j with j <= i or j < bidirectionalTokens. */
  readonly bidirectionalTokens: number;
  readonly want: Want;
  /**
   * What comes of the sequence once the sample that is wanted is there, as far as it can be said before; not given: it cannot. The next step
   * may then be on its way already when the sample comes.
   */
  readonly next?: NextExtend | typeof NOTHING_NEXT | undefined;
}

/** The strategy goes on with the drawn token alone, at this position and with this very want; or it ends or releases the sequence. */
export interface NextExtend {
  readonly position: number;
  readonly want: Want;
}

/** Whatever the sample is, the sequence is not extended by it. */
export const NOTHING_NEXT = 'nothing';

export type Want =
  | { readonly kind: 'none' }
  | { readonly kind: 'sample'; readonly params: StepSampling; readonly noise: Noise; readonly topLogprobs: number }
  /** The `count` largest log-probabilities after banning, or `count` draws without replacement where `noise` is given. */
  | { readonly kind: 'candidates'; readonly count: number; readonly bannedTokens: readonly number[]; readonly noise: Noise | null }
  /** Log-probabilities of these tokens, one for each of the last rows of the run. */
  | { readonly kind: 'targets'; readonly tokens: readonly number[] }
  /** Raw logits of the last `rows` rows. */
  | { readonly kind: 'logits'; readonly rows: number };

/** Temperature 0 takes the largest logit, the lowest id among equals. */
export interface StepSampling {
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
  readonly bannedTokens: readonly number[];
  /** Added to the logits of `biasTokens`, before the repetition penalty and the temperature. */
  readonly biasTokens: readonly number[];
  readonly biases: readonly number[];
  /** Positive logits of `repeatedTokens` are divided by it, negative ones multiplied (CTRL, section 4.1); 1: off. */
  readonly repetitionPenalty: number;
  readonly repeatedTokens: readonly number[];
}

/** Key of the counter-based noise: equal keys draw alike, whatever else runs. */
export interface Noise {
  readonly seed: bigint;
  readonly stream: number;
  readonly position: number;
}

export type ExtendResult =
  | { readonly kind: 'none' }
  | {
      readonly kind: 'sample';
      readonly token: number;
      /** Of the model's own distribution (temperature 1, nothing banned or cut). */
      readonly logprob: number;
      readonly topTokens: ArrayLike<number>;
      readonly topLogprobs: ArrayLike<number>;
    }
  /** Best first by `keys`: the log-probability plus noise, or the log-probability itself. */
  | {
      readonly kind: 'candidates';
      readonly tokens: ArrayLike<number>;
      readonly logprobs: ArrayLike<number>;
      readonly keys: ArrayLike<number>;
    }
  | { readonly kind: 'targets'; readonly logprobs: ArrayLike<number> }
  | { readonly kind: 'logits'; readonly logits: Float32Array }
  /** What was wanted could not be made (a logit is not a number). No other Extend is touched by it. */
  | { readonly kind: 'error'; readonly message: string };
