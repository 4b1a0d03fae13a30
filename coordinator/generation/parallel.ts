import type { ExtendOp, ExtendResult, Strategy } from './strategy.js';

/**
 * Runs strategies side by side: each round yields the Extends of all that still run and hands every one its own results.
 * An error of one ends all.
 *
 * @returns their results in the order given
 */
export function* parallel<R>(strategies: readonly Strategy<R>[]): Strategy<R[]> {
  if (strategies.length === 1) return [yield* strategies[0]!];
  const results: R[] = [];
  let waiting = strategies.map((strategy, i) => ({ i, strategy, state: strategy.next() }));
  while (true) {
    const yielded: { i: number; strategy: Strategy<R>; ops: readonly ExtendOp[] }[] = [];
    for (const { i, strategy, state } of waiting) {
      if (state.done) results[i] = state.value;
      else yielded.push({ i, strategy, ops: state.value });
    }
    if (yielded.length === 0) return results;
    const answers: readonly ExtendResult[] = yield yielded.flatMap(({ ops }) => ops);
    let at = 0;
    waiting = yielded.map(({ i, strategy, ops }) => {
      const own = answers.slice(at, at + ops.length);
      at += ops.length;
      return { i, strategy, state: strategy.next(own) };
    });
  }
}
