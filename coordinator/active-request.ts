import type { TandemError } from '../common/errors.js';
import type { ExtendOp, ExtendResult, Strategy } from './generation/strategy.js';
import type { BlockManager } from './scheduler/block-manager.js';
import type { ContextCache } from './scheduler/context-cache.js';
import type { PendingExtend, RunningRequest, WaitingRequest } from './scheduler/schedule.js';
import { type ContextSource, missingBlocks, newBlocks, refreshCache, type SequenceState, sharedBoundary } from './scheduler/sequence.js';
import type { Completed, Job } from './job.js';

/** A request from its submission to its end. The scheduler sees it through {@link RunningRequest} and {@link WaitingRequest}. */
export class ActiveRequest implements RunningRequest, WaitingRequest {
  readonly key: string;
  readonly priority: number;
  readonly maxSequences: number;
  readonly sequences = new Map<number, SequenceState>();
  strategy!: Strategy<unknown>;
  /** The Extends of the current yield that have no result yet. */
  unanswered: readonly PendingRun[] = [];
  /** What of it can be in the next step: those that are not under way, and what is foreseen to follow those that are. */
  pending: readonly PendingRun[] = [];
  /** Under way before the strategy has yielded them. */
  foreseen: readonly PendingRun[] = [];
  /** Results of the current yield, in its order. */
  results: ExtendResult[] = [];
  state: 'waiting' | 'running' | 'ended' = 'waiting';
  isPreempted = false;
  isHeldBack = false;
  /** Why it is to end before the next step. */
  ending: TandemError | null = null;
  deadline: NodeJS.Timeout | null = null;
  lastStep = 0;
  /** The last step whose results it got a part of. */
  appliedStep = 0;
  firstStepMs: number | null = null;
  firstResultMs: number | null = null;
  lastTokensMs = 0;
  /** In steps that it had a part in. */
  busyMs = 0;
  generatedTokens = 0;
  cachedPromptTokens = 0;
  preemptions = 0;
  /** Epochs that ended in one of its steps since one of its Extends was done. */
  lostSteps = 0;

  constructor(
    /** Grows with arrival. */
    readonly id: number,
    readonly job: Job<unknown>,
    readonly arrivalMs: number,
    readonly resolve: (value: Completed<unknown>) => void,
    readonly reject: (error: Error) => void,
    private readonly blockManager: BlockManager,
  ) {
    this.key = job.caller.name;
    this.priority = job.priority;
    this.maxSequences = job.maxSequences;
  }

  get blocks(): number {
    if (this.isPreempted) return 0;
    if (this.sequences.size === 1) for (const { blocks } of this.sequences.values()) return blocks.length;
    return this.countHeld().blocks;
  }

  get ownBlocks(): number {
    return this.countHeld().ownBlocks;
  }

  get neededBlocks(): number {
    let blocks = this.isPreempted ? missingBlocks(this.sequences.values()) + this.pending.length : 0;
    for (const run of this.pending) blocks += run.newBlocks;
    return Math.min(blocks, this.job.maxBlocks);
  }

  private countHeld() {
    return this.blockManager.countHeld(Array.from(this.sequences.values(), ({ blocks }) => blocks));
  }
}

/**
 * One Extend that a request waits for, or that is foreseen to be the next one that it waits for. What it has to run follows from the state of its
 * sequence at the time of asking.
 */
export class PendingRun implements PendingExtend {
  /** In a step that was sent. */
  isUnderWay = false;
  /** Its strategy has yielded it: else it is foreseen, and nobody waits for it yet. */
  isAwaited = true;
  /** Of a foreseen one, the Extend of the step before that samples its token; else -1. */
  sampledBy = -1;

  constructor(
    readonly request: ActiveRequest,
    /** In the yield. */
    public index: number,
    public op: ExtendOp,
    readonly sequence: SequenceState,
    private readonly blockManager: BlockManager,
    private readonly contexts: ContextCache,
  ) {}

  /** Whether somebody waits for its result, still or by now. */
  get isWanted(): boolean {
    return this.isAwaited && this.request.state === 'running';
  }

  /** It was foreseen, is under way, and now its strategy has yielded it. */
  come(op: ExtendOp, index: number): this {
    this.op = op;
    this.index = index;
    this.isAwaited = true;
    this.sampledBy = -1;
    return this;
  }

  get runTokens(): number {
    const { sequence } = this;
    const source = this.source;
    if (source) return sequence.length - source.tokens;
    refreshCache(sequence, this.blockManager);
    return sequence.length - sequence.cachedTokens;
  }

  get newBlocks(): number {
    const { blockSize } = this.blockManager;
    const source = this.source;
    const own = newBlocks(this.sequence, blockSize);
    if (!source) return own;
    // What only the context cache holds counts as free until this sequence shares it.
    let taken = 0;
    const whole = Math.floor(source.tokens / blockSize);
    for (let i = 0; i < whole; i++) if (this.blockManager.isCachedOnly(source.blocks[i]!)) taken += 1;
    return own - whole + taken;
  }

  get sharedBlock(): number {
    return sharedBoundary(this.sequence, this.blockManager);
  }

  get sharedHolders(): number {
    const block = this.sharedBlock;
    return block < 0 ? 0 : this.blockManager.holders(block);
  }

  get computesContext(): string | null {
    const { sequence } = this;
    return sequence.contextKey !== null && sequence.settledTokens === 0 && !this.source ? sequence.contextKey : null;
  }

  /** A computed context that this run, the first of its sequence, can start from. */
  get source(): ContextSource | null {
    const { sequence } = this;
    return sequence.settledTokens === 0 && sequence.contextKey !== null ? this.contexts.find(sequence.contextKey) : null;
  }
}

export const NO_RUNS: readonly PendingRun[] = [];

export function without(runs: readonly PendingRun[], run: PendingRun): readonly PendingRun[] {
  if (runs.length === 1 && runs[0] === run) return NO_RUNS; // mostly
  return runs.filter((each) => each !== run);
}

/** Highest priority first, then oldest. */
export function insertByRank(list: ActiveRequest[], request: ActiveRequest): void {
  let at = list.length;
  while (at > 0 && isBefore(request, list[at - 1]!)) at -= 1;
  list.splice(at, 0, request);
}

function isBefore(a: ActiveRequest, b: ActiveRequest): boolean {
  return a.priority !== b.priority ? a.priority > b.priority : a.id < b.id;
}
