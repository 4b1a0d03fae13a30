import type { Tokenizer } from '../../model/tokenizer/tokenizer.js';
import { type BlankContext, prefill } from './blank-context.js';
import { BlankText, type FinalPart } from './blank-text.js';
import type { LogitChanges } from './logit-changes.js';
import type { FinishReason, TokenLogprob } from './request.js';
import type { ExtendResult, Sequence, Sequences, StepSampling, Strategy, Want } from './strategy.js';

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
  /** How many best tokens of each step are reported. */
  readonly topLogprobs: number;
  readonly seed: bigint;
  /** Index of the sample in the request. */
  readonly stream: number;
  /** Tokens drawn for this sample's earlier blanks: no noise is used twice. */
  readonly firstDraw: number;
  readonly tokenizer: Tokenizer | null;
  readonly emit: (part: FinalPart) => void;
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
  let finish: FinishReason = 'length';
  let draws = 0;
  const want = wantsOf(span);
  let op = prefill(sequence, span.context, want(0), cached);
  while (true) {
    const [result] = yield [op];
    if (result?.kind !== 'sample') throw new Error(`an Extend that wanted a sample gave ${result?.kind ?? 'nothing'}`);
    draws += 1;
    span.logitChanges.count(result.token);
    if (span.endTokens.includes(result.token)) {
      finish = 'end';
      break;
    }
    emitPart(span, blank.push(tokenLogprob(result)));
    if (blank.isStopped) {
      finish = 'stop';
      break;
    }
    if (draws === span.maxNewTokens) break;
    const positions = [span.context.positionOf(draws - 1)];
    op = { sequence, tokens: [result.token], positions, bidirectionalTokens: 0, want: want(draws) };
  }
  sequences.release(sequence);
  if (finish !== 'stop') {
    emitPart(span, blank.finish());
    if (blank.isStopped) finish = 'stop';
  }
  return { ...blank.result(), finish, draws };
}

/** @returns what is wanted of a draw */
function wantsOf(span: Span): (draw: number) => Want {
  const { bannedTokens, endTokens, minNewTokens, seed, stream, firstDraw, topLogprobs, logitChanges } = span;
  const { temperature, topK, topP } = span.sampling;
  const paramsFor = (banned: readonly number[]): StepSampling => {
    const { biasTokens, biases, repetitionPenalty, repeatedTokens } = logitChanges.now();
    // Written out: spreading two objects costs microseconds for every token.
    return { temperature, topK, topP, bannedTokens: banned, biasTokens, biases, repetitionPenalty, repeatedTokens };
  };
  const withoutEnd = [...bannedTokens, ...endTokens];
  const unchanging = logitChanges.isOff ? paramsFor(bannedTokens) : null;
  return (draw) => {
    const params = draw < minNewTokens ? paramsFor(withoutEnd) : (unchanging ?? paramsFor(bannedTokens));
    return { kind: 'sample', params, noise: { seed, stream, position: firstDraw + draw }, topLogprobs };
  };
}

const NO_TOP: TokenLogprob['top'] = [];

function tokenLogprob(result: Extract<ExtendResult, { kind: 'sample' }>): TokenLogprob {
  if (result.topTokens.length === 0) return { token: result.token, logprob: result.logprob, top: NO_TOP };
  const top = Array.from(result.topTokens, (token, i) => ({ token, logprob: result.topLogprobs[i]! }));
  return { token: result.token, logprob: result.logprob, top };
}

function emitPart(span: Span, part: FinalPart): void {
  if (part.text !== '' || part.tokens.length > 0) span.emit(part);
}
