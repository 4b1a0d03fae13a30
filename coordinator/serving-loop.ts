import {
  CancelledError,
  DeadlineError,
  EngineError,
  InvalidRequestError,
  NotFoundError,
  NotReadyError,
  TandemError,
  WorkerLostError,
} from '../common/errors.js';
import type { Logger } from '../common/log.js';
import { ActiveRequest, insertByRank, NO_RUNS, PendingRun, without } from './active-request.js';
import { contextKeyOf } from './context-key.js';
import { Foresight } from './foresight.js';
import type { ExtendOp, ExtendResult, Sequence, Sequences } from './generation/strategy.js';
import { EpochEndedError, type Engine, type EngineStepResult } from './group/engine.js';
import type { PlannedRun, PlannedStep, SentStep, SlicedRun } from './planned-step.js';
import { type QueueLimits, RequestQueue } from './request-queue.js';
import { BlockManager } from './scheduler/block-manager.js';
import { ContextCache } from './scheduler/context-cache.js';
import { schedule, type StepLimits, type StepPlan } from './scheduler/schedule.js';
import {
  adoptContext,
  appendTokens,
  applyRun,
  createSequence,
  evictSequences,
  forkSequence,
  loseCache,
  prepareRun,
  recomputedBlocks,
  releaseSequence,
  restoreSequences,
  type SequenceState,
  takeForeseenToken,
} from './scheduler/sequence.js';
import { StepCostTable } from './scheduler/step-cost.js';
import { type Completed, type Job, notDoneWithin, type Ticket } from './job.js';
import type { ActiveRequestSnapshot, LoopSnapshot } from './status/loop-snapshot.js';
import { type LoopObserver, NO_OBSERVER, type RequestTimings, type StepStats } from './status/observer.js';

export interface LoopLimits extends Omit<StepLimits, 'numLayers'>, QueueLimits {
  /** KV blocks of contexts that nobody uses at the moment. */
  readonly contextCacheBlocks: number;
  /** Whether a step is sent while the one before it runs, where what it needs of that one can be foreseen: ranks then never wait for the coordinator. Default true. */
  readonly runAhead?: boolean;
}

/** After so many epochs that ended in its steps a request runs alone; if that ends one more, the request is to blame and fails. */
const SUSPECT_AFTER = 2;
const MOST_LISTED = 200;
/** The part of a step after which the next one is sent, and by how much earlier: planning it, and its way to the ranks, take a millisecond or two. */
const AHEAD_AT = 0.75;
const LEAST_LEAD_MS = 3;

/**
 * Queue, schedule, engine step, apply, emit: the only place where these meet. Requests enter by {@link submit}; their
 * strategies run here, between steps, and never at the same time as another's.
 */
export class ServingLoop {
  private readonly blocks: BlockManager;
  private readonly contexts: ContextCache;
  private readonly foresight: Foresight;
  private readonly queue: RequestQueue;
  private readonly byRequestId = new Map<string, ActiveRequest>();
  /** Highest priority first, then oldest. */
  private readonly running: ActiveRequest[] = [];
  private slice: SlicedRun | null = null;
  /** Of contexts that were adopted without a run; they go first in the next step. */
  private carriedCopies: number[] = [];
  /** Requests that are to end before the next step. */
  private ending: ActiveRequest[] = [];
  /** What strategies hand to clients, until the next step is on its way. */
  private deferred: ((value: unknown) => void)[] = [];
  /** What each of these is called with: a closure for every token costs more. */
  private deferredValues: unknown[] = [];
  private nextId = 1;
  private nextSequenceId = 1;
  private sentSteps = 0;
  private readonly totals = {
    finished: 0,
    failed: 0,
    cancelled: 0,
    expired: 0,
    preemptions: 0,
    steps: 0,
    stepSeconds: 0,
    collectiveSeconds: 0,
    promptTokens: 0,
    generatedTokens: 0,
  };
  private wake: (() => void) | null = null;
  /** Something came while the loop was not asleep. */
  private isNotified = false;
  private closed = false;
  private draining = false;
  private idle: (() => void)[] = [];
  /** Set when the engine is gone for good. */
  private engineLost: TandemError | null = null;
  private readonly stepCost = new StepCostTable();
  private readonly stepLimits: StepLimits;
  private readonly loop: Promise<void>;

