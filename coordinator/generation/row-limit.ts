import { PromptTooLongError } from '../../common/errors.js';
import type { ModelConfig } from '../../model/model-config.js';
import type { Context } from '../../model/tokenizer/prompt.js';
import { blankContextLength } from '../../model/tokenizer/blank-context.js';
import type { GenerationRequest } from './request.js';

/** Most blanks of one request: a blank may generate mask tokens, each of which becomes a new blank (model-spec section 6, rule 5). */
export const MAX_BLANKS = 64;

export interface RowLimit {
  /** Tokens of the first blank's context, `<sop>` included. */
  readonly contextLength: number;
  /** Most tokens of a row: context, `<sop>` and generated tokens. */
  readonly maxRowTokens: number;
  /** Most blanks filled, those of generated masks included. */
  readonly maxBlanks: number;
}

/**
 * What a request's rows may come to. The limit is the smallest of
 * - `maxRowTokens` (`out_seq_length`, which counts context and `<sop>`: sections 4 and 6);
 * - the model's longest sequence;
 * - what the prompt's own blanks can make of the row with `maxNewTokens` each: blanks of generated masks share what those left.
 *   So a request's needs are known before it starts.
 *
 * @throws PromptTooLongError no room for one new token
 */
export function rowLimit(request: GenerationRequest, context: Context, config: Pick<ModelConfig, 'maxSequenceLength'>): RowLimit {
  const contextLength = blankContextLength(context.row.length, context);
  const { maxSequenceLength } = config;
  const allowed = Math.min(request.maxRowTokens ?? maxSequenceLength, maxSequenceLength);
  if (contextLength >= allowed) {
    const isOwn = request.maxRowTokens !== null && request.maxRowTokens < maxSequenceLength;
    const whose = isOwn ? 'max_row_tokens allows' : 'the model takes';
    const advice = isOwn ? `shorten the prompt or raise max_row_tokens (up to ${maxSequenceLength})` : 'shorten the prompt';
    throw new PromptTooLongError(
      `the prompt has ${contextLength} tokens with its masks and <sop>, which leaves no room for a new one: ${whose} ${allowed} tokens; ${advice}`,
    );
  }
  const blanks = request.mode === 'fill-blanks' ? context.row.filter((token) => token === context.maskToken).length : 1;
  const reachable = request.maxNewTokens === null ? Infinity : contextLength + blanks * Math.max(0, request.maxNewTokens - 1) + 1;
  const canRegenerate = request.mode === 'fill-blanks' && !request.bannedTokens.includes(context.maskToken);
  return { contextLength, maxRowTokens: Math.min(allowed, reachable), maxBlanks: canRegenerate ? Math.max(blanks, MAX_BLANKS) : blanks };
}

/** Room for the next blank: its new tokens at most, 0 or more. */
export function roomFor(contextLength: number, limit: RowLimit, maxNewTokens: number | null): number {
  return Math.max(0, Math.min(maxNewTokens ?? Infinity, limit.maxRowTokens - contextLength));
}
