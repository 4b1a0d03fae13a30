import type { Caller } from './access/caller.js';
import {
  CancelledError,
  EngineError,
  InvalidRequestError,
  NotReadyError,
  QueueFullError,
  TandemError,
  WorkerLostError,
} from '../common/errors.js';
import type { Logger } from '../common/log.js';
import type { ExtendOp, ExtendResult, Sequence, Sequences, Strategy } from './generation/strategy.js';
import { EpochEndedError, type Engine, type EngineStepResult } from './group/engine.js';
import type { RequestTimings } from './status/observer.js';
import { BlockManager } from './scheduler/block-manager.js';
import { schedule, type PendingExtend, type StepLimits } from './scheduler/schedule.js';
import {
  appendTokens,
  applyRun,
  createSequence,
  forkSequence,
  loseCache,
  prepareRun,
  recomputedBlocks,
  refreshCache,
  releaseSequence,
  type Run,
  type SequenceState,
} from './scheduler/sequence.js';

/** One request as the loop sees it: a strategy to drive, and what it can come to need. */
export interface Job<R> {
  /** Unique among the requests that wait or run. */
  readonly requestId: string;
  readonly caller: Pick<Caller, 'name' | 'weight'>;
  /** Higher goes first. */
  readonly priority: number;
  /** From submission to the end, waiting included; null: none. */
  readonly timeoutMs: number | null;
  readonly promptTokens: number;
  /** KV blocks that it can hold at once, at worst. */
  readonly maxBlocks: number;
  /** Sequences that it can have at once, at worst. */
  readonly maxSequences: number;
  start(sequences: Sequences): Strategy<R>;
}

export interface Ticket<R> {
  readonly requestId: string;
  /** Rejects with a TandemError. */
  readonly done: Promise<Completed<R>>;
  /** Ends the request before the next step; `done` rejects with a CancelledError. No effect once it has ended. */
  cancel(): void;
}

export interface Completed<R> {
  readonly value: R;
  readonly timings: RequestTimings;
}

export interface LoopSnapshot {
  readonly running: number;
  readonly queued: number;
  readonly finished: number;
  readonly failed: number;
  readonly cancelled: number;
  readonly steps: number;
  readonly computeMs: number;
  readonly collectiveMs: number;
  readonly promptTokens: number;
  readonly generatedTokens: number;
  readonly kv: { blockSize: number; totalBlocks: number; usedBlocks: number; peakUsedBlocks: number; reservedBlocks: number };
}

interface Active {
  readonly id: number;
  readonly reserveBlocks: number;
  readonly arrivalMs: number;
  readonly sequences: Map<number, SequenceState>;
  strategy: Strategy<unknown>;
  /** The Extends of the current yield; results fill up until all are there. */
  pending: { readonly extendId: number; readonly op: ExtendOp; readonly sequence: SequenceState }[];
  extendIds: number[];
  results: Map<number, ExtendResult>;
  firstStepMs: number | null;
  firstResultMs: number | null;
  cancelled: boolean;
  /** Epochs that ended in one of its steps since its last step that went well. */
  lostSteps: number;
  readonly resolve: (value: Completed<unknown>) => void;
  readonly reject: (error: Error) => void;
}

export interface LoopLimits extends StepLimits {
  /** Requests that may wait for admission. */
  readonly maxQueued: number;
}

/** After so many epochs that ended in its steps a request runs alone; if that ends one more, the request is to blame and fails. */
const SUSPECT_AFTER = 2;

/**
 * Queue, schedule, engine step, apply, emit: the only place where these meet. Requests enter by {@link submit}; their
 * strategies run here, between steps, and never at the same time as another's.
 */
export class ServingLoop {
  private readonly blocks: BlockManager;
  private readonly waiting: Active[] = [];
  private readonly running = new Map<number, Active>();
  private nextId = 1;
  private nextSequenceId = 1;
  private nextExtendId = 1;
  private reservedBlocks = 0;
  private readonly totals = {
    finished: 0,
    failed: 0,
    cancelled: 0,
    steps: 0,
    computeMs: 0,
    collectiveMs: 0,
    promptTokens: 0,
    generatedTokens: 0,
  };
  private wake: (() => void) | null = null;
  private closed = false;
  /** Set when the engine is gone for good. */
  private engineLost: TandemError | null = null;
  private readonly loop: Promise<void>;

