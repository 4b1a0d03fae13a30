import type { Tokenizer } from '../../model/tokenizer/tokenizer.js';
import type { BlankContext } from '../../model/tokenizer/blank-context.js';
import { prefill } from './prefill.js';
import { BlankText, type FinalPart } from './blank-text.js';
import type { LogitChanges } from './logit-changes.js';
import type { FinishReason, TokenLogprob } from './request.js';
import {
  NOTHING_NEXT,
  type ExtendOp,
  type ExtendResult,
  type Sequence,
  type Sequences,
  type StepSampling,
  type Strategy,
  type Want,
} from './strategy.js';

export interface Span {
  readonly context: BlankContext;
  readonly sampling: Pick<StepSampling, 'temperature' | 'topK' | 'topP'>;
  /** Of this output, blanks before this one included; drawn tokens are told to it. */
  readonly logitChanges: LogitChanges;
  readonly endTokens: readonly number[];
  readonly bannedTokens: readonly number[];
  /** End tokens are banned for that many tokens. */
  readonly minNewTokens: number;
  /** At least 1. */
  readonly maxNewTokens: number;
  readonly stopStrings: readonly string[];
  /** How many best tokens of each step are reported with its log-probability; null: neither. */
  readonly topLogprobs: number | null;
  readonly seed: bigint;
  /** Index of the sample in the request. */
  readonly stream: number;
  /** Tokens drawn for this sample's earlier blanks: no noise is used twice. */
  readonly firstDraw: number;
  readonly tokenizer: Tokenizer | null;
  /** @param logprobs of the part's tokens, where they are asked for */
  readonly emit: (part: FinalPart, logprobs: readonly TokenLogprob[] | null) => void;
}

export interface SpanResult {
  /** Without the end token. */
  readonly tokens: readonly number[];
  readonly text: string;
  readonly finish: FinishReason;
  /** Tokens drawn: an end token and what a stop string cut off included. */
  readonly draws: number;
}

/**
 * Fills one blank of one sample, token by token (model-spec section 4), until an end token, a stop string or the length limit.
 *
 * @param sequence holds the first `cached` tokens of the context, 0 or all but the last; it is released
 */
export function* sampleSpan(sequences: Sequences, sequence: Sequence, cached: number, span: Span): Strategy<SpanResult> {
  const blank = new BlankText(span.tokenizer, span.stopStrings);
  /** Of the tokens whose text is not final yet. */
  const logprobs: TokenLogprob[] | null = span.topLogprobs === null ? null : [];
  const emit = (part: FinalPart): void => {
    if (part.text !== '' || part.tokens.length > 0) span.emit(part, logprobs && logprobs.splice(0, part.tokens.length));
  };
  let finish: FinishReason = 'length';
  let draws = 0;
  const want = wantsOf(span);
  const next = (draw: number): ExtendOp['next'] => {
    if (draw === span.maxNewTokens) return NOTHING_NEXT;
    return span.logitChanges.areKnown ? { position: span.context.positionOf(draw - 1), want: want(draw) } : undefined;
  };
  let op: ExtendOp = { ...prefill(sequence, span.context, want(0), cached), next: next(1) };
  while (true) {
    const results = yield [op];
    const result = results[0]; // a pattern would take an iterator
    if (result?.kind !== 'sample') throw new Error(`an Extend that wanted a sample gave ${result?.kind ?? 'nothing'}`);
    draws += 1;
    span.logitChanges.count(result.token);
    if (span.endTokens.includes(result.token)) {
      finish = 'end';
      break;
    }
    logprobs?.push(tokenLogprob(result));
    emit(blank.push(result.token));
    if (blank.isStopped) {
      finish = 'stop';
      break;
    }
    if (op.next === NOTHING_NEXT) break;
    const { position, want: wanted } = op.next ?? { position: span.context.positionOf(draws - 1), want: want(draws) };
    op = { sequence, tokens: [result.token], positions: [position], bidirectionalTokens: 0, want: wanted, next: next(draws + 1) };
  }
  sequences.release(sequence);
  if (finish !== 'stop') {
    emit(blank.finish());
    if (blank.isStopped) finish = 'stop';
  }
  return { ...blank.result(), finish, draws };
}

/** @returns what is wanted of a draw */
function wantsOf(span: Span): (draw: number) => Want {
  const { bannedTokens, endTokens, minNewTokens, seed, stream, firstDraw, logitChanges } = span;
  const topLogprobs = span.topLogprobs ?? 0;
  const { temperature, topK, topP } = span.sampling;
  const paramsFor = (banned: readonly number[]): StepSampling => {
    const { biasTokens, biases, repetitionPenalty, repeatedTokens } = logitChanges.now();
    // Written out: spreading two objects costs microseconds for every token.
    return { temperature, topK, topP, bannedTokens: banned, biasTokens, biases, repetitionPenalty, repeatedTokens };
  };
  const withoutEnd = [...bannedTokens, ...endTokens];
  const unchanging = logitChanges.areKnown ? paramsFor(bannedTokens) : null;
  return (draw) => {
    const params = draw < minNewTokens ? paramsFor(withoutEnd) : (unchanging ?? paramsFor(bannedTokens));
    return { kind: 'sample', params, noise: { seed, stream, position: firstDraw + draw }, topLogprobs };
  };
}

function tokenLogprob(result: Extract<ExtendResult, { kind: 'sample' }>): TokenLogprob {
  const top = Array.from(result.topTokens, (token, i) => ({ token, logprob: result.topLogprobs[i]! }));
  return { token: result.token, logprob: result.logprob, top };
}