  constructor(
    private readonly engine: Engine,
    private readonly limits: LoopLimits,
    private readonly log: Logger,
    private readonly observer: LoopObserver = NO_OBSERVER,
    private readonly now: () => number = () => performance.now(),
  ) {
    const { kvBlocks, blockSize, numLayers } = engine.capacity;
    this.blocks = new BlockManager(kvBlocks, blockSize);
    this.contexts = new ContextCache(this.blocks, Math.min(limits.contextCacheBlocks, kvBlocks));
    this.foresight = new Foresight(this.blocks, this.contexts);
    this.queue = new RequestQueue(limits);
    const { stepTokens, maxBatchTokens, maxExtends } = limits;
    this.stepLimits = { stepTokens, maxBatchTokens, maxExtends, numLayers };
    this.loop = this.run().catch((error: unknown) => this.giveUp(error));
  }

  /** Queues a request. Its strategy runs up to its first Extends at once, so whatever it refuses is thrown here. */
  submit<R>(job: Job<R>): Ticket<R> {
    const key = this.queue.keyOf(job, this.now());
    let resolve!: (value: Completed<unknown>) => void;
    let reject!: (error: Error) => void;
    const done = new Promise<Completed<unknown>>((yes, no) => {
      resolve = yes;
      reject = no;
    });
    done.catch(() => {}); // the caller may look at it late
    let request: ActiveRequest;
    let first: IteratorResult<readonly ExtendOp[], R>;
    try {
      this.checkAdmission(job);
      this.queue.check(job, key, this.now());
      request = new ActiveRequest(this.nextId++, job, this.now(), resolve, reject, this.blocks);
      const strategy = job.start(this.sequencesOf(request));
      request.strategy = strategy;
      first = strategy.next();
    } catch (error) {
      this.queue.forgetIfIdle(key);
      throw error;
    }
    this.byRequestId.set(job.requestId, request);
    this.queue.take(request, key);
    if (job.timeoutMs !== null) {
      const { timeoutMs, elapsedMs = 0 } = job;
      const expire = (): void => this.endLater(request, notDoneWithin(timeoutMs));
      request.deadline = setTimeout(expire, Math.min(Math.max(0, timeoutMs - elapsedMs), 2 ** 31 - 1)).unref();
    }
    if (first.done) this.finish(request, first.value);
    else {
      try {
        this.takeOps(request, first.value);
      } catch (error) {
        this.fail(request, error);
      }
    }
    this.notify();
    return {
      requestId: job.requestId,
      done: done as Promise<Completed<R>>,
      cancel: (reason) => this.endLater(request, reason ?? new CancelledError('the client cancelled the request')),
    };
  }

  /** @param owner name of the API key that may end it; null: anybody's @throws NotFoundError */
  abort(requestId: string, owner: string | null): void {
    const request = this.byRequestId.get(requestId);
    if (!request || (owner !== null && request.key !== owner)) {
      throw new NotFoundError(`no request ${requestId} waits or runs${owner ? ` for key ${owner}` : ''}: it may have ended`);
    }
    this.endLater(request, new CancelledError('the request was aborted'));
  }

  /** Refuses new requests from here on. @returns how many still waited or ran when the time was over; 0: none */
  async drain(timeoutMs: number | null): Promise<number> {
    this.draining = true;
    if (this.byRequestId.size > 0) {
      let timer: NodeJS.Timeout | undefined;
      await Promise.race([
        new Promise<void>((resolve) => this.idle.push(resolve)),
        new Promise<void>((resolve) => {
          if (timeoutMs !== null) timer = setTimeout(resolve, timeoutMs);
        }),
      ]);
      clearTimeout(timer);
    }
    return this.byRequestId.size;
  }

  get isDraining(): boolean {
    return this.draining;
  }

  /** Runs a client's callback once the next step is on its way, so that no rank waits for it. */
  defer<T>(callback: (value: T) => void, value: T): void {
    this.deferred.push(callback as (value: unknown) => void);
    this.deferredValues.push(value);
  }

  snapshot(): LoopSnapshot {
    const { blockSize, totalBlocks, usedBlocks, cachedBlocks, freeBlocks, peakUsedBlocks } = this.blocks;
    return {
      ...this.totals,
      running: this.running.length,
      queued: this.queue.requests,
      queuedTokens: this.queue.tokens,
      kv: { blockSize, totalBlocks, usedBlocks, cachedBlocks, freeBlocks, peakUsedBlocks },
      contextCache: this.contexts.stats,
      active: this.listActive(),
    };
  }

  /** Ends all requests with a NotReadyError and waits for the step under way. */
  async close(): Promise<void> {
    this.closed = true;
    this.notify();
    await this.loop;
  }

