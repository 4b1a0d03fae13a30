import { randomBytes, timingSafeEqual } from 'node:crypto';
import type { ServerDuplexStream } from '@grpc/grpc-js';
import { EngineError, NotReadyError, WorkerLostError } from '../../common/errors.js';
import type { Logger } from '../../common/log.js';
import { packageVersion } from '../../common/package-root.js';
import type { CoordinatorMessage } from '../../proto/generated/tandem/v1/CoordinatorMessage.js';
import type { Hello__Output } from '../../proto/generated/tandem/v1/Hello.js';
import type { LoadProgress__Output } from '../../proto/generated/tandem/v1/LoadProgress.js';
import type { Memory__Output } from '../../proto/generated/tandem/v1/Memory.js';
import type { StepResult__Output } from '../../proto/generated/tandem/v1/StepResult.js';
import type { WorkerMessage__Output } from '../../proto/generated/tandem/v1/WorkerMessage.js';
import type { ExtendResult } from '../generation/strategy.js';
import { EpochEndedError, type Engine, type EngineCapacity, type EngineStep, type EngineStepResult } from './engine.js';
import { decodeResults, encodeStep } from './wire.js';

type Link = ServerDuplexStream<WorkerMessage__Output, CoordinatorMessage>;

export interface WorkerGroupOptions {
  readonly worldSize: number;
  readonly modelPath: string;
  readonly threads: number;
  /** As the Assignment has it. */
  readonly engine: { readonly kvDtype: string; readonly isa: string; readonly activations: string; readonly quantizeEmbedding: string };
  readonly kvBlockSize: number;
  /** How many KV blocks a rank gets, from the smallest memory that a rank reports for its device. Throws if not even one sequence fits. */
  readonly kvBlocks: (totalMemoryBytes: number, deviceKind: 'cpu' | 'cuda') => number;
  readonly maxBatchTokens: number;
  readonly collectiveTimeoutMs: number;
  /** A step that takes longer ends the epoch. */
  readonly stepTimeoutMs: number;
  readonly heartbeatMs: number;
  /** What workers have to present; null accepts any worker that reaches the link's socket. */
  readonly token: string | null;
  readonly log: Logger;
  readonly vocabSize: number;
  readonly numLayers: number;
  /** A worker has said who it is and was accepted. */
  readonly onAttached: (rank: number) => void;
  /** The rank has been told to leave: its process should end soon. `isCulprit`: it is what ended the epoch. */
  readonly onDismissed: (rank: number, isCulprit: boolean) => void;
  /** For whoever watches the server. */
  readonly onEvent?: (severity: 'info' | 'warning' | 'error', message: string) => void;
}

/** A rank that says nothing for so many heartbeats is taken for dead, whether a step is under way or not. */
const MISSED_HEARTBEATS = 10;

export interface RankSnapshot {
  readonly rank: number;
  readonly state: 'absent' | 'loading' | 'ready';
  readonly pid: number;
  readonly device: string;
  readonly isa: string;
  readonly memory: { readonly weightBytes: number; readonly kvBytes: number; readonly workspaceBytes: number; readonly rssBytes: number };
  /** While the state is `loading`; `totalBytes` is 0 until it is known. */
  readonly loading: { readonly doneBytes: number; readonly totalBytes: number };
  readonly heartbeatAgeMs: number;
}

interface Rank {
  readonly link: Link;
  readonly hello: Hello__Output;
  ready: boolean;
  memory: Memory__Output | null;
  loading: LoadProgress__Output | null;
  lastSeenMs: number;
}

interface StepUnderWay {
  readonly stepId: number;
  readonly results: (StepResult__Output | null)[];
  readonly wants: EngineStep;
  readonly encodeMs: number;
  readonly resolve: (result: EngineStepResult) => void;
  readonly reject: (error: Error) => void;
}

/** The one that runs, and one behind it. */
const MOST_STEPS_UNDER_WAY = 2;

/**
 * The engine over all ranks of one model replica. Workers dial in; when all ranks are there an epoch begins: each gets its
 * assignment, loads, and says Ready. A rank that is lost, reports an error or lets a step time out ends the epoch: the
 * others are told to leave, and the next epoch begins when all ranks have dialled in again.
 */