  constructor(
    private readonly engine: Engine,
    private readonly limits: LoopLimits,
    private readonly log: Logger,
    private readonly now: () => number = () => performance.now(),
  ) {
    this.blocks = new BlockManager(engine.capacity.kvBlocks, engine.capacity.blockSize);
    this.loop = this.run().catch((error: unknown) => this.giveUp(error));
  }

  /** Queues a request. Its strategy runs up to its first Extends at once, so whatever it refuses is thrown here. */
  submit<R>(job: Job<R>): Ticket<R> {
    if (this.closed) throw new NotReadyError('the server is shutting down');
    if (this.engineLost) throw new NotReadyError(this.engineLost.message);
    if (this.waiting.length >= this.limits.maxQueued) {
      throw new QueueFullError(`${this.waiting.length} requests are waiting, the queue takes ${this.limits.maxQueued}: try again later`);
    }
    if (job.maxBlocks > this.blocks.totalBlocks) {
      const { totalBlocks, blockSize } = this.blocks;
      throw new InvalidRequestError(
        `the request can need ${job.maxBlocks} KV blocks of ${blockSize} tokens, the server has ${totalBlocks}: ask for fewer new tokens, samples or beams, or start the server with more --kv-blocks`,
      );
    }
    let resolve!: (value: Completed<unknown>) => void;
    let reject!: (error: Error) => void;
    const done = new Promise<Completed<unknown>>((yes, no) => {
      resolve = yes;
      reject = no;
    });
    const active: Active = {
      id: this.nextId++,
      reserveBlocks: job.maxBlocks,
      arrivalMs: this.now(),
      sequences: new Map(),
      strategy: undefined as unknown as Strategy<unknown>,
      pending: [],
      extendIds: [],
      results: new Map(),
      firstStepMs: null,
      firstResultMs: null,
      cancelled: false,
      lostSteps: 0,
      resolve,
      reject,
    };
    active.strategy = job.start(this.sequencesOf(active));
    const first = active.strategy.next();
    done.catch(() => {}); // the caller may look at it late
    if (first.done) this.finish(active, first.value);
    else {
      this.takeOps(active, first.value);
      this.waiting.push(active);
      this.wake?.();
    }
    return {
      requestId: job.requestId,
      done: done as Promise<Completed<R>>,
      cancel: () => {
        active.cancelled = true;
        this.wake?.();
      },
    };
  }

  /** Counts tokens for the totals of the status page; strategies know what is a prompt and what is new. */
  countTokens(promptTokens: number, generatedTokens: number): void {
    this.totals.promptTokens += promptTokens;
    this.totals.generatedTokens += generatedTokens;
  }

  abort(_requestId: string, _owner: string | null): void {}
  async drain(_timeoutMs: number | null): Promise<number> {
    return 0;
  }

  snapshot(): LoopSnapshot {
    const { blockSize, totalBlocks, usedBlocks, peakUsedBlocks } = this.blocks;
    return {
      ...this.totals,
      running: this.running.size,
      queued: this.waiting.length,
      kv: { blockSize, totalBlocks, usedBlocks, peakUsedBlocks, reservedBlocks: this.reservedBlocks },
    };
  }

  /** Ends all requests with a NotReadyError and waits for the step under way. */
  async close(): Promise<void> {
    this.closed = true;
    this.wake?.();
    await this.loop;
  }

  private async run(): Promise<void> {
    while (!this.closed) {
      this.dropCancelled();
      const runs = this.planStep();
      if (runs.length === 0) {
        await new Promise<void>((resolve) => (this.wake = resolve));
        this.wake = null;
        continue;
      }
      try {
        const result = await this.step(runs);
        this.apply(runs, result);
      } catch (error) {
        if (error instanceof EpochEndedError) await this.recover(runs, error);
        else if (error instanceof WorkerLostError) this.giveUp(error);
        else this.failRequests(runs, error);
      }
    }
    this.failAll(new NotReadyError('the server is shutting down'));
  }

