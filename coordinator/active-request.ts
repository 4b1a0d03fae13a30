import type { TandemError } from '../common/errors.js';
import type { ExtendOp, ExtendResult, Strategy } from './generation/strategy.js';
import type { BlockManager } from './scheduler/block-manager.js';
import type { ContextCache, ContextSource } from './scheduler/context-cache.js';
import type { PendingExtend, RunningRequest, WaitingRequest } from './scheduler/schedule.js';
import { missingBlocks, newBlocks, refreshCache, type SequenceState, sharedBoundary } from './scheduler/sequence.js';
import type { Completed, Job } from './serving-loop.js';

/** A request from its submission to its end. The scheduler sees it through {@link RunningRequest} and {@link WaitingRequest}. */
export class ActiveRequest implements RunningRequest, WaitingRequest {
  readonly key: string;
  readonly priority: number;
  readonly maxSequences: number;
  readonly sequences = new Map<number, SequenceState>();
  strategy!: Strategy<unknown>;
  /** The Extends of the current yield that have no result yet. */
  pending: PendingRun[] = [];
  /** Results of the current yield, in its order. */
  results: ExtendResult[] = [];
  state: 'waiting' | 'running' | 'ended' = 'waiting';
  isPreempted = false;
  isHeldBack = false;
  /** Why it is to end before the next step. */
  ending: TandemError | null = null;
  deadline: NodeJS.Timeout | null = null;
  firstStepMs: number | null = null;
  firstResultMs: number | null = null;
  lastTokensMs = 0;
  /** In steps that it had a part in. */
  busyMs = 0;
  generatedTokens = 0;
  cachedPromptTokens = 0;
  preemptions = 0;
  /** Epochs that ended in one of its steps since its last step that went well. */
  lostSteps = 0;

  constructor(
    /** Grows with arrival. */
    readonly id: number,
    readonly job: Job<unknown>,
    readonly arrivalMs: number,
    readonly resolve: (value: Completed<unknown>) => void,
    readonly reject: (error: Error) => void,
  ) {
    this.key = job.caller.name;
    this.priority = job.priority;
    this.maxSequences = job.maxSequences;
  }

  get blocks(): number {
    let blocks = 0;
    for (const sequence of this.sequences.values()) blocks += sequence.blocks.length;
    return this.isPreempted ? 0 : blocks;
  }

  get neededBlocks(): number {
    let blocks = this.isPreempted ? missingBlocks(this.sequences.values()) + this.pending.length : 0;
    for (const run of this.pending) blocks += run.newBlocks;
    return Math.min(blocks, this.job.maxBlocks);
  }
}

/** One Extend that a request waits for. What it has to run follows from the state of its sequence at the time of asking. */
export class PendingRun implements PendingExtend {
  constructor(
    readonly request: ActiveRequest,
    /** In the yield. */
    readonly index: number,
    readonly op: ExtendOp,
    readonly sequence: SequenceState,
    private readonly blockManager: BlockManager,
    private readonly contexts: ContextCache,
  ) {}

  get runTokens(): number {
    const { sequence } = this;
    const source = this.source;
    if (source) return sequence.length - source.tokens;
    refreshCache(sequence, this.blockManager);
    return sequence.length - sequence.cachedTokens;
  }

  get newBlocks(): number {
    const own = newBlocks(this.sequence, this.blockManager.blockSize);
    const source = this.source;
    return source ? own - Math.floor(source.tokens / this.blockManager.blockSize) : own;
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
