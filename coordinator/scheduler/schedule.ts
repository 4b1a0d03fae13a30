/** What {@link schedule} looks at, as plain data. */
export interface SchedulerState<R extends RunningRequest = RunningRequest, W extends WaitingRequest = WaitingRequest> {
  /** Highest priority first, then oldest first. */
  readonly running: readonly R[];
  /** One for each API key with requests that wait; in each the highest priority first, then the oldest. */
  readonly queues: readonly (readonly W[])[];
  readonly keys: ReadonlyMap<string, KeyShare>;
  /** The run that is under way by layers. */
  readonly slice: SliceUnderWay | null;
  /** KV blocks that nobody needs: free, or held by the context cache alone. */
  readonly freeBlocks: number;
  readonly totalBlocks: number;
}

export interface KeyShare {
  /** Of the server, relative to the other keys'. */
  readonly weight: number;
  /** Tokens that were run for it, over its weight: the virtual token counter. */
  readonly counter: number;
}

interface Schedulable {
  /** Grows with arrival. */
  readonly id: number;
  readonly key: string;
  readonly priority: number;
  /** Sequences that it can come to have at once. */
  readonly maxSequences: number;
  readonly pending: readonly PendingExtend[];
}

export interface RunningRequest extends Schedulable {
  /** KV blocks of its sequences. */
  readonly blocks: number;
}

export interface WaitingRequest extends Schedulable {
  /** KV blocks that it takes to begin, or to go on after it was preempted. */
  readonly neededBlocks: number;
  /** It has given up its blocks for this very step. */
  readonly isHeldBack: boolean;
}

export interface PendingExtend {
  /** Tokens that it has to run: new ones, and those whose cache was lost. 0: all is computed already. */
  readonly runTokens: number;
  /** KV blocks that it appends. */
  readonly newBlocks: number;
  /** A block that other sequences hold too and that it writes into, so all but the last of them need a copy; -1: none. */
  readonly sharedBlock: number;
  readonly sharedHolders: number;
  /** Equal for Extends that compute the same context: one of them is enough. Null: none. */
  readonly computesContext: string | null;
}

export interface SliceUnderWay {
  readonly extend: PendingExtend;
  readonly nextLayer: number;
}

export interface StepLimits {
  /**
   * Tokens of one step, a token of a sliced run counted by its share of the layers: bounds what a step takes, and so the time between
   * tokens of running sequences. A longer run is sliced by layers.
   */
  readonly stepTokens: number;
  /** Extends of one step, and sequences of all running requests. */
  readonly maxExtends: number;
  readonly numLayers: number;
}

export interface StepPlan<R extends RunningRequest = RunningRequest, W extends WaitingRequest = WaitingRequest> {
  /** Not null: this request has to give up its blocks; the rest of the plan is empty, plan again. */
  readonly preempt: R | null;
  readonly admit: readonly W[];
  /** Whole Extends, those of the requests admitted here included. */
  readonly run: readonly PendingExtend[];
  /** A run that goes on (or begins) by layers: up to, not including, `endLayer`. */
  readonly slice: { readonly extend: PendingExtend; readonly firstLayer: number; readonly endLayer: number } | null;
  /** What the step adds to the virtual token counters. */
  readonly charges: ReadonlyMap<string, number>;
}

/** What a decoded token counts in the virtual token counter, where one of a prompt counts 1 (the paper's weights). */
const DECODE_CHARGE = 2;

/** The least share of a step that a sliced run gets, however much else there is. */
const LEAST_SLICE = 1 / 4;

/**
 * Chooses the work of the next engine step. Pure: the same state and limits give the same plan.
 *
 * 1. Decoding comes first, all of it: no running sequence stalls behind a prompt.
 * 2. A run that is longer than what is left of the step is sliced by layers, since GLM attends over its context in both directions and a part of
 *    its tokens has no usable KV. One run at a time is under way like that; while others wait it gets half of what decoding leaves.
 * 3. Longer runs and waiting requests get the rest: the highest priority first, then the key with the lowest virtual token counter (Sheng et
 *    al., Fairness in Serving Large Language Models, 2024), then the oldest. A request is admitted when there are blocks to begin and one more for every
 *    running sequence.
 *
 * Where blocks are short, the request that is worth least gives up its own and is computed again later: the lowest priority, then
 * of the key that holds most for its weight, then the newest. Nobody is preempted for a request that is worth less. A waiting request preempts a lower
 * priority, and a key that holds more than its share as long as that one keeps no less than the newcomer's gets.
 */
export function schedule<R extends RunningRequest, W extends WaitingRequest>(
  state: SchedulerState<R, W>,
  limits: StepLimits,
): StepPlan<R, W> {
  return new Planner(state, limits).plan();
}

/** What of one key wants more than a decoding step. */
interface Lane<R, W> {
  readonly key: string;
  /** Longer runs of running requests. */
  readonly long: { readonly request: R; readonly extend: PendingExtend }[];
  longAt: number;
  queue: readonly W[];
  queueAt: number;
  /** Its queue has to wait for blocks; other keys may go on within their shares. */
  isBlocked: boolean;
}