  private async run(): Promise<void> {
    let sent: SentStep | null = null;
    let lastAnsweredMs = 0;
    /** What the last two steps took: one of them may have had a prompt in it. */
    let lastMs: readonly [number, number] = [0, 0];
    while (!this.closed) {
      this.isNotified = false;
      this.endFlagged();
      const current: SentStep | null = sent ?? this.send(() => this.planStep(false));
      sent = null;
      if (!current) {
        this.flush();
        await this.sleep();
        continue;
      }
      const { step, sentMs, scheduleMs } = current;
      const flushing = this.flushOnceSent();
      sent = await this.sendAhead(current, Math.min(...lastMs));
      try {
        const answer = await current.answer;
        const answeredMs = this.now();
        const flushMs = flushing();
        const flushedMs = this.now();
        const tokensBefore = this.totals.generatedTokens;
        // One that was sent ahead begins when the one before it has ended.
        const startMs = Math.max(current.startMs, lastAnsweredMs);
        this.apply(step, answer, startMs);
        this.observe(step, answer, {
          scheduleMs,
          totalMs: (sent ? answeredMs : this.now()) - startMs,
          roundTripMs: answeredMs - Math.max(sentMs, lastAnsweredMs),
          emitMs: flushMs + this.now() - flushedMs,
          generatedTokens: this.totals.generatedTokens - tokensBefore,
        });
        lastAnsweredMs = answeredMs;
        lastMs = [lastMs[1], answeredMs - startMs];
      } catch (error) {
        if (error instanceof EpochEndedError || error instanceof WorkerLostError) sent = null; // that is lost as well
        if (error instanceof EpochEndedError) await this.recover(step, error);
        else if (error instanceof WorkerLostError) this.giveUp(error);
        else this.failStep(step, error);
      }
    }
    await sent?.answer.catch(() => {}); // nobody is left to take it
    this.failAll(new NotReadyError('the server is shutting down'));
    this.flush();
  }

  /** Not before it has to be, so that who comes until then has a part in it. @param likelyMs what the step under way may take */
  private async sendAhead(current: SentStep, likelyMs: number): Promise<SentStep | null> {
    if (this.limits.runAhead === false || this.closed) return null;
    const waitMs = AHEAD_AT * likelyMs - LEAST_LEAD_MS;
    if (waitMs >= 1) {
      if (await isOverWithin(current.answer, waitMs)) return null;
      this.endFlagged();
    }
    return this.send(() => this.planAhead(current.step));
  }

  private send(plan: () => PlannedStep | null): SentStep | null {
    const startMs = this.now();
    const step = plan();
    if (!step) return null;
    const engineStep = this.toEngineStep(step, startMs);
    this.sentSteps += 1;
    const sentMs = this.now();
    const answer = this.engine.step(engineStep);
    answer.catch(() => {}); // it is looked at when its turn comes
    return { step, startMs, sentMs, scheduleMs: sentMs - startMs, answer };
  }

  private notify(): void {
    this.isNotified = true;
    this.wake?.();
  }

  /** Until somebody notifies, or not at all if somebody has since the loop looked. */
  private async sleep(): Promise<void> {
    if (!this.isNotified) await new Promise<void>((resolve) => (this.wake = resolve));
    this.wake = null;
  }

  private planStep(isAhead: boolean): PlannedStep | null {
    const heldBack: ActiveRequest[] = [];
    for (;;) {
      const plan = this.schedule();
      if (plan.preempt) {
        if (isAhead) return null;
        this.preempt(plan.preempt);
        plan.preempt.isHeldBack = true;
        heldBack.push(plan.preempt);
        continue;
      }
      for (const request of plan.admit) this.admit(request);
      const computed = (plan.run as PendingRun[]).filter((pending) => pending.runTokens === 0);
      if (computed.length === 0) {
        const step = this.prepare(plan);
        for (const request of heldBack.splice(0)) request.isHeldBack = false;
        if (step || isAhead) return step;
        if (plan.run.length > 0 || plan.slice) continue; // what was chosen failed
        const [stuck] = this.running;
        if (!stuck) return null;
        this.fail(stuck, new Error(`it needs more KV blocks than the ${stuck.job.maxBlocks} that were foreseen`));
        continue;
      }
      for (const pending of computed) this.completeWithoutRun(pending);
    }
  }

  /**
   * The step after one that is under way, where all that goes on from that one's results is foreseen to take the token that it samples. Who has to give up
   * blocks, and what to do where nothing fits, is decided only when nothing is under way.
   */
  private planAhead({ whole, slice }: PlannedStep): PlannedStep | null {
    if (slice || !this.foresight.foresee(whole)) return null;
    const ahead = this.planStep(true);
    this.foresight.forgetUnplanned(whole);
    return ahead;
  }