export class WorkerGroup implements Engine {
  private readonly ranks: (Rank | null)[];
  private epochNumber = 0;
  /** An epoch is under way from the assignment on. */
  private assigned = false;
  private kvBlocks = 0;
  private lastEnd = '';
  private readonly watch: NodeJS.Timeout;
  private nextStepId = 1;
  /** Oldest first. */
  private readonly underWay: StepUnderWay[] = [];
  /** Of the oldest step under way. */
  private stepTimer: NodeJS.Timeout | null = null;
  private failure: Error | null = null;
  private waiters: { resolve: () => void; reject: (error: Error) => void }[] = [];
  /** Rejects when no further epoch will begin. */
  readonly failed: Promise<never>;
  private rejectFailed!: (error: Error) => void;

  constructor(private readonly options: WorkerGroupOptions) {
    this.ranks = Array.from({ length: options.worldSize }, () => null);
    this.failed = new Promise((_, reject) => (this.rejectFailed = reject));
    this.failed.catch(() => {}); // whoever wants to know looks at it
    this.watch = setInterval(() => this.checkHeartbeats(), options.heartbeatMs).unref();
  }

  get capacity(): EngineCapacity {
    const { kvBlockSize, maxBatchTokens, numLayers } = this.options;
    return { kvBlocks: this.kvBlocks, blockSize: kvBlockSize, maxBatchTokens, numLayers };
  }

  get epoch(): number {
    return this.epochNumber;
  }

  get isReady(): boolean {
    return this.assigned && this.ranks.every((rank) => rank?.ready);
  }

  get failureReason(): string | null {
    return this.failure?.message ?? null;
  }

  snapshot(): RankSnapshot[] {
    return this.ranks.map((rank, index) => ({
      rank: index,
      state: rank === null ? 'absent' : rank.ready ? 'ready' : 'loading',
      pid: rank?.hello.pid ?? 0,
      device: rank ? describeDevice(rank.hello) : '',
      isa: rank?.hello.isa ?? '',
      memory: {
        weightBytes: Number(rank?.memory?.weightBytes ?? 0),
        kvBytes: Number(rank?.memory?.kvBytes ?? 0),
        workspaceBytes: Number(rank?.memory?.workspaceBytes ?? 0),
        rssBytes: Number(rank?.memory?.rssBytes ?? 0),
      },
      loading: { doneBytes: Number(rank?.loading?.doneBytes ?? 0), totalBytes: Number(rank?.loading?.totalBytes ?? 0) },
      heartbeatAgeMs: rank ? Date.now() - rank.lastSeenMs : 0,
    }));
  }

  ready(): Promise<void> {
    if (this.failure) return Promise.reject(this.failure);
    if (this.isReady) return Promise.resolve();
    return new Promise((resolve, reject) => this.waiters.push({ resolve, reject }));
  }

  step(step: EngineStep): Promise<EngineStepResult> {
    if (this.failure) return Promise.reject(this.failure);
    if (!this.isReady) return Promise.reject(new EpochEndedError('the group is not complete'));
    if (this.underWay.length === MOST_STEPS_UNDER_WAY) throw new Error(`${MOST_STEPS_UNDER_WAY} steps are under way`);
    const startMs = performance.now();
    const stepId = this.nextStepId++;
    const message: CoordinatorMessage = { step: encodeStep(stepId, step) };
    return new Promise((resolve, reject) => {
      const encodeMs = performance.now() - startMs;
      this.underWay.push({ stepId, results: this.ranks.map(() => null), wants: step, encodeMs, resolve, reject });
      if (this.underWay.length === 1) this.watchOldestStep();
      for (const rank of this.ranks) rank!.link.write(message);
    });
  }

  /** Serves one worker's link until it ends. */
  attach(link: Link): void {
    let index: number | null = null;
    let isRefused = false;
    link.on('data', (message: WorkerMessage__Output) => {
      if (isRefused) return;
      if (index === null) {
        index = this.greet(link, message);
        isRefused = index === null;
      } else if (this.ranks[index]?.link === link) this.receive(index, message);
    });
    const gone = (how: string) => () => {
      if (index !== null && this.ranks[index]?.link === link) {
        this.ranks[index] = null;
        if (this.assigned) this.endEpoch(`rank ${index} ${how}`);
      }
      index = null;
    };
    link.on('end', () => {
      gone('left')();
      link.end();
    });
    link.on('cancelled', gone('was lost'));
    link.on('error', gone('was lost'));
  }

  /** No further epoch will begin: whoever waits gets a WorkerLostError with the reason and what ended the last epoch. */
  giveUp(reason: string): void {
    this.failWith(new WorkerLostError(this.lastEnd ? `${reason}; the last epoch ended because: ${this.lastEnd}` : reason));
  }

