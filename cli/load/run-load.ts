import { setMaxListeners } from 'node:events';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { setTimeout as sleep } from 'node:timers/promises';
import { arrivalTimes, type Arrivals } from './arrivals.js';
import { createRandom } from './random.js';
import type { RequestRecord } from './summary.js';
import type { LoadTarget, SentRequest } from './target.js';
import { planRequest, type PlannedRequest, type WorkloadOptions } from './workload.js';

/** Closed: so many clients, each sends its next request when its last one has ended. Open: requests arrive, whatever the server does. */
export type Pace =
  { readonly kind: 'closed'; readonly concurrency: number } | { readonly kind: 'open'; readonly rate: number; readonly arrivals: Arrivals };

export interface LoadOptions {
  readonly target: LoadTarget;
  readonly workload: WorkloadOptions;
  readonly pace: Pace;
  /** Null: without end, as far as this goes. */
  readonly requests: number | null;
  /** No request is sent after it; those under way are waited for. Null: without end. */
  readonly durationMs: number | null;
  /** Requests before the measured ones, left out of everything. */
  readonly warmUp: number;
  /** Ends the load: what is under way is cancelled and left out. */
  readonly signal: AbortSignal;
  readonly onProgress?: (progress: LoadProgress) => void;
  /** The tokens of a request that has ended; empty where the protocol does not tell. */
  readonly onTokens?: (record: RequestRecord, request: PlannedRequest, tokens: readonly number[]) => void;
}

export interface LoadProgress {
  readonly isWarmUp: boolean;
  readonly sent: number;
  readonly ended: number;
  readonly failed: number;
  readonly elapsedMs: number;
}

export interface LoadResult {
  readonly records: readonly RequestRecord[];
  readonly isInterrupted: boolean;
  /** Requests that were under way when the load was interrupted. */
  readonly abandoned: number;
  /** Prompts that were cut to leave room for the output. */
  readonly cutPrompts: number;
  readonly client: ClientLoad;
}

/** How busy this process itself was; a saturated one measures itself. */
export interface ClientLoad {
  /** Share of the time in which the event loop was not idle. */
  readonly eventLoopUtilization: number;
  readonly eventLoopDelayMs: { readonly p50: number; readonly p99: number; readonly max: number };
  readonly isSaturated: boolean;
}

const DELAY_RESOLUTION_MS = 10;
/** Above one of these, what is measured is this process rather than the server. */
const SATURATED_UTILIZATION = 0.9;
const SATURATED_DELAY_MS = 50;
const PROGRESS_MS = 250;
/** Requests of the warm-up at once, in an open loop. */
const WARM_UP_CONCURRENCY = 8;

export async function runLoad(options: LoadOptions): Promise<LoadResult> {
  const { pace, signal } = options;
  setMaxListeners(0, signal); // every request under way listens
  const { onTokens: _, ...unobserved } = options;
  const lanes = pace.kind === 'closed' ? pace.concurrency : WARM_UP_CONCURRENCY;
  await new Sender(unobserved, true, 0).closed(lanes, options.warmUp, null);

  const delay = monitorEventLoopDelay({ resolution: DELAY_RESOLUTION_MS });
  delay.enable();
  const utilization = performance.eventLoopUtilization();
  const sender = new Sender(options, false, options.warmUp);
  const requests = options.requests ?? Infinity;
  if (pace.kind === 'closed') await sender.closed(pace.concurrency, requests, options.durationMs);
  else await sender.open(pace.rate, pace.arrivals, requests, options.durationMs);
  delay.disable();
  return {
    records: sender.records,
    isInterrupted: signal.aborted,
    abandoned: sender.abandoned,
    cutPrompts: sender.cutPrompts,
    client: clientLoad(performance.eventLoopUtilization(utilization).utilization, delay),
  };
}

class Sender {
  readonly records: RequestRecord[] = [];
  abandoned = 0;
  cutPrompts = 0;
  private sent = 0;
  private failed = 0;
  private readonly startMs = performance.now();

  constructor(
    private readonly options: LoadOptions,
    private readonly isWarmUp: boolean,
    /** Of its first request. */
    private readonly firstIndex: number,
  ) {}