class Planner<R extends RunningRequest, W extends WaitingRequest> {
  private readonly admit: W[] = [];
  private readonly run: PendingExtend[] = [];
  private slice: StepPlan['slice'] = null;
  private tokens = 0;
  private freeBlocks: number;
  private sequences = 0;
  private readonly lanes = new Map<string, Lane<R, W>>();
  /** How many Extends of this step write each shared block. */
  private readonly writers = new Map<number, number>();
  private readonly contexts = new Set<string>();
  private readonly charges = new Map<string, number>();
  private blocksOfKeys: Map<string, number> | null = null;

  constructor(
    private readonly state: SchedulerState<R, W>,
    private readonly limits: StepLimits,
  ) {
    this.freeBlocks = state.freeBlocks;
  }

  plan(): StepPlan<R, W> {
    const victim = this.takeDecodes() ?? this.takeLonger();
    if (victim) return { preempt: victim, admit: [], run: [], slice: null, charges: new Map() };
    return { preempt: null, admit: this.admit, run: this.run, slice: this.slice, charges: this.charges };
  }

  /** @returns a request to preempt first */
  private takeDecodes(): R | null {
    const { running, slice } = this.state;
    for (const request of running) {
      this.sequences += request.maxSequences;
      for (const extend of request.pending) {
        if (extend === slice?.extend) continue;
        if (extend.runTokens > 1) this.lane(request.key).long.push({ request, extend });
        else if (this.run.length < this.limits.maxExtends) {
          const needed = this.neededBlocks(extend);
          if (needed <= this.freeBlocks) this.take(request, extend, needed);
          else {
            const victim = this.worstBut(request);
            if (victim) return victim;
            // It is worth least itself: it waits, the others go on and leave their blocks in the end.
          }
        }
      }
    }
    for (const queue of this.state.queues) if (queue.length > 0) this.lane(queue[0]!.key).queue = queue;
    if (slice) this.continueSlice(slice, this.lanes.size > 0);
    return null;
  }

  /** @returns a request to preempt first */
  private takeLonger(): R | null {
    for (;;) {
      const next = this.nextLane();
      if (!next) return null;
      const { lane, isLong } = next;
      if (isLong) {
        const { request, extend } = lane.long[lane.longAt++]!;
        const needed = this.neededBlocks(extend);
        if (needed > this.freeBlocks) {
          const victim = this.worstBut(request);
          if (victim) return victim;
        } else if (!this.takeOrSlice(request, extend, needed)) return null;
        continue;
      }
      const request = lane.queue[lane.queueAt]!;
      if (!this.hasRoomFor(request)) {
        const victim = this.victimOf(request);
        if (victim) return victim;
        lane.isBlocked = true;
      } else if (this.isAnyBlocked() && !this.isWithinShare(request)) lane.isBlocked = true;
      else if (!this.begin(request)) return null;
      else lane.queueAt += 1;
    }
  }

  /** Nobody overtakes within a key; between keys the counters decide. */
  private nextLane(): { lane: Lane<R, W>; isLong: boolean } | null {
    let best: { lane: Lane<R, W>; isLong: boolean; rank: Rank } | null = null;
    for (const lane of this.lanes.values()) {
      const long = lane.long[lane.longAt]?.request;
      const waiting = lane.isBlocked || lane.queue[lane.queueAt]?.isHeldBack ? undefined : lane.queue[lane.queueAt];
      const isLong = long !== undefined && (waiting === undefined || this.compare(long, waiting) < 0);
      const rank = isLong ? long : waiting;
      if (rank && (!best || this.compare(rank, best.rank) < 0)) best = { lane, isLong, rank };
    }
    return best;
  }

  /** @returns false if the step has no room for any of its Extends */
  private begin(request: W): boolean {
    const isBegun =
      request.pending.reduce((taken, extend, i) => (taken === i && this.takeOrSlice(request, extend, 0) ? taken + 1 : taken), 0) > 0;
    if (!isBegun) return false;
    this.admit.push(request);
    this.sequences += request.maxSequences;
    this.freeBlocks -= request.neededBlocks;
    return true;
  }

  private hasRoomFor(request: W): boolean {
    if (this.state.running.length + this.admit.length === 0) return true; // alone it fits, or it would have been refused
    return this.sequences + request.maxSequences <= this.limits.maxExtends && request.neededBlocks + this.sequences <= this.freeBlocks;
  }

  private neededBlocks(extend: PendingExtend): number {
    if (extend.sharedBlock < 0) return extend.newBlocks;
    const writers = this.writers.get(extend.sharedBlock) ?? 0;
    return extend.newBlocks + (extend.sharedHolders - writers > 1 ? 1 : 0);
  }

  private take(request: Schedulable, extend: PendingExtend, needed: number): void {
    this.run.push(extend);
    this.reserve(request, extend, needed, extend.runTokens);
  }

