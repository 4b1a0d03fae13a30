import fc from 'fast-check';
import { expect, test } from 'vitest';
import { percentiles, summarize, type RequestRecord } from './summary.js';

function record(changes: Partial<RequestRecord>): RequestRecord {
  return {
    index: 0,
    outcome: 'finished',
    error: null,
    intendedMs: 0,
    sentMs: 0,
    tokenTimesMs: [],
    endMs: 0,
    promptTokens: 10,
    outputTokens: 0,
    cachedPromptTokens: 0,
    serverQueueMs: null,
    ...changes,
  };
}

test('percentiles are values that were recorded, by nearest rank', () => {
  const values = Array.from({ length: 100 }, (_, i) => 100 - i);
  expect(percentiles(values)).toEqual({ count: 100, mean: 50.5, p50: 50, p90: 90, p95: 95, p99: 99, max: 100 });
  expect(percentiles([3])).toEqual({ count: 1, mean: 3, p50: 3, p90: 3, p95: 3, p99: 3, max: 3 });
  expect(percentiles([1, 2])).toMatchObject({ p50: 1, p90: 2 });
  expect(percentiles([])).toBeNull();
});

test('at most the share of a percentile lies below it, and at least that share does not exceed it', () => {
  fc.assert(
    fc.property(fc.array(fc.double({ noNaN: true, noDefaultInfinity: true }), { minLength: 1 }), (values) => {
      const found = percentiles(values)!;
      for (const [share, value] of [[0.5, found.p50] as const, [0.9, found.p90] as const, [0.99, found.p99] as const]) {
        expect(values.filter((each) => each <= value).length).toBeGreaterThanOrEqual(Math.ceil(share * values.length));
        expect(values.filter((each) => each < value).length).toBeLessThan(Math.ceil(share * values.length));
      }
    }),
  );
});

test('latencies count from the intended arrival, not from when the client came to send', () => {
  const late = record({ intendedMs: 100, sentMs: 180, tokenTimesMs: [200, 210, 240], endMs: 250, outputTokens: 3 });
  const { latencyMs, sendDelayMs, durationMs } = summarize([late], null);
  expect(latencyMs.ttft!.p50).toBe(100);
  expect(latencyMs.e2e!.p50).toBe(150);
  expect(latencyMs.tpot!.p50).toBe(20);
  expect([latencyMs.interToken!.p50, latencyMs.interToken!.max]).toEqual([10, 30]);
  expect(sendDelayMs!.max).toBe(80);
  expect(durationMs).toBe(150);
});

test('a message of several tokens counts as all of them in the time per token, and once in the gaps', () => {
  const { latencyMs } = summarize([record({ tokenTimesMs: [10, 50], endMs: 50, outputTokens: 5 })], null);
  expect(latencyMs.tpot!.p50).toBe(10);
  expect(latencyMs.interToken).toMatchObject({ count: 1, p50: 40 });
});

test('tokens that came before a client left count for the throughput, its latencies for nothing', () => {
  const records = [
    record({ tokenTimesMs: [10, 1000], endMs: 1000, outputTokens: 2 }),
    record({ outcome: 'cancelled', tokenTimesMs: [500], endMs: 500, outputTokens: 1, promptTokens: 0 }),
  ];
  const { requests, latencyMs, throughput, tokens } = summarize(records, null);
  expect(requests).toEqual({ sent: 2, finished: 1, failed: 0, cancelled: 1 });
  expect(latencyMs.ttft!.count).toBe(1);
  expect(throughput).toEqual({ requestsPerSecond: 1, outputTokensPerSecond: 3, totalTokensPerSecond: 13 });
  expect(tokens).toEqual({ prompt: 10, cachedPrompt: 0, output: 3 });
});

test('errors are counted by code, the most frequent first', () => {
  const failed = (code: string, message: string): RequestRecord => record({ outcome: 'failed', error: { code, message } });
  const { errors } = summarize([failed('A', 'one'), failed('B', 'two'), failed('B', 'three')], null);
  expect(errors).toEqual([
    { code: 'B', count: 2, example: 'two' },
    { code: 'A', count: 1, example: 'one' },
  ]);
});

test('goodput takes every objective, failed requests miss it and cancelled ones do not count', () => {
  const fast = record({ tokenTimesMs: [10, 20], endMs: 1000, outputTokens: 2 });
  const records = [
    fast,
    record({ tokenTimesMs: [300, 310], endMs: 310, outputTokens: 2 }), // late
    record({ tokenTimesMs: [10, 200], endMs: 200, outputTokens: 2 }), // slow
    record({ tokenTimesMs: [5], endMs: 5, outputTokens: 1 }), // too short to be slow
    record({ outcome: 'failed', error: { code: 'X', message: '' } }),
    record({ outcome: 'cancelled', tokenTimesMs: [900], endMs: 900 }),
  ];
  const { goodput } = summarize(records, { ttftMs: 200, tpotMs: 50, e2eMs: null });
  expect(goodput).toMatchObject({ good: 2, share: 0.4, requestsPerSecond: 2 });
  expect(summarize(records, { ttftMs: null, tpotMs: null, e2eMs: 300 }).goodput).toMatchObject({ good: 2 });
});

test('nothing recorded gives no figure, and no NaN', () => {
  const summary = summarize([], { ttftMs: 1, tpotMs: null, e2eMs: null });
  expect(summary.latencyMs).toEqual({ ttft: null, tpot: null, interToken: null, e2e: null, serverQueue: null });
  expect(JSON.stringify(summary)).not.toMatch(/null,"outputTokensPerSecond"/);
  expect(summary.throughput.requestsPerSecond).toBe(0);
  expect(summary.goodput).toMatchObject({ share: 0, requestsPerSecond: 0 });
});