  closed(concurrency: number, requests: number, durationMs: number | null): Promise<void> {
    const endMs = this.startMs + (durationMs ?? Infinity);
    const lane = async (): Promise<void> => {
      while (this.sent < requests && performance.now() < endMs && !this.options.signal.aborted) await this.send(performance.now());
    };
    return this.reporting(async () => void (await Promise.all(Array.from({ length: Math.min(concurrency, requests) }, lane))));
  }

  open(rate: number, arrivals: Arrivals, requests: number, durationMs: number | null): Promise<void> {
    return this.reporting(async () => {
      const underWay = new Set<Promise<void>>();
      for (const atMs of arrivalTimes(arrivals, rate, createRandom(this.options.workload.seed, ARRIVALS_SEED))) {
        if (this.sent >= requests || (durationMs !== null && atMs > durationMs)) break;
        await until(this.startMs + atMs, this.options.signal);
        if (this.options.signal.aborted) break;
        const ended = this.send(this.startMs + atMs).finally(() => underWay.delete(ended));
        underWay.add(ended);
      }
      await Promise.all(underWay);
    });
  }

  private async reporting(work: () => Promise<void>): Promise<void> {
    const report = (): void =>
      this.options.onProgress?.({
        isWarmUp: this.isWarmUp,
        sent: this.sent,
        ended: this.records.length,
        failed: this.failed,
        elapsedMs: performance.now() - this.startMs,
      });
    const timer = setInterval(report, PROGRESS_MS);
    try {
      await work();
    } finally {
      clearInterval(timer);
      report();
    }
  }

  private async send(intendedMs: number): Promise<void> {
    const { target, workload, signal, onTokens } = this.options;
    const request = planRequest(this.firstIndex + this.sent++, workload);
    if (request.isCut) this.cutPrompts += 1;
    const tokenTimesMs: number[] = [];
    const tokens: number[] = [];
    let received = 0;
    const sentMs = performance.now();
    const sent: SentRequest = target.send(request, (count, ids) => {
      tokenTimesMs.push(performance.now());
      received += count;
      if (onTokens) tokens.push(...ids);
      if (request.cancelAfter !== null && received >= request.cancelAfter) sent.cancel();
    });
    const abandon = (): void => sent.cancel();
    signal.addEventListener('abort', abandon);
    if (signal.aborted) abandon();
    const ending = await sent.ended;
    signal.removeEventListener('abort', abandon);
    if (signal.aborted && ending.kind === 'cancelled') {
      this.abandoned += 1;
      return;
    }
    if (ending.kind === 'failed') this.failed += 1;
    const isFinished = ending.kind === 'finished';
    const record: RequestRecord = {
      index: request.index,
      outcome: ending.kind,
      error: ending.kind === 'failed' ? { code: ending.code, message: ending.message } : null,
      intendedMs,
      sentMs,
      tokenTimesMs,
      endMs: performance.now(),
      promptTokens: isFinished ? ending.promptTokens : 0,
      outputTokens: isFinished ? ending.outputTokens : received,
      cachedPromptTokens: isFinished ? ending.cachedPromptTokens : 0,
      serverQueueMs: isFinished ? ending.serverQueueMs : null,
    };
    this.records.push(record);
    onTokens?.(record, request, tokens);
  }
}

/** Apart from the seeds of requests. */
const ARRIVALS_SEED = 2 ** 42;

/** To a fraction of a millisecond, which timers do not give; the event loop goes on meanwhile. Returns at once when the signal is aborted. */
async function until(atMs: number, signal: AbortSignal): Promise<void> {
  const restMs = Math.floor(atMs - performance.now());
  if (restMs >= 1) await sleep(restMs, null, { signal }).catch(() => {});
  while (performance.now() < atMs && !signal.aborted) await new Promise((resolve) => setImmediate(resolve));
}

function clientLoad(eventLoopUtilization: number, delay: { percentile(percentile: number): number; readonly max: number }): ClientLoad {
  const beyondTimer = (nanoseconds: number): number => Math.max(0, nanoseconds / 1e6 - DELAY_RESOLUTION_MS);
  const eventLoopDelayMs = { p50: beyondTimer(delay.percentile(50)), p99: beyondTimer(delay.percentile(99)), max: beyondTimer(delay.max) };
  return {
    eventLoopUtilization,
    eventLoopDelayMs,
    isSaturated: eventLoopUtilization > SATURATED_UTILIZATION || eventLoopDelayMs.p99 > SATURATED_DELAY_MS,
  };
}