  private reserve(request: Schedulable, extend: PendingExtend, needed: number, tokens: number): void {
    this.freeBlocks -= needed;
    this.tokens += tokens;
    if (extend.sharedBlock >= 0) this.writers.set(extend.sharedBlock, (this.writers.get(extend.sharedBlock) ?? 0) + 1);
    if (extend.computesContext !== null) this.contexts.add(extend.computesContext);
    const charge = (extend.runTokens === 1 ? DECODE_CHARGE : tokens) / this.weight(request.key);
    this.charges.set(request.key, (this.charges.get(request.key) ?? 0) + charge);
  }

  /** @returns false: the step has no room for it, and for nothing behind it */
  private takeOrSlice(request: Schedulable, extend: PendingExtend, needed: number): boolean {
    if (extend.computesContext !== null && this.contexts.has(extend.computesContext)) return true; // it will find the context computed
    if (this.run.length >= this.limits.maxExtends) return false;
    const room = this.limits.stepTokens - this.tokens;
    if (extend.runTokens <= room) {
      this.take(request, extend, needed);
      return true;
    }
    if (this.slice || room <= 0) return false;
    const endLayer = this.layersFor(extend.runTokens, room);
    this.slice = { extend, firstLayer: 0, endLayer };
    this.reserve(request, extend, needed, (extend.runTokens * endLayer) / this.limits.numLayers);
    return true;
  }

  private continueSlice({ extend, nextLayer }: SliceUnderWay, othersWait: boolean): void {
    const room = Math.max(0, this.limits.stepTokens - this.tokens);
    const budget = Math.max(othersWait ? room / 2 : room, this.limits.stepTokens * LEAST_SLICE);
    const layers = Math.min(this.layersFor(extend.runTokens, budget), this.limits.numLayers - nextLayer);
    this.slice = { extend, firstLayer: nextLayer, endLayer: nextLayer + layers };
    this.tokens += (extend.runTokens * layers) / this.limits.numLayers;
    if (extend.computesContext !== null) this.contexts.add(extend.computesContext);
  }

  private layersFor(runTokens: number, budget: number): number {
    return Math.max(1, Math.min(this.limits.numLayers, Math.floor((this.limits.numLayers * budget) / runTokens)));
  }

  private lane(key: string): Lane<R, W> {
    let lane = this.lanes.get(key);
    if (!lane) this.lanes.set(key, (lane = { key, long: [], longAt: 0, queue: [], queueAt: 0, isBlocked: false }));
    return lane;
  }

  /** Negative: a goes first. */
  private compare(a: Rank, b: Rank): number {
    return b.priority - a.priority || this.counter(a.key) - this.counter(b.key) || a.id - b.id;
  }

  private counter(key: string): number {
    return (this.state.keys.get(key)?.counter ?? 0) + (this.charges.get(key) ?? 0);
  }

  private weight(key: string): number {
    return this.state.keys.get(key)?.weight ?? 1;
  }

  /** Blocks that a key's running requests hold. */
  private held(key: string): number {
    if (!this.blocksOfKeys) {
      this.blocksOfKeys = new Map();
      for (const request of this.state.running) {
        this.blocksOfKeys.set(request.key, (this.blocksOfKeys.get(request.key) ?? 0) + request.blocks);
      }
    }
    return this.blocksOfKeys.get(key) ?? 0;
  }

  /** The running request that is worth least, if that is another one than `request`. */
  private worstBut(request: R): R | null {
    const worst = this.state.running.reduce((a, b) => (this.isWorse(b, a) ? b : a));
    return worst === request ? null : worst;
  }

  private isWorse(a: R, b: R): boolean {
    if (a.priority !== b.priority) return a.priority < b.priority;
    if (a.key !== b.key) {
      const [heldA, heldB] = [this.held(a.key) / this.weight(a.key), this.held(b.key) / this.weight(b.key)];
      if (heldA !== heldB) return heldA > heldB;
    }
    return a.id > b.id;
  }

  /** Who has to make room for a waiting request. */
  private victimOf(request: W): R | null {
    const holders = this.state.running.filter(({ blocks }) => blocks > 0);
    if (holders.length === 0) return null;
    const worst = holders.reduce((a, b) => (this.isWorse(b, a) ? b : a));
    if (worst.priority !== request.priority) return worst.priority < request.priority ? worst : null;
    if (worst.key === request.key) return null;
    const left = (this.held(worst.key) - worst.blocks) / this.weight(worst.key);
    const gained = (this.held(request.key) + request.neededBlocks) / this.weight(request.key);
    return left >= gained ? worst : null;
  }

  private isAnyBlocked(): boolean {
    for (const { isBlocked } of this.lanes.values()) if (isBlocked) return true;
    return false;
  }

  /** Whether its key then holds no more than its share of all blocks. */
  private isWithinShare(request: W): boolean {
    const active = new Set([...this.state.running, ...this.state.queues.flatMap((queue) => queue.slice(0, 1))].map(({ key }) => key));
    const total = [...active].reduce((sum, key) => sum + this.weight(key), 0);
    return this.held(request.key) + request.neededBlocks <= (this.state.totalBlocks * this.weight(request.key)) / total;
  }
}

type Rank = Pick<Schedulable, 'id' | 'key' | 'priority'>;
