import { createHash } from 'node:crypto';
import type { ExtendOp, Want } from './generation/strategy.js';

/** A shorter context is computed again as fast as it is found. */
const LEAST_TOKENS = 16;

/**
 * Key of the context that a sequence's first Extend computes: its tokens and positions up to where they see each other (the kind of mask is one
 * of the tokens), or, in a causal run, all but the last one. Contexts are shared within one API key only, so that nobody learns from a
 * response time what others have asked.
 *
 * @param contextTokens of the run @returns null if the run has to be computed as a whole
 */
export function contextKeyOf(apiKey: string, op: ExtendOp, contextTokens: number): string | null {
  if (contextTokens < LEAST_TOKENS || op.tokens.length - contextTokens < wantedRows(op.want)) return null;
  const words = Uint32Array.from({ length: 2 * contextTokens }, (_, i) =>
    i < contextTokens ? op.tokens[i]! : op.positions[i - contextTokens]!,
  );
  const hash = createHash('sha256')
    .update(words)
    .update(op.bidirectionalTokens > 0 ? 'context' : 'causal');
  return `${apiKey}\n${hash.digest('base64')}`;
}

/** How many of a run's last rows are looked at. */
function wantedRows(want: Want): number {
  switch (want.kind) {
    case 'none':
      return 0;
    case 'targets':
      return want.tokens.length;
    case 'logits':
      return want.rows;
    default:
      return 1;
  }
}