  private planStep(): PlannedRun[] {
    const toPending = (active: Active): PendingExtend[] =>
      active.pending.map(({ extendId, sequence }) => {
        refreshCache(sequence, this.blocks);
        return { id: extendId, runTokens: sequence.length - sequence.cachedTokens };
      });
    const suspect = [...this.running.values()].find(({ lostSteps }) => lostSteps >= SUSPECT_AFTER);
    const candidates = suspect ? [suspect] : [...this.running.values()];
    const waiting = suspect ? [] : this.waiting;
    const plan = schedule(
      {
        pending: candidates.flatMap(toPending).sort((a, b) => a.id - b.id),
        waiting: waiting.map((active) => ({ id: active.id, reserveBlocks: active.reserveBlocks, pending: toPending(active) })),
        unreservedBlocks: this.blocks.totalBlocks - this.reservedBlocks,
      },
      this.limits,
    );
    for (const id of plan.admit) {
      const active = this.waiting.shift()!;
      if (active.id !== id) throw new Error('requests are admitted in arrival order');
      this.reservedBlocks += active.reserveBlocks;
      this.running.set(id, active);
    }
    const chosen = new Set(plan.run);
    const recomputed = new Set<number>();
    let hasLogits = false;
    const planRun = (active: Active, { extendId, op, sequence }: Active['pending'][number]): PlannedRun[] => {
      if (!chosen.has(extendId) || (op.want.kind === 'logits' && hasLogits)) return []; // one such answer fills a message
      const again = recomputedBlocks(sequence, this.blocks);
      if (again.some((block) => recomputed.has(block))) return []; // in the next step it finds them computed
      for (const block of again) recomputed.add(block);
      hasLogits ||= op.want.kind === 'logits';
      return [{ ...prepareRun(sequence, this.blocks), active, extendId, op }];
    };
    return [...this.running.values()].flatMap((active) => {
      try {
        return active.pending.flatMap((pending) => planRun(active, pending));
      } catch (error) {
        this.fail(active, error); // a defect of one request is no reason to end the others
        return [];
      }
    });
  }

  private step(runs: readonly PlannedRun[]): Promise<EngineStepResult> {
    const startMs = this.now();
    for (const { active } of runs) active.firstStepMs ??= startMs;
    return this.engine.step({
      blockCopies: runs.flatMap((run) => run.blockCopies),
      extends: runs.map(({ sequence, firstToken, op }) => ({
        tokens: sequence.tokens.slice(firstToken),
        positions: sequence.positions.slice(firstToken),
        blockTable: sequence.blocks,
        cachedTokens: firstToken,
        bidirectionalTokens: Math.max(0, sequence.bidirectionalTokens - firstToken),
        firstLayer: 0,
        endLayer: this.engine.capacity.numLayers,
        want: op.want,
      })),
    });
  }

  private apply(runs: readonly PlannedRun[], step: EngineStepResult): void {
    this.totals.steps += 1;
    this.totals.computeMs += Math.max(...step.ranks.map(({ computeMs }) => computeMs));
    this.totals.collectiveMs += Math.max(...step.ranks.map(({ collectiveMs }) => collectiveMs));
    const touched = new Set<Active>();
    runs.forEach((run, i) => {
      applyRun(run, this.blocks);
      run.active.results.set(run.extendId, step.results[i]!);
      run.active.pending = run.active.pending.filter(({ extendId }) => extendId !== run.extendId);
      if (run.op.want.kind !== 'none') run.active.firstResultMs ??= this.now();
      touched.add(run.active);
    });
    for (const active of touched) {
      active.lostSteps = 0;
      if (active.pending.length === 0) this.resume(active);
    }
  }

  private resume(active: Active): void {
    try {
      const results = active.extendIds.map((id) => active.results.get(id)!);
      const next = active.strategy.next(results);
      if (next.done) this.finish(active, next.value);
      else this.takeOps(active, next.value);
    } catch (error) {
      this.fail(active, error);
    }
  }

  private takeOps(active: Active, ops: readonly ExtendOp[]): void {
    if (ops.length === 0) throw new Error('a strategy yielded no Extend');
    active.results = new Map();
    active.pending = ops.map((op) => {
      const sequence = active.sequences.get(op.sequence.id);
      if (!sequence) throw new Error(`Extend of sequence ${op.sequence.id}, which is released or another request's`);
      appendTokens(sequence, op);
      if (sequence.length - sequence.cachedTokens > this.limits.maxBatchTokens) {
        throw new InvalidRequestError(`a run of ${sequence.length} tokens, the server takes ${this.limits.maxBatchTokens} in one step`);
      }
      return { extendId: this.nextExtendId++, op, sequence };
    });
    active.extendIds = active.pending.map(({ extendId }) => extendId);
  }

