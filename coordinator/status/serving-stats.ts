import { LatencyWindow, type Percentiles } from './latency-window.js';
import type { LoopObserver, RequestStats, StepStats } from './observer.js';
import { RateWindow } from './rate-window.js';

/** What the status page shows of the loop beyond its counters. */
export interface ServingStatsSnapshot {
  /** Over the last 10 s. */
  readonly rates: {
    readonly generatedTokensPerSecond: number;
    /** Prompt tokens computed: those of cached contexts not, those of preempted requests again. */
    readonly promptTokensPerSecond: number;
    /** Requests that ended, however they ended. */
    readonly requestsPerSecond: number;
    readonly stepsPerSecond: number;
  };
  /** Over the last minute, milliseconds; end to end and queue are of finished requests. */
  readonly latency: Readonly<Record<'timeToFirstToken' | 'interToken' | 'endToEnd' | 'queue', Percentiles>>;
  /** Means of the steps of the last 10 s: milliseconds, tokens, Extends. */
  readonly step: Readonly<Record<StepPart | 'total' | 'batchTokens' | 'batchExtends', number>>;
  /** Of all steps, by rank. */
  readonly ranks: readonly RankSeconds[];
  /** Requests that were refused, whoever refused them. */
  readonly rejected: number;
}

export interface RankSeconds {
  /** Collectives included. */
  readonly computeSeconds: number;
  readonly collectiveSeconds: number;
}

export const STEP_PARTS = ['schedule', 'wire', 'compute', 'allReduce', 'sample', 'emit'] as const;
export type StepPart = (typeof STEP_PARTS)[number];

export function stepParts(step: StepStats): Record<StepPart, number> {
  return {
    schedule: step.scheduleMs,
    wire: step.wireMs,
    compute: step.computeMs,
    allReduce: step.allReduceMs,
    sample: step.sampleMs,
    emit: step.emitMs,
  };
}

const COUNTED = ['steps', 'generatedTokens', 'prefillTokens', 'decodeTokens', 'extends', 'requests', ...STEP_PARTS] as const;

export class ServingStats implements LoopObserver {
  private readonly firstTokenMs = new LatencyWindow();
  private readonly interTokenMs = new LatencyWindow();
  private readonly endToEndMs = new LatencyWindow();
  private readonly queueMs = new LatencyWindow();
  private readonly counted: RateWindow<(typeof COUNTED)[number]>;
  private readonly ranks: { computeSeconds: number; collectiveSeconds: number }[] = [];
  private rejections = 0;

  /** @param now a monotonic clock, milliseconds */
  constructor(private readonly now: () => number = () => performance.now()) {
    this.counted = new RateWindow(COUNTED, now());
  }

  step(step: StepStats): void {
    const { generatedTokens, prefillTokens, decodeTokens } = step;
    this.counted.add({ steps: 1, generatedTokens, prefillTokens, decodeTokens, extends: step.extends, ...stepParts(step) }, this.now());
    step.ranks.forEach(({ computeMs, collectiveMs }, rank) => {
      const total = (this.ranks[rank] ??= { computeSeconds: 0, collectiveSeconds: 0 });
      total.computeSeconds += computeMs / 1000;
      total.collectiveSeconds += collectiveMs / 1000;
    });
  }

  interToken(ms: number): void {
    this.interTokenMs.add(ms, this.now());
  }

  firstToken(ms: number): void {
    this.firstTokenMs.add(ms, this.now());
  }

  ended({ outcome, timings }: RequestStats): void {
    const nowMs = this.now();
    this.counted.add({ requests: 1 }, nowMs);
    if (outcome !== 'finished') return;
    this.endToEndMs.add(timings.queueMs + timings.prefillMs + timings.decodeMs, nowMs);
    this.queueMs.add(timings.queueMs, nowMs);
  }

  rejected(): void {
    this.rejections += 1;
  }

  preempted(): void {}

  snapshot(): ServingStatsSnapshot {
    const nowMs = this.now();
    const { sums, seconds } = this.counted.read(nowMs);
    const mean = (sum: number): number => (sums.steps === 0 ? 0 : sum / sums.steps);
    const parts = Object.fromEntries(STEP_PARTS.map((part) => [part, mean(sums[part])])) as Record<StepPart, number>;
    return {
      rates: {
        generatedTokensPerSecond: sums.generatedTokens / seconds,
        promptTokensPerSecond: sums.prefillTokens / seconds,
        requestsPerSecond: sums.requests / seconds,
        stepsPerSecond: sums.steps / seconds,
      },
      latency: {
        timeToFirstToken: this.firstTokenMs.percentiles(nowMs),
        interToken: this.interTokenMs.percentiles(nowMs),
        endToEnd: this.endToEndMs.percentiles(nowMs),
        queue: this.queueMs.percentiles(nowMs),
      },
      step: {
        total: STEP_PARTS.reduce((sum, part) => sum + parts[part], 0),
        ...parts,
        batchTokens: mean(sums.decodeTokens + sums.prefillTokens),
        batchExtends: mean(sums.extends),
      },
      ranks: this.ranks.map((rank) => ({ ...rank })),
      rejected: this.rejections,
    };
  }
}
