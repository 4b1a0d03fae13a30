import type { Context, PromptModel } from '../../model/tokenizer/prompt.js';
import { blankContextLength } from '../../model/tokenizer/blank-context.js';
import { contextOf } from './blank-filling.js';
import type { GenerationRequest, ScoreRequest } from './request.js';
import { roomFor, rowLimit } from './row-limit.js';
import { scoredTokens, type ScoredTokens } from './scoring.js';

/** What a request can come to need at worst. */
export interface Requirements {
  /** KV blocks that all its sequences hold at once. */
  readonly blocks: number;
  /** Tokens of its longest sequence: of the longest run, too, as a sequence that lost its cache is extended by all of it in one. */
  readonly longestSequence: number;
}

/**
 * Upper bound for {@link generate}, exact for one blank that runs to its length limit without stopping early. The last token of a row is
 * never extended, so a sequence of context c and up to t new tokens holds c + t - 1.
 *
 * First blank: the whole blocks of the common context count once, everything else once for each sample or beam. Later blanks
 * (`fill-blanks` only): beams share a context again, samples each have their own; rows may be as long as {@link rowLimit} lets them become.
 *
 * @throws InvalidRequestError, PromptTooLongError as `generate` does
 */
export function generationRequirements(
  request: GenerationRequest,
  model: PromptModel,
  blockSize: number,
  context: Context = contextOf(request, model),
): Requirements {
  const limit = rowLimit(request, context, model.config);
  const { contextLength, maxBlanks } = limit;
  const width = request.beams?.numBeams ?? request.n;

  const newTokens = roomFor(contextLength, limit, request.maxNewTokens);
  if (newTokens === 0) return { blocks: 0, longestSequence: 0 };
  const first = contextLength + newTokens - 1;
  const firstBlocks = sharedBlocks(
    contextLength - 1,
    Array.from({ length: width }, () => first),
    blockSize,
  );
  if (maxBlanks === 1) return { blocks: firstBlocks, longestSequence: first };

  const later = limit.maxRowTokens - 1;
  const shortest = Math.max(1, contextLength - (maxBlanks - 1)); // an empty blank takes one token, its mask, out of the row
  const common = request.beams === null ? 0 : shortest - 1;
  const laterBlocks = sharedBlocks(
    common,
    Array.from({ length: width }, () => later),
    blockSize,
  );
  return { blocks: Math.max(firstBlocks, laterBlocks), longestSequence: Math.max(first, later) };
}

/**
 * Exact for {@link score}: the context once, and each choice's own blocks.
 * @throws InvalidRequestError, PromptTooLongError as `score` does
 */
export function scoreRequirements(
  request: ScoreRequest,
  model: PromptModel,
  blockSize: number,
  { context, choices }: ScoredTokens = scoredTokens(request, model),
): Requirements {
  const contextLength = blankContextLength(context.row.length, context);
  const lengths = choices.map((tokens) => contextLength + tokens.length - 1);
  return { blocks: sharedBlocks(contextLength - 1, lengths, blockSize), longestSequence: Math.max(...lengths) };
}

/** Blocks of sequences that begin with the same `common` tokens: only a block that all of them fill alike is shared. */
function sharedBlocks(common: number, lengths: readonly number[], blockSize: number): number {
  const shared = Math.floor(common / blockSize);
  return shared + lengths.reduce((sum, length) => sum + Math.ceil(length / blockSize) - shared, 0);
}