  async close(): Promise<void> {
    clearInterval(this.watch);
    for (const rank of this.ranks) rank?.link.write({ shutdown: {} });
    this.failWith(new NotReadyError('the server is shutting down'));
  }

  private failWith(error: Error): void {
    if (this.failure) return;
    this.failure = error;
    if (error instanceof WorkerLostError) this.options.onEvent?.('error', error.message);
    this.endEpoch(error.message);
    this.rejectFailed(error);
    for (const { reject } of this.waiters.splice(0)) reject(this.failure);
  }

  /** @returns the rank, or null where the worker is refused */
  private greet(link: Link, message: WorkerMessage__Output): number | null {
    const { hello } = message;
    const refusal = this.refusal(hello ?? null);
    if (!hello || refusal !== null) {
      this.options.log.error({ rank: hello?.rank, pid: hello?.pid }, `worker refused: ${refusal}`);
      this.options.onEvent?.('error', `a worker was refused: ${refusal}`);
      link.emit('error', Object.assign(new Error(refusal ?? ''), { code: 9, details: refusal }));
      return null;
    }
    this.ranks[hello.rank] = { link, hello, ready: false, memory: null, loading: null, lastSeenMs: Date.now() };
    this.options.log.info({ rank: hello.rank, pid: hello.pid, device: hello.device, isa: hello.isa }, 'worker attached');
    this.options.onAttached(hello.rank);
    if (this.ranks.every((rank) => rank !== null)) this.beginEpoch();
    return hello.rank;
  }

  private refusal(hello: Hello__Output | null): string | null {
    const { worldSize, token } = this.options;
    if (!hello) return 'the first message has to be Hello';
    if (token !== null && !sameToken(token, hello.token)) return 'wrong worker token';
    if (hello.version !== packageVersion) return `worker is version ${hello.version}, coordinator ${packageVersion}: run the same`;
    if (hello.rank >= worldSize) return `rank ${hello.rank} of world size ${worldSize}: ranks are 0 to ${worldSize - 1}`;
    const other = this.ranks.find((rank) => rank && isGpu(rank.hello) !== isGpu(hello));
    if (other)
      return `rank ${hello.rank} computes on ${hello.device}, rank ${other.hello.rank} on ${other.hello.device}: take GPUs for all or for none`;
    if (this.ranks[hello.rank]) return `rank ${hello.rank} is attached already (pid ${this.ranks[hello.rank]!.hello.pid})`;
    return null;
  }

  /** Of all ranks that are there. */
  get deviceKind(): 'cpu' | 'cuda' {
    return this.ranks.some((rank) => rank !== null && isGpu(rank.hello)) ? 'cuda' : 'cpu';
  }

  private beginEpoch(): void {
    const { options } = this;
    const memory = Math.min(...this.ranks.map((rank) => Number(rank!.hello.totalMemoryBytes)));
    if (this.kvBlocks === 0) {
      try {
        this.kvBlocks = options.kvBlocks(memory, this.deviceKind);
      } catch (error) {
        this.failWith(error as Error);
        return;
      }
    }
    this.epochNumber += 1;
    this.assigned = true;
    this.nextStepId = 1;
    const communicator = `${process.pid}-${this.epochNumber}-${randomBytes(6).toString('hex')}`;
    for (const rank of this.ranks) {
      rank!.link.write({
        assignment: {
          epoch: this.epochNumber,
          worldSize: options.worldSize,
          modelPath: options.modelPath,
          communicator,
          collectiveTimeoutMs: options.collectiveTimeoutMs,
          kvBlocks: this.kvBlocks,
          kvBlockSize: options.kvBlockSize,
          maxBatchTokens: options.maxBatchTokens,
          threads: options.threads,
          ...options.engine,
          heartbeatMs: options.heartbeatMs,
        },
      });
    }
  }

