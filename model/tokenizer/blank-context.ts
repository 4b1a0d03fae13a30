import type { Context } from './prompt.js';

/**
 * The tokens the model sees before it generates, `<sop>` included (model-spec sections 3.1 and 3.2). The logits of the last one predict
 * the first generated token.
 */
export interface BlankContext {
  readonly tokens: readonly number[];
  readonly positions: readonly number[];
  /** All but `<sop>` see each other; 0 in unidirectional mode. */
  readonly bidirectionalTokens: number;
  /** Position id of the i-th generated token. */
  positionOf(i: number): number;
}

/**
 * - bidirectional: `row <sop>`; positions count from 0, but `<sop>` and the generated tokens are all at the mask (`mask`) or go on counting (`running`);
 * - unidirectional: `[gMASK] <sop> row`, positions count on.
 *
 * @param row the current row of the context's prompt; @param maskPosition of the blank in it
 */
export function blankContext(row: readonly number[], maskPosition: number, context: Context, sop: number): BlankContext {
  const tokens = context.bidirectional ? [...row, sop] : [context.maskToken, sop, ...row];
  const length = tokens.length;
  const isAtMask = context.positions === 'mask';
  return {
    tokens,
    positions: tokens.map((_, i) => (isAtMask && i === length - 1 ? maskPosition : i)),
    bidirectionalTokens: context.bidirectional ? row.length : 0,
    positionOf: (i) => (isAtMask ? maskPosition : length + i),
  };
}

/** Length of {@link blankContext}'s tokens for a row. */
export function blankContextLength(rowLength: number, context: Context): number {
  return rowLength + (context.bidirectional ? 1 : 2);
}
