import { stepMs, type StepCost, tokensWithin } from './step-cost.js';

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
  /** Null as long as it is not known. */
  readonly stepCost: StepCost | null;
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
  /** Of which no other request holds: what it gives when it is preempted. */
  readonly ownBlocks: number;
  /** Number of the last step that it had a part in. */
  readonly lastStep: number;
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
  /** As they were when it began: what the extend has to run may have become less. */
  readonly runTokens: number;
  readonly nextLayer: number;
}

export interface StepLimits {
  /**
   * Tokens of one step, a token of a sliced run counted by its share of the layers: bounds what a step takes, and so the time between
   * tokens of running sequences. A longer run is sliced by layers.
   */
  readonly stepTokens: number;
  /** Tokens of all runs of a step, those of a sliced one in full: what the engine has room for. The longest run and `maxExtends` tokens fit. */
  readonly maxBatchTokens: number;
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
  readonly slice: {
    readonly extend: PendingExtend;
    readonly runTokens: number;
    readonly firstLayer: number;
    readonly endLayer: number;
  } | null;
  /** What the step adds to the virtual token counters. */
  readonly charges: ReadonlyMap<string, number>;
}

/** What a decoded token counts in the virtual token counter, where one of a prompt counts 1 (the paper's weights). */
const DECODE_CHARGE = 2;

/** The least share of a step that a sliced run gets, however much else there is. */
const LEAST_SLICE = 1 / 4;

/** While a request waits for blocks other keys go on within their shares, until their counters are so many full steps ahead of its key's. */
const PATIENCE_STEPS = 64;

/** What of a step that is shared by keys is left for runs longer than one token. */
const LEAST_LONG = 1 / 4;

/** One step looks at no more keys that have to wait for blocks: with thousands of keys it would take longer than the step. */
const MOST_BLOCKED = 16;

/**
 * Chooses the work of the next engine step. Pure: the same state and limits give the same plan.
 *
 * 1. Decoding comes first: no running sequence stalls behind a prompt. All of it runs, unless that takes several keys' tokens longer than their shares allow:
 *    key k of weights w(k) may expect steps of at most sum(w) / w(k) times what its own runs take. Then the keys with the fewest go first, and the
 *    sequences of the others take turns.
 * 2. A run that is longer than what is left of the step is sliced by layers, since GLM attends over its context in both directions and a part of
 *    its tokens has no usable KV. One run at a time is under way like that; while others wait it gets half of what decoding leaves.
 * 3. Longer runs and waiting requests get the rest: the highest priority first, then the key with the lowest virtual token counter (Sheng et
 *    al., Fairness in Serving Large Language Models, 2024), then the oldest. A request is admitted when there are blocks to begin and one more for every
 *    running sequence.
 *
 * Where blocks are short, the request that is worth least gives up its own and is computed again later: the lowest priority, then
 * of the key that holds most for its weight (of the blocks or of the sequences), then the newest. Nobody is preempted for a request that is worth
 * less. A waiting request preempts a lower priority; and of a key that holds more than its share what is beyond it, or, while its own key has less
 * than half of its share, as long as the other one keeps no less than the newcomer's gets. Nobody is preempted for a newcomer that then still has
 * no room.
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
  /** Its share of the step is used up. */
  isDone: boolean;
}

interface Decode<R> {
  readonly request: R;
  readonly extend: PendingExtend;
}

/** What a key has of the server. */
interface Holding {
  readonly blocks: number;
  readonly sequences: number;
}

const NOTHING: Holding = { blocks: 0, sequences: 0 };