  private sequencesOf(active: Active): Sequences {
    const own = (sequence: Sequence): SequenceState => {
      const state = active.sequences.get(sequence.id);
      if (!state) throw new Error(`sequence ${sequence.id} is released or another request's`);
      return state;
    };
    const add = (state: SequenceState): SequenceState => {
      active.sequences.set(state.id, state);
      return state;
    };
    return {
      create: () => add(createSequence(this.nextSequenceId++)),
      fork: (parent) => add(forkSequence(this.nextSequenceId++, own(parent), this.blocks)),
      release: (sequence) => {
        releaseSequence(own(sequence), this.blocks);
        active.sequences.delete(sequence.id);
      },
    };
  }

  /** The caches are gone: everything that was computed is computed again by the same Extends, once there are workers. */
  private async recover(runs: readonly PlannedRun[], ended: EpochEndedError): Promise<void> {
    this.log.warn({ running: this.running.size, reason: ended.message }, 'KV caches lost, requests go on when the group is back');
    this.blocks.loseContents();
    for (const active of this.running.values()) for (const sequence of active.sequences.values()) loseCache(sequence);
    const involved = new Set(runs.map(({ active }) => active));
    for (const active of involved) {
      active.lostSteps += 1;
      if (involved.size === 1 && active.lostSteps > SUSPECT_AFTER) {
        this.fail(
          active,
          new EngineError(`the workers were lost ${active.lostSteps} times in this request's steps, last: ${ended.message}`),
        );
      }
    }
    let outcome: { readonly error: unknown } | null = null;
    this.engine.ready().then(
      () => {
        outcome = { error: null };
        this.wake?.();
      },
      (error: unknown) => {
        outcome = { error };
        this.wake?.();
      },
    );
    while (!this.closed) {
      this.dropCancelled();
      if (outcome) break;
      await new Promise<void>((resolve) => (this.wake = resolve));
    }
    const error = (outcome as { readonly error: unknown } | null)?.error;
    if (error) this.giveUp(error);
  }

  /** No step can run any more. */
  private giveUp(error: unknown): void {
    if (!(error instanceof TandemError)) this.log.error({ err: error }, 'serving ended by a defect');
    this.engineLost = error instanceof TandemError ? error : new EngineError(error instanceof Error ? error.message : String(error));
    this.failAll(this.engineLost);
  }

  private dropCancelled(): void {
    for (let i = this.waiting.length - 1; i >= 0; i--) {
      if (this.waiting[i]!.cancelled) this.fail(this.waiting.splice(i, 1)[0]!, new CancelledError('the client cancelled the request'));
    }
    for (const active of this.running.values()) {
      if (active.cancelled) this.fail(active, new CancelledError('the client cancelled the request'));
    }
  }

  private failRequests(runs: readonly PlannedRun[], error: unknown): void {
    for (const active of new Set(runs.map((run) => run.active))) this.fail(active, error);
  }

  private failAll(error: Error): void {
    for (const active of [...this.waiting.splice(0), ...this.running.values()]) this.fail(active, error);
  }

  private finish(active: Active, value: unknown): void {
    const endMs = this.now();
    this.release(active);
    this.totals.finished += 1;
    const firstStepMs = active.firstStepMs ?? endMs;
    const firstResultMs = active.firstResultMs ?? endMs;
    active.resolve({
      value,
      timings: {
        queueMs: firstStepMs - active.arrivalMs,
        prefillMs: firstResultMs - firstStepMs,
        decodeMs: endMs - firstResultMs,
        stallMs: 0,
      },
    });
  }

  private fail(active: Active, error: unknown): void {
    this.release(active);
    if (error instanceof CancelledError) this.totals.cancelled += 1;
    else this.totals.failed += 1;
    if (!(error instanceof TandemError)) this.log.error({ requestId: active.id, err: error }, 'a request failed by a defect');
    active.reject(error instanceof TandemError ? error : new EngineError(error instanceof Error ? error.message : String(error)));
  }

  private release(active: Active): void {
    for (const sequence of active.sequences.values()) releaseSequence(sequence, this.blocks);
    active.sequences.clear();
    active.pending = [];
    if (this.running.delete(active.id)) this.reservedBlocks -= active.reserveBlocks;
  }
}

interface PlannedRun extends Run {
  readonly active: Active;
  readonly extendId: number;
  readonly op: ExtendOp;
}