  private schedule(): StepPlan<ActiveRequest, ActiveRequest> {
    const suspect = this.running.find(({ lostSteps }) => lostSteps >= SUSPECT_AFTER);
    return schedule(
      {
        running: suspect ? [suspect] : this.running,
        queues: suspect ? [] : this.queue.queues,
        keys: this.queue.keys,
        slice: this.slice,
        freeBlocks: this.blocks.availableBlocks,
        totalBlocks: this.blocks.totalBlocks,
        stepCost: this.stepCost.cost,
      },
      this.stepLimits,
    );
  }

  /** Gives the chosen runs their blocks. A run that would write what another run of the step writes comes in a later step. */
  private prepare(plan: StepPlan<ActiveRequest, ActiveRequest>): PlannedStep | null {
    const blockCopies = this.carriedCopies;
    const written = new Set(this.slice ? recomputedBlocks(this.slice.run.sequence, this.blocks) : []);
    let tokens = 0;
    const prepareOne = (pending: PendingRun): PlannedRun | null => {
      const { request, sequence, source } = pending;
      if (request.state !== 'running') return null;
      try {
        if (source) this.adopt(pending, blockCopies);
        const again = recomputedBlocks(sequence, this.blocks);
        if (again.some((block) => written.has(block))) return null; // in the next step it finds them computed
        for (const block of again) written.add(block);
        if (!source && sequence.settledTokens === 0 && sequence.contextKey !== null) this.contexts.missed();
        const { firstToken, blockCopies: copies } = prepareRun(sequence, this.blocks);
        for (const block of copies) blockCopies.push(block);
        this.setUnderWay(pending);
        return { sequence, firstToken, pending, runTokens: sequence.length - firstToken, foreseen: null };
      } catch (error) {
        this.fail(request, error); // a defect of one request is no reason to end the others
        return null;
      }
    };
    const whole: PlannedRun[] = [];
    let hasLogits = false;
    for (const pending of plan.run as PendingRun[]) {
      const isLogits = pending.op.want.kind === 'logits';
      if (isLogits && hasLogits) continue; // one such answer fills a message
      const { runTokens } = pending;
      // The context that it was to start from had to make room for another run of this step.
      if (runTokens > 1 && tokens + runTokens > this.stepLimits.stepTokens) continue;
      const run = prepareOne(pending);
      if (!run) continue;
      tokens += runTokens;
      hasLogits ||= isLogits;
      whole.push(run);
    }
    let slice: PlannedStep['slice'] = null;
    if (plan.slice) {
      const extend = plan.slice.extend as PendingRun;
      if (this.slice?.extend === extend) {
        this.setUnderWay(extend);
        slice = { ...plan.slice, extend, run: this.slice.run, nextLayer: plan.slice.endLayer };
      } else if (extend.runTokens <= plan.slice.runTokens) {
        // Less than planned where a preempted request found its context still computed.
        const { numLayers, stepTokens } = this.stepLimits;
        const run = prepareOne(extend);
        if (run) {
          const { runTokens } = run;
          const endLayer = tokens + runTokens <= stepTokens ? numLayers : plan.slice.endLayer;
          slice = { extend, run, runTokens, firstLayer: 0, endLayer, nextLayer: endLayer };
        }
      }
    }
    if (whole.length === 0 && !slice) return null;
    this.carriedCopies = [];
    this.queue.charge(plan.charges);
    return { whole, slice, blockCopies };
  }

  private setUnderWay(pending: PendingRun): void {
    const { request } = pending;
    pending.isUnderWay = true;
    request.pending = without(request.pending, pending);
    if (!pending.isAwaited) request.foreseen = [...request.foreseen, pending];
  }

  private adopt(pending: PendingRun, blockCopies: number[]): void {
    const { request, sequence, source } = pending;
    this.contexts.used(sequence.contextKey!, source!);
    request.cachedPromptTokens = Math.max(request.cachedPromptTokens, source!.tokens);
    for (const block of adoptContext(sequence, source!, this.blocks)) blockCopies.push(block);
  }

  /** All that it was to compute is there. */
  private completeWithoutRun(pending: PendingRun): void {
    const { request } = pending;
    if (request.state !== 'running') return;
    try {
      if (pending.source) this.adopt(pending, this.carriedCopies);
      request.pending = without(request.pending, pending);
      this.complete(pending, { kind: 'none' });
      if (request.unanswered.length === 0) this.resume(request);
    } catch (error) {
      this.fail(request, error);
    }
  }

