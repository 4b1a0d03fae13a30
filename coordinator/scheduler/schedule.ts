/** What {@link schedule} looks at. Everything is in order of age: ids grow, and an Extend is as old as the result that it follows from. */
export interface SchedulerState {
  /** Extends that admitted requests wait for. */
  readonly pending: readonly PendingExtend[];
  readonly waiting: readonly WaitingRequest[];
  /** KV blocks that no admitted request has reserved. */
  readonly unreservedBlocks: number;
}

export interface PendingExtend {
  readonly id: number;
  /** Tokens that it has to run: new ones, and those whose cache was lost. */
  readonly runTokens: number;
}

export interface WaitingRequest {
  readonly id: number;
  /** KV blocks that it can come to hold at once. */
  readonly reserveBlocks: number;
  /** Its first Extends. */
  readonly pending: readonly PendingExtend[];
}

export interface StepLimits {
  /** At least the longest possible run plus `maxExtends`, or that run would wait for ever behind decoding sequences. */
  readonly maxBatchTokens: number;
  readonly maxExtends: number;
}

export interface StepPlan {
  /** Requests to admit. */
  readonly admit: readonly number[];
  /** Extends of the next step, those of the requests admitted here included. */
  readonly run: readonly number[];
}

/**
 * Chooses the work of the next engine step. Pure: the same state and limits give the same plan.
 *
 * Decoding comes first, so that no running sequence stalls behind a long prompt. Longer runs and waiting requests get what is
 * left of `maxBatchTokens` in order of age, and nobody overtakes: whoever does not fit is the oldest in one of the next steps. A
 * request is admitted when all the KV blocks that it can come to need are free, so that nothing fails for lack of blocks
 * half-way. A run is taken whole or not at all: GLM attends over its context in both directions, so a part of a prompt has
 * no usable KV.
 */
export function schedule(state: SchedulerState, limits: StepLimits): StepPlan {
  const run: number[] = [];
  let tokens = 0;
  const take = (extend: PendingExtend): boolean => {
    if (run.length === limits.maxExtends || tokens + extend.runTokens > limits.maxBatchTokens) return false;
    run.push(extend.id);
    tokens += extend.runTokens;
    return true;
  };
  for (const extend of state.pending) if (extend.runTokens === 1) take(extend);

  const admit: number[] = [];
  let unreserved = state.unreservedBlocks;
  let mayAdmit = true;
  for (const next of byAge(state)) {
    if ('runTokens' in next) {
      if (!take(next)) break;
    } else if (mayAdmit && next.reserveBlocks <= unreserved) {
      admit.push(next.id);
      unreserved -= next.reserveBlocks;
      if (!next.pending.every(take)) break;
    } else mayAdmit = false;
  }
  return { admit, run };
}

function byAge({ pending, waiting }: SchedulerState): (PendingExtend | WaitingRequest)[] {
  const ageOf = (item: PendingExtend | WaitingRequest): number => ('runTokens' in item ? item.id : item.pending[0]!.id);
  return [...pending.filter(({ runTokens }) => runTokens > 1), ...waiting].sort((a, b) => ageOf(a) - ageOf(b));
}