  private receive(index: number, message: WorkerMessage__Output): void {
    const rank = this.ranks[index]!;
    rank.lastSeenMs = Date.now();
    if (message.result) this.takeResult(index, message.result);
    else if (message.heartbeat) {
      rank.memory = message.heartbeat.memory ?? rank.memory;
      if (!rank.ready) rank.loading = message.heartbeat.loading;
    } else if (message.ready && message.ready.epoch === this.epochNumber) {
      rank.ready = true;
      rank.loading = null;
      rank.memory = message.ready.memory;
      this.options.log.info({ rank: index, epoch: this.epochNumber, loadMs: message.ready.loadMs }, 'shard loaded');
      if (this.isReady) {
        const { worldSize, onEvent } = this.options;
        onEvent?.(
          'info',
          `epoch ${this.epochNumber} is ready: ${worldSize === 1 ? 'the rank has' : `all ${worldSize} ranks have`} loaded the model`,
        );
        for (const { resolve } of this.waiters.splice(0)) resolve();
      }
    } else if (message.error) {
      const reason = `rank ${index}: ${message.error.message}`;
      // What a checkpoint or a flag makes impossible stays so, however often the workers are restarted.
      if (message.error.code === 'CHECKPOINT' || message.error.code === 'CONFIG') this.failWith(new WorkerLostError(reason));
      else this.endEpoch(reason, [index]);
    }
  }

  private checkHeartbeats(): void {
    if (!this.assigned) return;
    const limitMs = MISSED_HEARTBEATS * this.options.heartbeatMs;
    const silent = this.ranks.flatMap((rank, index) => (rank && Date.now() - rank.lastSeenMs > limitMs ? [index] : []));
    if (silent.length > 0) this.endEpoch(`no heartbeat from rank ${silent.join(', ')} for ${limitMs} ms`, silent);
  }

  private takeResult(index: number, result: StepResult__Output): void {
    const step = this.underWay.find(({ stepId }) => stepId === result.stepId);
    if (!step) return; // of an epoch that has ended
    step.results[index] = result;
    // A rank may be through with the second one before another is with the first.
    while (this.underWay[0]?.results.every((each) => each !== null)) this.finishOldestStep();
  }

  private finishOldestStep(): void {
    const step = this.underWay[0]!;
    const [first] = step.results;
    const startMs = performance.now();
    let results: ExtendResult[] = [];
    try {
      if (!first!.error) results = decodeResults(first!.body, step.wants.extends, this.options);
    } catch (error) {
      this.endEpoch(`rank 0: ${(error as Error).message}`, [0]);
      return;
    }
    this.underWay.shift();
    this.watchOldestStep();
    if (first!.error) {
      step.reject(new EngineError(first!.error));
      return;
    }
    step.resolve({
      results,
      ranks: step.results.map((each) => ({ computeMs: each!.computeMicros / 1000, collectiveMs: each!.collectiveMicros / 1000 })),
      evaluateMs: first!.evaluateMicros / 1000,
      codecMs: step.encodeMs + performance.now() - startMs,
    });
  }

  /** A step's time begins when the one before it has ended. */
  private watchOldestStep(): void {
    if (this.stepTimer) clearTimeout(this.stepTimer);
    const [oldest] = this.underWay;
    const { stepTimeoutMs } = this.options;
    const end = ({ stepId, results }: StepUnderWay): void => {
      const silent = results.flatMap((result, rank) => (result === null ? [rank] : []));
      this.endEpoch(`step ${stepId}: no result from rank ${silent.join(', ')} within ${stepTimeoutMs} ms`, silent);
    };
    this.stepTimer = oldest ? setTimeout(end, stepTimeoutMs, oldest) : null;
  }

  private endEpoch(reason: string, culprits: readonly number[] = []): void {
    if (this.assigned) this.lastEnd = reason;
    if (this.assigned && !(this.failure instanceof NotReadyError)) {
      this.options.log.warn({ epoch: this.epochNumber }, `epoch ended: ${reason}`);
      this.options.onEvent?.('warning', `epoch ${this.epochNumber} ended: ${reason}`);
    }
    this.assigned = false;
    this.ranks.forEach((rank, index) => {
      if (rank === null) return;
      rank.link.write({ abort: { epoch: this.epochNumber } });
      rank.link.end();
      this.ranks[index] = null;
      this.options.onDismissed(index, culprits.includes(index));
    });
    const lost = this.underWay.splice(0);
    this.watchOldestStep();
    for (const { reject } of lost) reject(this.failure ?? new EpochEndedError(reason));
  }
}

function sameToken(expected: string, given: string): boolean {
  const a = Buffer.from(expected);
  const b = Buffer.from(given);
  return a.length === b.length && timingSafeEqual(a, b);
}

function isGpu(hello: Hello__Output): boolean {
  return hello.device.startsWith('cuda');
}

function describeDevice({ device, deviceName }: Hello__Output): string {
  return deviceName === '' ? device : `${device} (${deviceName})`;
}
