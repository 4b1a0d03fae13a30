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

/** What one key wants and gets of the step. */
interface Lane<R, W> {
  readonly key: string;
  readonly weight: number;
  /** Virtual token counter before the step. */
  readonly counter: number;
  /** What the step adds to the counter. */
  charge: number;
  /** Tokens that it has in this step. */
  used: number;
  /** Bound of `used`, and of `used` by decoding: where several keys share a step. */
  share: number;
  decodeShare: number;
  /** Longer runs of running requests. */
  readonly long: { readonly request: R; readonly extend: PendingExtend; readonly runTokens: number }[];
  longAt: number;
  queue: readonly W[];
  queueAt: number;
  /** Its queue has to wait for blocks; other keys may go on within their shares. */
  isBlocked: boolean;
  /** Its share of the step is used up. */
  isDone: boolean;
}

/** What of a key is next. */
type Turn<R, W> = { readonly lane: Lane<R, W> } & (
  { readonly isLong: true; readonly request: R } | { readonly isLong: false; readonly request: W }
);

interface Decode<R, W> {
  readonly request: R;
  readonly extend: PendingExtend;
  readonly runTokens: number;
  readonly lane: Lane<R, W>;
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
  /** Of the request whose run is sliced. */
  private sliceLane: Lane<R, W> | null = null;
  private tokens = 0;
  /** Bound of `tokens` in this step. */
  private stepTokens: number;
  /** Like `tokens`, but with the tokens of a sliced run in full. */
  private rows = 0;
  private freeBlocks: number;
  private sequences = 0;
  /** Of each key that has a request. */
  private readonly lanes = new Map<string, Lane<R, W>>();
  /** The last one that was looked up: mostly it is the same again. */
  private lastLane: Lane<R, W> | null = null;
  /** Of the keys that want more than decoding. */
  private readonly longLanes: Lane<R, W>[] = [];
  /** How many Extends of this step write each shared block. */
  private readonly writers = new Map<number, number>();
  private readonly contexts = new Set<string>();
  /** Several keys share the step: each lane has its bounds. */
  private isShared = false;
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
    const charges = new Map<string, number>();
    for (const { key, charge } of this.lanes.values()) if (charge > 0) charges.set(key, charge);
    return { preempt: null, admit: this.admit, run: this.run, slice: this.slice, charges };
  }

  /** @returns a request to preempt first */
  private takeDecodes(): R | null {
    const { running, slice, queues } = this.state;
    const decodes: Decode<R, W>[] = [];
    for (const request of running) {
      const lane = this.lane(request.key);
      this.sequences += request.maxSequences;
      for (const extend of request.pending) {
        if (extend === slice?.extend) {
          this.sliceLane = lane;
          continue;
        }
        const { runTokens } = extend;
        if (runTokens <= 1) decodes.push({ request, extend, runTokens, lane });
        else {
          if (lane.long.length === 0) this.longLanes.push(lane);
          lane.long.push({ request, extend, runTokens });
        }
      }
    }
    for (const queue of queues) {
      if (queue.length === 0) continue;
      const lane = this.lane(queue[0]!.key);
      if (lane.long.length === 0) this.longLanes.push(lane);
      lane.queue = queue;
    }
    const mostDecodes = this.limits.maxExtends - (slice ? 1 : 0);
    for (const { request, extend, runTokens, lane } of this.shareOut(decodes)) {
      if (this.run.length >= mostDecodes) break;
      if (lane.used >= lane.decodeShare) continue;
      const needed = this.neededBlocks(extend);
      if (needed <= this.freeBlocks) this.take(lane, extend, runTokens, needed);
      else {
        const victim = this.worstBut(request);
        if (victim) return victim;
        // It is worth least itself: it waits, the others go on and leave their blocks in the end.
      }
    }
    if (slice) this.continueSlice(slice, this.longLanes.length > 0);
    return null;
  }

  /** In the order in which they get their turn; bounds the step, and what each key has of it, where several keys share it. */
  private shareOut(decodes: readonly Decode<R, W>[]): readonly Decode<R, W>[] {
    const { stepCost } = this.state;
    if (this.lanes.size < 2 || !stepCost) return decodes;

    const decodesOf = new Map<Lane<R, W>, Decode<R, W>[]>(this.longLanes.map((lane) => [lane, []]));
    for (const decode of decodes) {
      const own = decodesOf.get(decode.lane);
      if (own) own.push(decode);
      else decodesOf.set(decode.lane, [decode]);
    }
    let weights = 0;
    for (const { weight } of decodesOf.keys()) weights += weight;
    let mostMs = Infinity;
    const modestFirst: { readonly lane: Lane<R, W>; readonly own: Decode<R, W>[]; readonly wanted: number }[] = [];
    for (const [lane, own] of decodesOf) {
      const wanted = own.length + this.longTokens(lane);
      mostMs = Math.min(mostMs, (weights / lane.weight) * stepMs(stepCost, Math.max(1, wanted)));
      modestFirst.push({ lane, own, wanted });
    }
    const fair = Math.max(modestFirst.length, Math.floor(tokensWithin(stepCost, mostMs)));
    if (fair >= this.stepTokens) return decodes;
    this.stepTokens = fair;

    this.isShared = true;
    for (const lane of this.lanes.values()) lane.share = 0;
    const inTurn: Decode<R, W>[] = [];
    modestFirst.sort((a, b) => a.wanted / a.lane.weight - b.wanted / b.lane.weight);
    let room = fair;
    for (const { lane, own, wanted } of modestFirst) {
      lane.share = Math.min(wanted, Math.max(1, (room * lane.weight) / weights));
      room -= lane.share;
      weights -= lane.weight;

      const isLongLeft = wanted > own.length;
      lane.decodeShare = Math.max(1, Math.floor(lane.share * (isLongLeft ? 1 - LEAST_LONG : 1)));
      if (own.length > lane.decodeShare) own.sort((a, b) => a.request.lastStep - b.request.lastStep); // they take turns
      for (const decode of own) inTurn.push(decode);
    }
    return inTurn;
  }

  /** Of the longer runs that a key alone would have in this step. */
  private longTokens(lane: Lane<R, W>): number {
    let tokens = this.sliceLane === lane ? this.state.slice!.runTokens : 0;
    for (const { runTokens } of lane.long) {
      if (tokens >= this.limits.stepTokens) break;
      tokens += runTokens;
    }
    if (tokens === 0) tokens = lane.queue[0]?.pending[0]?.runTokens ?? 0;
    return Math.min(tokens, this.limits.stepTokens);
  }

  /** What is left in this step for a key. */
  private roomFor({ share, used }: Lane<R, W>): number {
    return Math.min(this.stepTokens - this.tokens, share - used);
  }

  /** Nobody overtakes within a key; between keys the counters decide. @returns a request to preempt first */
  private takeLonger(): R | null {
    const next = new TopOf<Turn<R, W>>((a, b) => this.compare(a, b) < 0);
    for (const lane of this.longLanes) {
      const turn = this.turnOf(lane);
      if (turn) next.add(turn);
    }
    for (let turn = next.top; turn; turn = next.top) {
      const { lane } = turn;
      if (turn.isLong) {
        const { extend, runTokens } = lane.long[lane.longAt++]!;
        const needed = this.neededBlocks(extend);
        if (needed > this.freeBlocks) {
          const victim = this.worstBut(turn.request);
          if (victim) return victim;
        } else if (!this.takeOrSlice(lane, extend, runTokens, needed) && this.isFull(lane)) return null;
      } else if (this.blockedLanes > 0 && (this.isOverdue(lane) || !this.isWithinShare(turn.request))) this.block(lane);
      else if (!this.hasRoomFor(turn.request)) {
        const victim = this.victimOf(turn.request);
        if (victim) return victim;
        this.block(lane);
      } else if (this.begin(lane, turn.request)) lane.queueAt += 1;
      else if (this.isFull(lane)) return null;
      if (this.blockedLanes === MOST_BLOCKED) return null;
      next.replaceTop(this.turnOf(lane));
    }
    return null;
  }

  /** What a key wants next. */
  private turnOf(lane: Lane<R, W>): Turn<R, W> | null {
    if (lane.isDone) return null;
    const long = lane.long[lane.longAt]?.request;
    const waiting = lane.isBlocked || lane.queue[lane.queueAt]?.isHeldBack ? undefined : lane.queue[lane.queueAt];
    // A key's own requests go by priority and age.
    if (long && (!waiting || long.priority > waiting.priority || (long.priority === waiting.priority && long.id < waiting.id))) {
      return { lane, isLong: true, request: long };
    }
    return waiting ? { lane, isLong: false, request: waiting } : null;
  }

  /** Whether the step is, and not only this key's share of it. */
  private isFull(lane: Lane<R, W>): boolean {
    lane.isDone = true;
    return !this.isShared;
  }

  private block(lane: Lane<R, W>): void {
    if (this.blockedLanes === 0) this.blockedCounter = lane.counter + lane.charge;
    this.blockedLanes += 1;
    lane.isBlocked = true;
  }

  /** Others have gone on long enough while somebody waited for blocks. */
  private isOverdue({ counter, charge }: Lane<R, W>): boolean {
    return counter + charge - this.blockedCounter > PATIENCE_STEPS * this.limits.stepTokens;
  }

  /** @returns false if the step has no room for any of its Extends */
  private begin(lane: Lane<R, W>, request: W): boolean {
    let begun = 0;
    for (const extend of request.pending) {
      if (!this.takeOrSlice(lane, extend, extend.runTokens, 0)) break;
      begun += 1;
    }
    if (begun === 0) return false;
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

  private take(lane: Lane<R, W>, extend: PendingExtend, runTokens: number, needed: number): void {
    this.run.push(extend);
    this.reserve(extend, runTokens, needed);
    this.count(lane, runTokens, runTokens === 1 ? DECODE_CHARGE : runTokens);
  }

  private reserve(extend: PendingExtend, runTokens: number, needed: number): void {
    this.freeBlocks -= needed;
    this.rows += runTokens;
    const { sharedBlock, computesContext } = extend;
    if (sharedBlock >= 0) this.writers.set(sharedBlock, (this.writers.get(sharedBlock) ?? 0) + 1);
    if (computesContext !== null) this.contexts.add(computesContext);
  }

  private count(lane: Lane<R, W>, tokens: number, charge: number): void {
    this.tokens += tokens;
    lane.used += tokens;
    lane.charge += charge / lane.weight;
  }

  /** @returns false: the step has no room for it, and for nothing behind it */
  private takeOrSlice(lane: Lane<R, W>, extend: PendingExtend, runTokens: number, needed: number): boolean {
    if (extend.computesContext !== null && this.contexts.has(extend.computesContext)) return true; // it will find the context computed
    if (this.run.length + (this.slice ? 1 : 0) >= this.limits.maxExtends) return false;
    const room = Math.min(this.roomFor(lane), this.limits.maxBatchTokens - this.rows);
    if (runTokens <= room) {
      this.take(lane, extend, runTokens, needed);
      return true;
    }
    if (this.slice || this.rows + runTokens > this.limits.maxBatchTokens) return false;
    this.reserve(extend, runTokens, needed);
    this.sliceLane = lane;
    this.sliceUp({ extend, runTokens, nextLayer: 0 }, this.isShared ? Math.max(0, room) : Math.max(room, this.leastSlice));
    return true;
  }

  private continueSlice(slice: SliceUnderWay, othersWait: boolean): void {
    const room = Math.max(0, this.roomFor(this.sliceLane!));
    this.rows += slice.runTokens;
    if (slice.extend.computesContext !== null) this.contexts.add(slice.extend.computesContext);
    this.sliceUp(slice, this.isShared ? room : Math.max(othersWait ? room / 2 : room, this.leastSlice));
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
    this.count(this.sliceLane!, tokens, tokens);
  }

  private get leastSlice(): number {
    return this.stepTokens * LEAST_SLICE;
  }

  private layersFor(runTokens: number, budget: number): number {
    return Math.max(1, Math.min(this.limits.numLayers, Math.floor((this.limits.numLayers * budget) / runTokens)));
  }

  private lane(key: string): Lane<R, W> {
    if (this.lastLane?.key === key) return this.lastLane;
    let lane = this.lanes.get(key);
    if (!lane) this.lanes.set(key, (lane = newLane(key, this.state.keys.get(key))));
    this.lastLane = lane;
    return lane;
  }

  /** Negative: a goes first. */
  private compare({ lane: a, request: { priority: priorityA, id: idA } }: Turn<R, W>, { lane: b, request }: Turn<R, W>): number {
    return request.priority - priorityA || a.counter + a.charge - (b.counter + b.charge) || idA - request.id;
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

function newLane<R, W>(key: string, share: KeyShare | undefined): Lane<R, W> {
  return {
    key,
    weight: share?.weight ?? 1,
    counter: share?.counter ?? 0,
    charge: 0,
    used: 0,
    share: Infinity,
    decodeShare: Infinity,
    long: [],
    longAt: 0,
    queue: [],
    queueAt: 0,
    isBlocked: false,
    isDone: false,
  };
}

/** A binary heap. Only the top one can come to be worth less. */
class TopOf<Item> {
  private readonly items: Item[] = [];

  constructor(private readonly isBefore: (a: Item, b: Item) => boolean) {}

  get top(): Item | null {
    return this.items[0] ?? null;
  }

  add(item: Item): void {
    const { items } = this;
    let at = items.length;
    items.push(item);
    while (at > 0) {
      const parent = (at - 1) >> 1;
      if (!this.isBefore(item, items[parent]!)) break;
      items[at] = items[parent]!;
      at = parent;
    }
    items[at] = item;
  }

  /** @param item null: the top one goes */
  replaceTop(item: Item | null): void {
    const { items } = this;
    const moved = item ?? items.pop()!;
    if (items.length === 0) return;
    let at = 0;
    for (;;) {
      let child = 2 * at + 1;
      if (child >= items.length) break;
      if (child + 1 < items.length && this.isBefore(items[child + 1]!, items[child]!)) child += 1;
      if (!this.isBefore(items[child]!, moved)) break;
      items[at] = items[child]!;
      at = child;
    }
    items[at] = moved;
  }
}