  private toEngineStep({ whole, slice, blockCopies }: PlannedStep, nowMs: number) {
    const { numLayers } = this.engine.capacity;
    const toExtend = ({ sequence, firstToken, pending }: PlannedRun, firstLayer: number, endLayer: number) => {
      pending.request.lastStep = this.sentSteps;
      if (pending.request.firstStepMs === null) this.begin(pending.request, nowMs);
      const { op } = pending;
      const isNewOnly = sequence.length - firstToken === op.tokens.length; // nothing that was lost is computed again
      return {
        tokens: isNewOnly ? op.tokens : sequence.tokens.slice(firstToken),
        positions: isNewOnly ? op.positions : sequence.positions.slice(firstToken),
        blockTable: sequence.blocks,
        cachedTokens: firstToken,
        bidirectionalTokens: Math.max(0, sequence.bidirectionalTokens - firstToken),
        firstLayer,
        endLayer,
        want: op.want,
        sampledBy: pending.sampledBy,
      };
    };
    const extendsOfStep = whole.map((run) => toExtend(run, 0, numLayers));
    if (slice) extendsOfStep.push(toExtend(slice.run, slice.firstLayer, slice.endLayer));
    return { blockCopies, extends: extendsOfStep };
  }

  private begin(request: ActiveRequest, nowMs: number): void {
    request.firstStepMs = nowMs;
    this.totals.promptTokens += request.job.promptTokens;
  }

  private apply({ whole, slice }: PlannedStep, { results, ranks }: EngineStepResult, startMs: number): void {
    const nowMs = this.now();
    this.totals.steps += 1;
    this.queue.stepped(nowMs - startMs);
    this.totals.stepSeconds += longest(ranks, 'computeMs') / 1000;
    this.totals.collectiveSeconds += longest(ranks, 'collectiveMs') / 1000;

    const isSliceDone = slice !== null && slice.endLayer === this.engine.capacity.numLayers;
    this.slice = slice && !isSliceDone && slice.extend.isWanted ? slice : null;
    const ran = slice ? [...whole, slice.run] : whole;
    for (let i = 0; i < ran.length; i++) {
      const run = ran[i]!;
      const { pending } = run;
      const { request } = pending;
      pending.isUnderWay = false;
      if (!pending.isWanted) continue; // its request has ended, or its strategy went on otherwise than was foreseen
      if (run === slice?.run && !isSliceDone) {
        request.pending = [...request.pending, pending];
        continue;
      }
      if (run.foreseen) takeForeseenToken(run.sequence); // the strategy gives it back, if it goes on
      applyRun(run, this.blocks);
      const result = results[i]!;
      if (result.kind === 'error') {
        this.fail(request, new EngineError(result.message));
        continue;
      }
      if (run.firstToken < run.sequence.contextTokens) this.contexts.add(run.sequence);
      this.complete(pending, result);
      request.lostSteps = 0; // not for a slice: the layers that end epochs may be yet to come
    }
    for (const { pending } of ran) {
      const { request } = pending;
      if (!pending.isWanted || request.appliedStep === this.totals.steps) continue;
      request.appliedStep = this.totals.steps; // it may have several runs in the step
      request.busyMs += nowMs - startMs;
      if (request.unanswered.length > 0) continue;
      if (request.results.some(carriesTokens)) this.observeTokens(request, nowMs);
      this.resume(request);
    }
  }

  private complete(pending: PendingRun, result: ExtendResult): void {
    const { request } = pending;
    request.results[pending.index] = result;
    request.unanswered = without(request.unanswered, pending);
  }

  private observeTokens(request: ActiveRequest, nowMs: number): void {
    if (request.firstResultMs === null) {
      request.firstResultMs = nowMs;
      this.observer.firstToken(nowMs - request.arrivalMs);
    } else this.observer.interToken(nowMs - request.lastTokensMs);
    request.lastTokensMs = nowMs;
    let tokens = 0;
    for (const { kind } of request.results) if (kind === 'sample') tokens += 1;
    if (tokens === 0 && request.results[0]!.kind === 'candidates') tokens = 1; // of the best beam
    request.generatedTokens += tokens;
    this.totals.generatedTokens += tokens;
    this.queue.generated(request, tokens, nowMs);
  }

