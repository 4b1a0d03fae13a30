import type { BlankContext } from '../../model/tokenizer/blank-context.js';
import type { ExtendOp, Sequence, Sequences, Strategy, Want } from './strategy.js';

/** The Extend of a context, of which the sequence already holds the first `cached` tokens: none, or all but the last. */
export function prefill(sequence: Sequence, context: BlankContext, want: Want, cached = 0): ExtendOp {
  return {
    sequence,
    tokens: context.tokens.slice(cached),
    positions: context.positions.slice(cached),
    bidirectionalTokens: cached === 0 ? context.bidirectionalTokens : 0, // the last token sees everything anyway
    want,
  };
}

/**
 * Prefills the context once, all but its last token, for `count` sequences that go on differently. A context is shared as a whole or not
 * at all: each of its tokens sees all the others.
 */
export function* sharedPrefill(sequences: Sequences, context: BlankContext, count: number): Strategy<Sequence[]> {
  const shared = sequences.create();
  const cached = context.tokens.length - 1;
  const bidirectionalTokens = Math.min(context.bidirectionalTokens, cached);
  yield [
    {
      sequence: shared,
      tokens: context.tokens.slice(0, cached),
      positions: context.positions.slice(0, cached),
      bidirectionalTokens,
      want: { kind: 'none' },
    },
  ];
  const forks = Array.from({ length: count }, () => sequences.fork(shared));
  sequences.release(shared);
  return forks;
}
