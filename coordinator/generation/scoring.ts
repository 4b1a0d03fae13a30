import { InvalidRequestError, PromptTooLongError } from '../../common/errors.js';
import { buildContext, type Context, encodePlain, type PromptModel } from '../../model/tokenizer/prompt.js';
import { type BlankContext, blankContext, blankContextLength } from '../../model/tokenizer/blank-context.js';
import { sharedPrefill } from './prefill.js';
import type { ScoreRequest, ScoreResult } from './request.js';
import type { ExtendOp, Sequence, Sequences, Strategy } from './strategy.js';

/**
 * Log-probabilities of the choices as fillings of the prompt's (first) blank (model-spec section 9.2). The context is prefilled once; each
 * choice c1..ck extends a fork of it by `<sop>` c1..c(k-1) (unidirectional: by the context's last token and those), whose rows predict
 * c1..ck. So choices see the context and themselves, not each other.
 *
 * @throws InvalidRequestError, PromptTooLongError at once, before anything is yielded
 */
export function* score(
  request: ScoreRequest,
  model: PromptModel,
  sequences: Sequences,
  { context, choices }: ScoredTokens = scoredTokens(request, model),
): Strategy<ScoreResult> {
  const maskPosition = context.bidirectional ? context.row.indexOf(context.maskToken) : context.row.length;
  const blank = scoringPositions(
    blankContext(context.row, maskPosition, context, model.config.specialTokens.sop),
    context,
    maskPosition,
    request,
  );

  const forks = yield* sharedPrefill(sequences, blank, choices.length);
  const results = yield choices.map((tokens, i) => scoreChoice(forks[i]!, blank, tokens));
  for (const fork of forks) sequences.release(fork);
  return {
    contextTokens: blank.tokens.length - 1,
    choices: choices.map((tokens, i) => {
      const result = results[i];
      if (result?.kind !== 'targets') throw new Error(`an Extend that wanted targets gave ${result?.kind ?? 'nothing'}`);
      const tokenLogprobs = Array.from(result.logprobs);
      return { tokens, tokenLogprobs, logprob: tokenLogprobs.reduce((sum, logprob) => sum + logprob, 0) };
    }),
  };
}

export interface ScoredTokens {
  readonly context: Context;
  readonly choices: readonly (readonly number[])[];
}

/**
 * The context and the choices of a request as tokens.
 * @throws InvalidRequestError, PromptTooLongError
 */
export function scoredTokens(request: ScoreRequest, model: PromptModel): ScoredTokens {
  if (request.choices.length === 0) throw new InvalidRequestError('there are no choices: give at least one', 'choices');
  const context = buildContext(request.prompt, request.mode, model);
  const contextLength = blankContextLength(context.row.length, context);
  const choices = request.choices.map((choice, i) => {
    const tokens = encodePlain(choice, `choice ${i}`, model);
    if (tokens.length === 0) throw new InvalidRequestError(`choice ${i} has no tokens: give at least one`, `choices[${i}]`);
    const length = contextLength + tokens.length - 1; // the last token is only predicted
    if (length > model.config.maxSequenceLength) {
      throw new PromptTooLongError(
        `the prompt has ${contextLength} tokens with its mask and <sop>, and choice ${i} has ${tokens.length}: ` +
          `together the model takes ${model.config.maxSequenceLength + 1}; shorten the prompt`,
      );
    }
    return tokens;
  });
  return { context, choices };
}

/** `use_multitask_encoding`: without a mask in the prompt, `<sop>` is at the mask and the choice counts on from there. */
function scoringPositions(blank: BlankContext, context: Context, maskPosition: number, request: ScoreRequest): BlankContext {
  const isMultitask = request.multitaskEncoding === true && context.positions === 'mask' && context.isMaskAppended;
  return isMultitask ? { ...blank, positionOf: (i) => maskPosition + 1 + i } : blank;
}

function scoreChoice(sequence: Sequence, context: BlankContext, choice: readonly number[]): ExtendOp {
  const inputs = choice.slice(0, -1);
  return {
    sequence,
    tokens: [context.tokens.at(-1)!, ...inputs],
    positions: [context.positions.at(-1)!, ...inputs.map((_, i) => context.positionOf(i))],
    bidirectionalTokens: 0,
    want: { kind: 'targets', tokens: choice },
  };
}