class Planner<R extends RunningRequest, W extends WaitingRequest> {
  private readonly admit: W[] = [];
  private readonly run: PendingExtend[] = [];
  private slice: StepPlan['slice'] = null;
  private sliceRequest: Schedulable | null = null;
  private tokens = 0;
  /** Bound of `tokens` in this step. */
  private stepTokens: number;
  /** Like `tokens`, but with the tokens of a sliced run in full. */
  private rows = 0;
  private freeBlocks: number;
  private sequences = 0;
  private readonly lanes = new Map<string, Lane<R, W>>();
  /** How many Extends of this step write each shared block. */
  private readonly writers = new Map<number, number>();
  private readonly contexts = new Set<string>();
  private readonly charges = new Map<string, number>();
  /** Tokens that each key may have in this step, where several share it; and has. */
  private shares: Map<string, number> | null = null;
  private readonly used = new Map<string, number>();
  /** Of these, how many decoded ones. */
  private decodeShares: Map<string, number> | null = null;
  private holdings: Map<string, Holding> | null = null;
  /** Of running requests; counting them takes a while. Filled with the holdings. */
  private readonly blocksOf = new Map<R, number>();
  private blockedLanes = 0;
  /** Of the first key whose queue has to wait for blocks. */
  private blockedCounter = 0;
  private totalWeight = 0;

  constructor(
    private readonly state: SchedulerState<R, W>,
    private readonly limits: StepLimits,
  ) {
    this.freeBlocks = state.freeBlocks;
    this.stepTokens = limits.stepTokens;
  }

  plan(): StepPlan<R, W> {
    const victim = this.takeDecodes() ?? this.takeLonger();
    if (victim) return { preempt: victim, admit: [], run: [], slice: null, charges: new Map() };
    this.sliceWithWhatIsLeft();
    return { preempt: null, admit: this.admit, run: this.run, slice: this.slice, charges: this.charges };
  }

  /** @returns a request to preempt first */
  private takeDecodes(): R | null {
    const { running, slice, queues } = this.state;
    const decodes: Decode<R>[] = [];
    for (const request of running) {
      this.sequences += request.maxSequences;
      for (const extend of request.pending) {
        if (extend === slice?.extend) this.sliceRequest = request;
        else if (extend.runTokens > 1) this.lane(request.key).long.push({ request, extend });
        else decodes.push({ request, extend });
      }
    }
    for (const queue of queues) if (queue.length > 0) this.lane(queue[0]!.key).queue = queue;
    const mostDecodes = this.limits.maxExtends - (slice ? 1 : 0);
    for (const { request, extend } of this.shareOut(decodes)) {
      if (this.run.length >= mostDecodes) break;
      if (this.decodeShares && (this.used.get(request.key) ?? 0) >= this.decodeShares.get(request.key)!) continue;
      const needed = this.neededBlocks(extend);
      if (needed <= this.freeBlocks) this.take(request, extend, needed);
      else {
        const victim = this.worstBut(request);
        if (victim) return victim;
        // It is worth least itself: it waits, the others go on and leave their blocks in the end.
      }
    }
    if (slice) this.continueSlice(slice, this.lanes.size > 0);
    return null;
  }

  /** Of the longer runs that a key alone would have in this step. */
  private longTokens(key: string): number {
    const lane = this.lanes.get(key);
    let tokens = this.sliceRequest?.key === key ? this.state.slice!.runTokens : 0;
    for (const { extend } of lane?.long ?? []) {
      if (tokens >= this.limits.stepTokens) break;
      tokens += extend.runTokens;
    }
    if (tokens === 0) tokens = lane?.queue[0]?.pending[0]?.runTokens ?? 0;
    return Math.min(tokens, this.limits.stepTokens);
  }

