import { PendingRun, without } from './active-request.js';
import { NOTHING_NEXT } from './generation/strategy.js';
import type { PlannedRun } from './planned-step.js';
import type { BlockManager } from './scheduler/block-manager.js';
import type { ContextCache } from './scheduler/context-cache.js';
import { foresee, forgetForeseen } from './scheduler/sequence.js';

/** The tokens of a run whose token the step before samples. */
const NOT_KNOWN_YET = [0];

/** What will follow the runs of a step that is under way, by what strategies say: so that the next step can be planned before its results are there. */
export class Foresight {
  constructor(
    private readonly blocks: BlockManager,
    private readonly contexts: ContextCache,
  ) {}

  /**
   * Gives requests the runs that follow, for the scheduler to choose from.
   * @returns false where a strategy that the results will resume has not said what comes then: nothing was done
   */
  foresee(runs: readonly PlannedRun[]): boolean {
    for (const { pending } of runs) if (pending.op.next === undefined && isResumedBy(pending)) return false;
    for (let i = 0; i < runs.length; i++) this.foreseeAfter(runs[i]!, i);
    return true;
  }

  /** What was foreseen, and was not chosen. */
  forgetUnplanned(runs: readonly PlannedRun[]): void {
    for (const run of runs) {
      if (run.foreseen?.pending.isUnderWay !== false) continue;
      const { pending, before } = run.foreseen;
      forgetForeseen(run.sequence, before);
      pending.request.pending = without(pending.request.pending, pending);
      run.foreseen = null;
    }
  }

  /** The step will have no results, nor will the one that takes its samples. */
  forgetLost(runs: readonly PlannedRun[]): void {
    for (const { pending, sequence, foreseen } of runs) if (foreseen && pending.isWanted) forgetForeseen(sequence, foreseen.before);
  }

  private foreseeAfter(run: PlannedRun, sampledBy: number): void {
    const { pending, sequence } = run;
    const { request, op } = pending;
    if (op.next === undefined || op.next === NOTHING_NEXT || !isResumedBy(pending)) return;
    const { position, want } = op.next;
    const before = foresee(sequence, position);
    const next = { sequence, tokens: NOT_KNOWN_YET, positions: [position], bidirectionalTokens: 0, want };
    const following = new PendingRun(request, -1, next, sequence, this.blocks, this.contexts);
    following.isAwaited = false;
    following.sampledBy = sampledBy;
    run.foreseen = { pending: following, before };
    request.pending = request.pending.length === 0 ? [following] : [...request.pending, following];
  }
}

/** Whether the run's strategy goes on when the step under way has ended: all that it waits for is in it. */
function isResumedBy({ isWanted, request }: PendingRun): boolean {
  return isWanted && request.unanswered.every(({ isUnderWay }) => isUnderWay);
}