  private observe(
    { whole, slice }: PlannedStep,
    { ranks, evaluateMs, codecMs }: EngineStepResult,
    {
      scheduleMs,
      totalMs,
      roundTripMs,
      emitMs,
      generatedTokens,
    }: Pick<StepStats, 'scheduleMs' | 'emitMs' | 'generatedTokens'> & { readonly totalMs: number; readonly roundTripMs: number },
  ): void {
    const stepMs = longest(ranks, 'computeMs');
    const allReduceMs = longest(ranks, 'collectiveMs');
    let decodeTokens = 0;
    let prefillTokens = slice ? (slice.run.runTokens * (slice.endLayer - slice.firstLayer)) / this.stepLimits.numLayers : 0;
    for (const { runTokens } of whole) {
      if (runTokens === 1) decodeTokens += 1;
      else prefillTokens += runTokens;
    }
    this.stepCost.observe(decodeTokens + prefillTokens, totalMs);
    this.observer.step({
      scheduleMs,
      wireMs: Math.max(0, roundTripMs - stepMs),
      codecMs,
      computeMs: Math.max(0, stepMs - allReduceMs - evaluateMs),
      allReduceMs,
      sampleMs: evaluateMs,
      emitMs,
      ranks,
      decodeTokens,
      prefillTokens,
      generatedTokens,
      extends: whole.length + (slice ? 1 : 0),
    });
  }

  private resume(request: ActiveRequest): void {
    try {
      const next = request.strategy.next(request.results);
      if (next.done) this.finish(request, next.value);
      else this.takeOps(request, next.value);
    } catch (error) {
      this.fail(request, error);
    }
  }

  private takeOps(request: ActiveRequest, ops: readonly ExtendOp[]): void {
    if (ops.length === 0) throw new Error('a strategy yielded no Extend');
    request.results = new Array<ExtendResult>(ops.length);
    // Most have one: a list that grows takes room for many.
    request.unanswered = ops.length === 1 ? [this.takeOp(request, ops[0]!, 0)] : ops.map((op, i) => this.takeOp(request, op, i));
    request.pending = request.foreseen.length === 0 ? request.unanswered : request.unanswered.filter(({ isUnderWay }) => !isUnderWay);
    request.foreseen = NO_RUNS; // what is left of them nobody will ask for
  }

  private takeOp(request: ActiveRequest, op: ExtendOp, index: number): PendingRun {
    const sequence = request.sequences.get(op.sequence.id);
    if (!sequence) throw new Error(`Extend of sequence ${op.sequence.id}, which is released or another request's`);
    const isNew = sequence.length === 0;
    appendTokens(sequence, op);
    if (isNew) sequence.contextKey = contextKeyOf(request.key, op, sequence.contextTokens);
    if (sequence.length > this.limits.maxBatchTokens) {
      throw new InvalidRequestError(`a run of ${sequence.length} tokens, the server takes ${this.limits.maxBatchTokens} in one step`);
    }
    for (const foreseen of request.foreseen) if (foreseen.op.want === op.want) return foreseen.come(op, index);
    return new PendingRun(request, index, op, sequence, this.blocks, this.contexts);
  }

  private sequencesOf(request: ActiveRequest): Sequences {
    const own = (sequence: Sequence): SequenceState => {
      const state = request.sequences.get(sequence.id);
      if (!state) throw new Error(`sequence ${sequence.id} is released or another request's`);
      return state;
    };
    const add = (state: SequenceState): SequenceState => {
      request.sequences.set(state.id, state);
      return state;
    };
    return {
      create: () => add(createSequence(this.nextSequenceId++)),
      fork: (parent) => add(forkSequence(this.nextSequenceId++, own(parent), this.blocks)),
      release: (sequence) => {
        const state = own(sequence);
        releaseSequence(state, this.blocks, this.contexts.leave(state, request.sequences.values()));
        request.sequences.delete(state.id);
      },
    };
  }

  /** @throws TandemError */
  private checkAdmission({ requestId, maxBlocks }: Job<unknown>): void {
    if (this.closed) throw new NotReadyError('the server is shutting down');
    if (this.draining) throw new NotReadyError('the server is draining and takes no new requests: ask another one');
    if (this.engineLost) throw new NotReadyError(this.engineLost.message);
    const { totalBlocks, blockSize } = this.blocks;
    if (maxBlocks > totalBlocks) {
      throw new InvalidRequestError(
        `the request can need ${maxBlocks} KV blocks of ${blockSize} tokens, the server has ${totalBlocks}: ask for fewer new tokens, samples or beams, or start the server with more --kv-blocks`,
      );
    }
    if (this.byRequestId.has(requestId)) {
      throw new InvalidRequestError(`a request with the id ${requestId} waits or runs already: give another`, 'options.request_id');
    }
  }