  /** In the order in which they get their turn; bounds the step, and what each key has of it, where several keys share it. */
  private shareOut(decodes: readonly Decode<R>[]): readonly Decode<R>[] {
    const { running, stepCost } = this.state;
    const first = running[0]?.key ?? [...this.lanes.keys()][0];
    const isShared = running.some(({ key }) => key !== first) || [...this.lanes.keys()].some((key) => key !== first);
    if (!isShared || !stepCost) return decodes;

    const byKey = new Map<string, Decode<R>[]>([...this.lanes.keys()].map((key) => [key, []]));
    for (const decode of decodes) {
      const own = byKey.get(decode.request.key);
      if (own) own.push(decode);
      else byKey.set(decode.request.key, [decode]);
    }
    let weights = 0;
    for (const key of byKey.keys()) weights += this.weight(key);
    let mostMs = Infinity;
    for (const [key, own] of byKey) {
      mostMs = Math.min(mostMs, (weights / this.weight(key)) * stepMs(stepCost, Math.max(1, own.length + this.longTokens(key))));
    }
    const fair = Math.max(byKey.size, Math.floor(tokensWithin(stepCost, mostMs)));
    if (fair >= this.stepTokens) return decodes;
    this.stepTokens = fair;

    this.shares = new Map();
    this.decodeShares = new Map();
    const inTurn: Decode<R>[] = [];
    const wanted = new Map([...byKey].map(([key, own]) => [key, own.length + this.longTokens(key)]));
    const modestFirst = [...byKey].sort(([a], [b]) => wanted.get(a)! / this.weight(a) - wanted.get(b)! / this.weight(b));
    let room = fair;
    for (const [key, own] of modestFirst) {
      const share = Math.min(wanted.get(key)!, Math.max(1, (room * this.weight(key)) / weights));
      this.shares.set(key, share);
      room -= share;
      weights -= this.weight(key);

      const isLongLeft = wanted.get(key)! > own.length;
      const count = Math.max(1, Math.floor(share * (isLongLeft ? 1 - LEAST_LONG : 1)));
      this.decodeShares.set(key, count);
      if (own.length > count) own.sort((a, b) => a.request.lastStep - b.request.lastStep); // they take turns
      for (const decode of own) inTurn.push(decode);
    }
    return inTurn;
  }

