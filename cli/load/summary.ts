/** From what was recorded of each request to the figures of the report. Pure. */
import type { Slo } from './slo.js';

/** One request; times are milliseconds of one clock. */
export interface RequestRecord {
  readonly index: number;
  /** `cancelled`: this client left it in mid-stream, as it was told to. */
  readonly outcome: 'finished' | 'cancelled' | 'failed';
  /** Of a failed one. */
  readonly error: { readonly code: string; readonly message: string } | null;
  /** When it should have been sent; latencies count from here. */
  readonly intendedMs: number;
  readonly sentMs: number;
  /** When messages with tokens came, in order. */
  readonly tokenTimesMs: readonly number[];
  readonly endMs: number;
  readonly promptTokens: number;
  readonly outputTokens: number;
  /** Of its prompt, found in the server's context cache. */
  readonly cachedPromptTokens: number;
  /** From arrival to its first step, as the server says; null where it does not. */
  readonly serverQueueMs: number | null;
}

export interface Percentiles {
  readonly count: number;
  readonly mean: number;
  readonly p50: number;
  readonly p90: number;
  readonly p95: number;
  readonly p99: number;
  readonly max: number;
}

export interface LoadSummary {
  readonly requests: { readonly sent: number; readonly finished: number; readonly failed: number; readonly cancelled: number };
  /** From the first intended arrival to the last end. */
  readonly durationMs: number;
  /** Null: nothing to measure. Of finished requests. */
  readonly latencyMs: {
    readonly ttft: Percentiles | null;
    readonly tpot: Percentiles | null;
    readonly interToken: Percentiles | null;
    readonly e2e: Percentiles | null;
    readonly serverQueue: Percentiles | null;
  };
  readonly tokens: { readonly prompt: number; readonly cachedPrompt: number; readonly output: number };
  readonly throughput: {
    readonly requestsPerSecond: number;
    readonly outputTokensPerSecond: number;
    readonly totalTokensPerSecond: number;
  };
  readonly errors: readonly { readonly code: string; readonly count: number; readonly example: string }[];
  /** Null without an SLO. Failed requests miss it; cancelled ones do not count. */
  readonly goodput: { readonly slo: Slo; readonly good: number; readonly share: number; readonly requestsPerSecond: number } | null;
  /** How late this client sent. */
  readonly sendDelayMs: Percentiles | null;
}

export function summarize(records: readonly RequestRecord[], slo: Slo | null): LoadSummary {
  const finished = records.filter(({ outcome }) => outcome === 'finished');
  const durationMs = records.length === 0 ? 0 : largest(records, ({ endMs }) => endMs) + largest(records, ({ intendedMs }) => -intendedMs);
  const perSecond = (count: number): number => (durationMs > 0 ? (count * 1000) / durationMs : 0);
  const prompt = sum(finished, ({ promptTokens }) => promptTokens);
  const output = sum(records, ({ outputTokens }) => outputTokens);
  return {
    requests: {
      sent: records.length,
      finished: finished.length,
      failed: records.filter(({ outcome }) => outcome === 'failed').length,
      cancelled: records.filter(({ outcome }) => outcome === 'cancelled').length,
    },
    durationMs,
    latencyMs: {
      ttft: percentiles(finished.flatMap((record) => ttftMs(record) ?? [])),
      tpot: percentiles(finished.flatMap((record) => tpotMs(record) ?? [])),
      interToken: percentiles(finished.flatMap(gapsMs)),
      e2e: percentiles(finished.map(e2eMs)),
      serverQueue: percentiles(finished.flatMap(({ serverQueueMs }) => serverQueueMs ?? [])),
    },
    tokens: { prompt, cachedPrompt: sum(finished, ({ cachedPromptTokens }) => cachedPromptTokens), output },
    throughput: {
      requestsPerSecond: perSecond(finished.length),
      outputTokensPerSecond: perSecond(output),
      totalTokensPerSecond: perSecond(prompt + output),
    },
    errors: countErrors(records),
    goodput: slo && goodput(records, slo, perSecond),
    sendDelayMs: percentiles(records.map(({ sentMs, intendedMs }) => sentMs - intendedMs)),
  };
}

/** Exact, by nearest rank: the smallest value that at least that share of all values does not exceed. Null of no values. */
export function percentiles(values: readonly number[]): Percentiles | null {
  if (values.length === 0) return null;
  const sorted = Float64Array.from(values).sort();
  const at = (share: number): number => sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)]!;
  return {
    count: sorted.length,
    mean: sorted.reduce((total, value) => total + value, 0) / sorted.length,
    p50: at(0.5),
    p90: at(0.9),
    p95: at(0.95),
    p99: at(0.99),
    max: sorted.at(-1)!,
  };
}

export function ttftMs({ tokenTimesMs, intendedMs }: RequestRecord): number | null {
  return tokenTimesMs.length === 0 ? null : tokenTimesMs[0]! - intendedMs;
}

/** Time per output token after the first; null where all tokens came at once. */
export function tpotMs({ tokenTimesMs, outputTokens }: RequestRecord): number | null {
  if (tokenTimesMs.length < 2 || outputTokens < 2) return null;
  return (tokenTimesMs.at(-1)! - tokenTimesMs[0]!) / (outputTokens - 1);
}

export function e2eMs({ endMs, intendedMs }: RequestRecord): number {
  return endMs - intendedMs;
}

/** Between one message with tokens and the next. */
function gapsMs({ tokenTimesMs }: RequestRecord): number[] {
  return tokenTimesMs.slice(1).map((ms, i) => ms - tokenTimesMs[i]!);
}

function goodput(records: readonly RequestRecord[], slo: Slo, perSecond: (count: number) => number): LoadSummary['goodput'] {
  const counted = records.filter(({ outcome }) => outcome !== 'cancelled');
  const good = counted.filter((record) => record.outcome === 'finished' && keeps(record, slo)).length;
  return { slo, good, share: counted.length === 0 ? 0 : good / counted.length, requestsPerSecond: perSecond(good) };
}

/** A request of one token keeps any time per output token; one without tokens has no time to the first. */
function keeps(record: RequestRecord, slo: Slo): boolean {
  const isWithin = (ms: number | null, limitMs: number | null): boolean => limitMs === null || ms === null || ms <= limitMs;
  return isWithin(ttftMs(record), slo.ttftMs) && isWithin(tpotMs(record), slo.tpotMs) && isWithin(e2eMs(record), slo.e2eMs);
}

/** The most frequent first. */
function countErrors(records: readonly RequestRecord[]): LoadSummary['errors'] {
  const byCode = new Map<string, { count: number; example: string }>();
  for (const { error } of records) {
    if (error === null) continue;
    const entry = byCode.get(error.code);
    if (entry) entry.count += 1;
    else byCode.set(error.code, { count: 1, example: error.message });
  }
  return [...byCode].map(([code, entry]) => ({ code, ...entry })).sort((a, b) => b.count - a.count);
}

function sum<T>(items: readonly T[], of: (item: T) => number): number {
  return items.reduce((total, item) => total + of(item), 0);
}

function largest<T>(items: readonly T[], of: (item: T) => number): number {
  return items.reduce((most, item) => Math.max(most, of(item)), -Infinity);
}