  private admit(request: ActiveRequest): void {
    this.queue.admit(request);
    request.state = 'running';
    insertByRank(this.running, request);
    if (!request.isPreempted) return;
    request.isPreempted = false;
    restoreSequences(request.sequences.values(), this.blocks, (key) => this.contexts.find(key));
  }

  /** Its blocks go to somebody who is worth more; it waits, and goes on with what it has generated. */
  private preempt(request: ActiveRequest): void {
    this.log.debug({ requestId: request.job.requestId }, 'preempted for lack of KV blocks');
    if (this.slice?.run.pending.request === request) this.slice = null;
    evictSequences(request.sequences.values(), this.blocks, (sequence) => this.contexts.leave(sequence, request.sequences.values()));
    this.running.splice(this.running.indexOf(request), 1);
    request.isPreempted = true;
    request.preemptions += 1;
    this.totals.preemptions += 1;
    this.observer.preempted();
    this.queue.enqueue(request);
  }

  /** The caches are gone: everything that was computed is computed again by the same Extends, once there are workers. */
  private async recover(step: PlannedStep, ended: EpochEndedError): Promise<void> {
    this.log.warn({ running: this.running.length, reason: ended.message }, 'KV caches lost, requests go on when the group is back');
    this.foresight.forgetLost(step.whole);
    this.slice = null;
    this.carriedCopies = [];
    this.blocks.loseContents();
    this.contexts.clear();
    for (const request of this.byRequestId.values()) for (const sequence of request.sequences.values()) loseCache(sequence, this.blocks);
    for (const request of this.running) {
      for (const pending of request.unanswered) pending.isUnderWay = false;
      request.pending = request.unanswered;
      request.foreseen = NO_RUNS;
    }
    const involved = new Set(requestsOf(step));
    for (const request of involved) {
      request.lostSteps += 1;
      if (involved.size === 1 && request.lostSteps > SUSPECT_AFTER) {
        this.fail(
          request,
          new EngineError(`the workers were lost ${request.lostSteps} times in this request's steps, last: ${ended.message}`),
        );
      }
    }
    let outcome: { readonly error: unknown } | null = null;
    const settle = (error: unknown): void => {
      outcome = { error };
      this.notify();
    };
    this.engine.ready().then(() => settle(null), settle);
    while (!this.closed) {
      this.isNotified = false;
      this.endFlagged();
      this.flush();
      if (outcome) break;
      await this.sleep();
    }
    const error = (outcome as { readonly error: unknown } | null)?.error;
    if (error) this.giveUp(error);
  }

  /** No step can run any more. */
  private giveUp(error: unknown): void {
    if (!(error instanceof TandemError)) this.log.error({ err: error }, 'serving ended by a defect');
    this.engineLost = toTandemError(error);
    this.failAll(this.engineLost);
    this.flush(); // the loop may have ended
  }

  private endLater(request: ActiveRequest, reason: TandemError): void {
    if (request.state === 'ended' || request.ending) return;
    request.ending = reason;
    this.ending.push(request);
    this.notify();
  }

  private endFlagged(): void {
    if (this.ending.length === 0) return;
    for (const request of this.ending.splice(0)) if (request.state !== 'ended') this.fail(request, request.ending);
  }

  private failStep(step: PlannedStep, error: unknown): void {
    this.slice = null;
    for (const request of new Set(requestsOf(step))) if (request.state !== 'ended') this.fail(request, error);
  }

  private failAll(error: Error): void {
    for (const request of [...this.byRequestId.values()]) this.fail(request, error);
  }

  private finish(request: ActiveRequest, value: unknown): void {
    this.totals.finished += 1;
    const timings = this.end(request, 'finished', null);
    this.defer(request.resolve, { value, timings, cachedPromptTokens: request.cachedPromptTokens }); // behind its last tokens
  }

  private fail(request: ActiveRequest, error: unknown): void {
    const outcome = error instanceof CancelledError ? 'cancelled' : error instanceof DeadlineError ? 'expired' : 'failed';
    this.totals[outcome] += 1;
    const { requestId } = request.job;
    if (!(error instanceof TandemError)) this.log.error({ requestId, err: error }, 'a request failed by a defect');
    const typed = toTandemError(error);
    this.end(request, outcome, typed);
    this.defer(request.reject, typed);
  }