  /** What is left in this step for a key. */
  private roomFor(key: string): number {
    const room = this.stepTokens - this.tokens;
    return this.shares ? Math.min(room, (this.shares.get(key) ?? 0) - (this.used.get(key) ?? 0)) : room;
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
        } else if (!this.takeOrSlice(request, extend, needed) && this.isFull(lane)) return null;
        continue;
      }
      const request = lane.queue[lane.queueAt]!;
      if (this.blockedLanes > 0 && (this.isOverdue(request) || !this.isWithinShare(request))) this.block(lane);
      else if (!this.hasRoomFor(request)) {
        const victim = this.victimOf(request);
        if (victim) return victim;
        this.block(lane);
      } else if (this.begin(request)) lane.queueAt += 1;
      else if (this.isFull(lane)) return null;
      if (this.blockedLanes === MOST_BLOCKED) return null;
    }
  }

  /** Whether the step is, and not only this key's share of it. */
  private isFull(lane: Lane<R, W>): boolean {
    lane.isDone = true;
    return this.shares === null;
  }

  private block(lane: Lane<R, W>): void {
    if (this.blockedLanes === 0) this.blockedCounter = this.counter(lane.key);
    this.blockedLanes += 1;
    lane.isBlocked = true;
  }

  /** Others have gone on long enough while somebody waited for blocks. */
  private isOverdue({ key }: W): boolean {
    return this.counter(key) - this.blockedCounter > PATIENCE_STEPS * this.limits.stepTokens;
  }

  /** Nobody overtakes within a key; between keys the counters decide. */
  private nextLane(): { lane: Lane<R, W>; isLong: boolean } | null {
    let best: { lane: Lane<R, W>; isLong: boolean; rank: Rank } | null = null;
    for (const lane of this.lanes.values()) {
      if (lane.isDone) continue;
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
    if (this.holdings) add(this.holdings, request.key, request.neededBlocks, request.maxSequences);
    return true;
  }

  private hasRoomFor(request: W): boolean {
    if (this.state.running.length + this.admit.length === 0) return true; // alone it fits, or it would have been refused
    return this.fits(request, this.freeBlocks, this.sequences);
  }

  private fits({ maxSequences, neededBlocks }: W, freeBlocks: number, sequences: number): boolean {
    return sequences + maxSequences <= this.limits.maxExtends && neededBlocks + sequences <= freeBlocks;
  }

  private neededBlocks(extend: PendingExtend): number {
    if (extend.sharedBlock < 0) return extend.newBlocks;
    const writers = this.writers.get(extend.sharedBlock) ?? 0;
    return extend.newBlocks + (extend.sharedHolders - writers > 1 ? 1 : 0);
  }

  private take(request: Schedulable, extend: PendingExtend, needed: number): void {
    this.run.push(extend);
    const { runTokens } = extend;
    this.reserve(extend, needed, runTokens);
    this.count(request, runTokens, runTokens === 1 ? DECODE_CHARGE : runTokens);
  }

  private reserve(extend: PendingExtend, needed: number, runTokens: number): void {
    this.freeBlocks -= needed;
    this.rows += runTokens;
    if (extend.sharedBlock >= 0) this.writers.set(extend.sharedBlock, (this.writers.get(extend.sharedBlock) ?? 0) + 1);
    if (extend.computesContext !== null) this.contexts.add(extend.computesContext);
  }

  private count({ key }: Schedulable, tokens: number, charge: number): void {
    this.tokens += tokens;
    this.used.set(key, (this.used.get(key) ?? 0) + tokens);
    this.charges.set(key, (this.charges.get(key) ?? 0) + charge / this.weight(key));
  }

  /** @returns false: the step has no room for it, and for nothing behind it */
  private takeOrSlice(request: Schedulable, extend: PendingExtend, needed: number): boolean {
    if (extend.computesContext !== null && this.contexts.has(extend.computesContext)) return true; // it will find the context computed
    if (this.run.length + (this.slice ? 1 : 0) >= this.limits.maxExtends) return false;
    const { runTokens } = extend;
    const room = Math.min(this.roomFor(request.key), this.limits.maxBatchTokens - this.rows);
    if (runTokens <= room) {
      this.take(request, extend, needed);
      return true;
    }
    if (this.slice || this.rows + runTokens > this.limits.maxBatchTokens) return false;
    this.reserve(extend, needed, runTokens);
    this.sliceRequest = request;
    this.sliceUp({ extend, runTokens, nextLayer: 0 }, this.shares ? Math.max(0, room) : Math.max(room, this.leastSlice));
    return true;
  }

  private continueSlice(slice: SliceUnderWay, othersWait: boolean): void {
    const room = Math.max(0, this.roomFor(this.sliceRequest!.key));
    this.rows += slice.runTokens;
    if (slice.extend.computesContext !== null) this.contexts.add(slice.extend.computesContext);
    this.sliceUp(slice, this.shares ? room : Math.max(othersWait ? room / 2 : room, this.leastSlice));
  }

  /** Nobody else could use it. */
  private sliceWithWhatIsLeft(): void {
    const { slice } = this;
    const { numLayers } = this.limits;
    const room = this.stepTokens - this.tokens;
    if (!slice || slice.endLayer === numLayers || Math.floor((numLayers * room) / slice.runTokens) < 1) return;
    this.sliceUp({ ...slice, nextLayer: slice.endLayer }, room);
    this.slice = { ...this.slice!, firstLayer: slice.firstLayer };
  }

  private sliceUp({ extend, runTokens, nextLayer }: SliceUnderWay, budget: number): void {
    const { numLayers } = this.limits;
    const layers = Math.min(this.layersFor(runTokens, budget), numLayers - nextLayer);
    this.slice = { extend, runTokens, firstLayer: nextLayer, endLayer: nextLayer + layers };
    const tokens = (runTokens * layers) / numLayers;
    this.count(this.sliceRequest!, tokens, tokens);
  }

  private get leastSlice(): number {
    return this.stepTokens * LEAST_SLICE;
  }

  private layersFor(runTokens: number, budget: number): number {
    return Math.max(1, Math.min(this.limits.numLayers, Math.floor((this.limits.numLayers * budget) / runTokens)));
  }

  private lane(key: string): Lane<R, W> {
    let lane = this.lanes.get(key);
    if (!lane) this.lanes.set(key, (lane = { key, long: [], longAt: 0, queue: [], queueAt: 0, isBlocked: false, isDone: false }));
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

  /** The running request that is worth least and has blocks to give, if that is another one than `request`. */
  private worstBut(request: R): R | null {
    const worst = this.worstOf(this.state.running, this.heldByKeys());
    return worst && worst !== request && this.isWorse(worst, request, this.heldByKeys()) ? worst : null;
  }

  /** Of those that have blocks to give. */
  private worstOf(requests: Iterable<R>, holdings: ReadonlyMap<string, Holding>): R | null {
    let worst: R | null = null;
    for (const each of requests) {
      if (this.blocksOf.get(each)! > 0 && (!worst || this.isWorse(each, worst, holdings))) worst = each;
    }
    return worst;
  }

  private isWorse(a: R, b: R, holdings: ReadonlyMap<string, Holding>): boolean {
    if (a.priority !== b.priority) return a.priority < b.priority;
    if (a.key !== b.key) {
      const [shareA, shareB] = [this.share(a.key, holdings), this.share(b.key, holdings)];
      if (shareA !== shareB) return shareA > shareB;
    }
    return a.id > b.id;
  }

  /** Who has to make room for a waiting request: nobody if all that may be preempted for it do not make enough. */
  private victimOf(request: W): R | null {
    const first = this.worstOf(this.state.running, this.heldByKeys());
    if (!first || !this.mayPreempt(first, request, this.heldByKeys())) return null;
    const left = new Set(this.state.running);
    const holdings = new Map(this.heldByKeys());
    let { freeBlocks, sequences } = this;
    for (let worst = first; ;) {
      left.delete(worst);
      freeBlocks += worst.ownBlocks;
      sequences -= worst.maxSequences;
      if (left.size + this.admit.length === 0 || this.fits(request, freeBlocks, sequences)) return first;
      add(holdings, worst.key, -this.blocksOf.get(worst)!, -worst.maxSequences);
      const next = this.worstOf(left, holdings);
      if (!next || !this.mayPreempt(next, request, holdings)) return null;
      worst = next;
    }
  }

  private mayPreempt(worst: R, { key, priority, neededBlocks, maxSequences }: W, holdings: ReadonlyMap<string, Holding>): boolean {
    if (worst.priority !== priority) return worst.priority < priority;
    if (worst.key === key) return false;
    const left = this.share(worst.key, holdings, -this.blocksOf.get(worst)!, -worst.maxSequences);
    const gained = this.share(key, holdings, neededBlocks, maxSequences);
    // Keys that have about their shares would preempt each other's requests for ever.
    return left >= gained && (left >= this.fairShare || gained <= this.fairShare / 2);
  }

  /** Of a key that wants as much as there is, over its weight. */
  private get fairShare(): number {
    if (this.totalWeight === 0) {
      const active = new Set(this.state.running.map((each) => each.key));
      for (const [first] of this.state.queues) if (first) active.add(first.key);
      for (const each of active) this.totalWeight += this.weight(each);
    }
    return 1 / this.totalWeight;
  }

  /** Whether its key then holds no more than its share of the server. */
  private isWithinShare({ key, neededBlocks, maxSequences }: W): boolean {
    return this.share(key, this.heldByKeys(), neededBlocks, maxSequences) <= this.fairShare;
  }

  /** What a key holds (and would hold with so much more) of all blocks or all sequences, whichever is more, over its weight. */
  private share(key: string, holdings: ReadonlyMap<string, Holding>, moreBlocks = 0, moreSequences = 0): number {
    const { blocks, sequences } = holdings.get(key) ?? NOTHING;
    const ofBlocks = (blocks + moreBlocks) / this.state.totalBlocks;
    const ofSequences = (sequences + moreSequences) / this.limits.maxExtends;
    return Math.max(ofBlocks, ofSequences) / this.weight(key);
  }

  private heldByKeys(): Map<string, Holding> {
    if (!this.holdings) {
      this.holdings = new Map();
      for (const request of this.state.running) {
        const { key, blocks, maxSequences } = request;
        this.blocksOf.set(request, blocks);
        add(this.holdings, key, blocks, maxSequences);
      }
      for (const { key, neededBlocks, maxSequences } of this.admit) add(this.holdings, key, neededBlocks, maxSequences);
    }
    return this.holdings;
  }
}

function add(holdings: Map<string, Holding>, key: string, moreBlocks: number, moreSequences: number): void {
  const { blocks, sequences } = holdings.get(key) ?? NOTHING;
  holdings.set(key, { blocks: blocks + moreBlocks, sequences: sequences + moreSequences });
}

type Rank = Pick<Schedulable, 'id' | 'key' | 'priority'>;