  private end(request: ActiveRequest, outcome: 'finished' | 'failed' | 'cancelled' | 'expired', error: TandemError | null): RequestTimings {
    const { job, arrivalMs } = request;
    const endMs = this.now();
    if (error) request.strategy.return(undefined); // its `finally`s run; what it still holds is released below
    if (request.state === 'waiting') this.queue.dequeue(request);
    else this.running.splice(this.running.indexOf(request), 1);
    request.state = 'ended';
    if (this.slice?.run.pending.request === request) this.slice = null;
    for (const sequence of request.sequences.values()) {
      const kept = request.isPreempted ? 0 : this.contexts.leave(sequence, request.sequences.values());
      releaseSequence(sequence, this.blocks, kept);
    }
    request.sequences.clear();
    request.pending = NO_RUNS;
    request.unanswered = NO_RUNS;
    request.foreseen = NO_RUNS;
    if (request.deadline) clearTimeout(request.deadline);
    this.byRequestId.delete(job.requestId);
    this.queue.ended(request);

    const firstStepMs = request.firstStepMs ?? endMs;
    const firstResultMs = request.firstResultMs ?? endMs;
    const timings = {
      queueMs: firstStepMs - arrivalMs,
      prefillMs: firstResultMs - firstStepMs,
      decodeMs: endMs - firstResultMs,
      stallMs: Math.max(0, endMs - firstStepMs - request.busyMs),
    };
    this.observer.ended({
      requestId: job.requestId,
      key: request.key,
      outcome,
      errorCode: error?.code ?? null,
      arrivalMs,
      timings,
      promptTokens: job.promptTokens,
      cachedPromptTokens: request.cachedPromptTokens,
      generatedTokens: request.generatedTokens,
      preemptions: request.preemptions,
      traceParent: job.traceParent ?? null,
    });
    if (this.byRequestId.size === 0) for (const resolve of this.idle.splice(0)) resolve();
    return timings;
  }

  /**
   * Node writes to sockets when the event loop comes round: handing tokens to many clients before that would keep the ranks waiting.
   * @returns a function that makes sure it is done, and says how long it took
   */
  private flushOnceSent(): () => number {
    let flushMs = 0;
    const flush = (): void => {
      const startMs = this.now();
      this.flush();
      flushMs += this.now() - startMs;
    };
    const immediate = setImmediate(flush);
    return () => {
      clearImmediate(immediate);
      if (this.deferred.length > 0) flush();
      return flushMs;
    };
  }

  private flush(): void {
    if (this.deferred.length === 0) return;
    const { deferred, deferredValues } = this;
    this.deferred = [];
    this.deferredValues = [];
    for (let i = 0; i < deferred.length; i++) {
      try {
        deferred[i]!(deferredValues[i]);
      } catch (error) {
        this.log.error({ err: error }, 'handing tokens to a client failed by a defect');
      }
    }
  }

  private listActive(): ActiveRequestSnapshot[] {
    const nowMs = this.now();
    const list: ActiveRequestSnapshot[] = [];
    for (const request of this.byRequestId.values()) {
      if (list.length === MOST_LISTED) break;
      const { job, state, isPreempted, firstResultMs, priority, generatedTokens } = request;
      list.push({
        requestId: job.requestId,
        key: request.key,
        state: isPreempted ? 'preempted' : state === 'waiting' ? 'queued' : firstResultMs === null ? 'prefill' : 'decode',
        promptTokens: job.promptTokens,
        generatedTokens,
        kvBlocks: request.blocks,
        priority,
        ageMs: nowMs - request.arrivalMs,
      });
    }
    return list;
  }
}

async function isOverWithin(answer: Promise<unknown>, ms: number): Promise<boolean> {
  let timer: NodeJS.Timeout | undefined;
  const timeIsUp = new Promise<boolean>((resolve) => (timer = setTimeout(resolve, ms, false)));
  const over = (): boolean => true;
  const isOver = await Promise.race([answer.then(over, over), timeIsUp]);
  clearTimeout(timer);
  return isOver;
}

function requestsOf({ whole, slice }: PlannedStep): ActiveRequest[] {
  return [...whole, ...(slice ? [slice.run] : [])].map(({ pending }) => pending.request);
}

function carriesTokens({ kind }: ExtendResult): boolean {
  return kind !== 'none';
}

function longest(ranks: EngineStepResult['ranks'], field: 'computeMs' | 'collectiveMs'): number {
  let most = 0;
  for (const rank of ranks) most = Math.max(most, rank[field]);
  return most;
}

function toTandemError(error: unknown): TandemError {
  return error instanceof TandemError ? error : new EngineError(error instanceof Error ? error.message : String(error));
}
