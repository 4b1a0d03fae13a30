import { expect, test } from 'vitest';
import type { ActiveRequestSnapshot } from './loop-snapshot.js';
import { LOOP, REQUEST, statusSources, STEP } from './fixtures.js';
import { ServingStats } from './serving-stats.js';
import { statusSnapshot } from './snapshot.js';
import { Ops } from '../../common/services.js';

test('while the model loads there is a status, all zeros', () => {
  const absent = { rank: 0, state: 'absent', pid: 0, device: '', isa: '', heartbeatAgeMs: 0 } as const;
  const memory = { weightBytes: 0, kvBytes: 0, workspaceBytes: 0, rssBytes: 0 };
  const sources = statusSources({
    state: 'loading',
    reason: 'the workers load their shards',
    loop: null,
    epoch: 0,
    ranks: [{ ...absent, memory, loading: { doneBytes: 0, totalBytes: 0 } }],
  });
  const status = statusSnapshot(sources);
  expect(status).toMatchObject({
    schema: 'tandem.status/1',
    state: 'loading',
    reason: 'the workers load their shards',
    kv: { totalBlocks: 0, usedBlocks: 0 },
    requests: { running: 0, queued: 0 },
    latency: { interToken: { p99: 0, count: 0 } },
    active: [],
    workers: [{ rank: 0, state: 'absent' }],
  });
});

test('refusals are counted, whoever refuses', () => {
  const stats = new ServingStats(() => 0);
  stats.rejected();
  stats.rejected();
  expect(statusSnapshot(statusSources({ stats: stats.snapshot() })).requests).toMatchObject({ rejected: 2 });
});

test('rates, percentiles, the split of a step and the time of the ranks come from what the loop reported', () => {
  let nowMs = 0;
  const stats = new ServingStats(() => nowMs);
  for (; nowMs < 20_000; nowMs += 100) {
    stats.step(STEP);
    stats.interToken(50);
    if (nowMs % 1000 === 0) {
      stats.firstToken(500);
      stats.ended(REQUEST);
      stats.ended({ ...REQUEST, outcome: 'cancelled', errorCode: 'CANCELLED', timings: { ...REQUEST.timings, decodeMs: 900_000 } });
    }
  }
  const { rates, latency, step, workers } = statusSnapshot(statusSources({ stats: stats.snapshot() }));
  expect(rates!.generatedTokensPerSecond).toBeCloseTo(310, -1);
  expect(rates!.promptTokensPerSecond).toBeCloseTo(700, -2);
  expect(rates!.stepsPerSecond).toBeCloseTo(10, 0);
  expect(rates!.requestsPerSecond).toBeCloseTo(2, 0);
  expect(step).toEqual({
    ...{ total: 20, schedule: 1, wire: 2, compute: 10, allReduce: 4, sample: 2, emit: 1 },
    ...{ batchTokens: 100, batchExtends: 31 },
  });
  expect(latency!.interToken!.p50 / 50).toBeCloseTo(1, 1);
  expect(latency!.timeToFirstToken!.p90 / 500).toBeCloseTo(1, 1);
  expect(latency!.endToEnd!.p99 / 2000).toBeCloseTo(1, 1); // of those that finished
  expect(latency!.endToEnd!.count).toBe(20);
  expect(latency!.queue!.p50 / 100).toBeCloseTo(1, 1);
  expect(workers.map(({ computeSeconds }) => computeSeconds)).toEqual([expect.closeTo(2.8), expect.closeTo(3.2)]);
  expect(workers.map(({ collectiveSeconds }) => collectiveSeconds)).toEqual([expect.closeTo(0.8), expect.closeTo(1.2)]);
});

test('the 200 oldest requests are shown, oldest first', () => {
  const active = Array.from({ length: 300 }, (_, i): ActiveRequestSnapshot => ({
    ...{ requestId: `r${i}`, key: '', state: 'decode', promptTokens: 1, generatedTokens: 1, kvBlocks: 1, priority: 0 },
    ageMs: (i * 7919) % 300,
  }));
  const shown = statusSnapshot(statusSources({ loop: { ...LOOP, active } })).active;
  expect(shown.map(({ ageSeconds }) => Math.round(ageSeconds * 1000))).toEqual(Array.from({ length: 200 }, (_, i) => 299 - i));
});

test('a status survives the wire unchanged', () => {
  const stats = new ServingStats(() => 0);
  stats.step(STEP);
  const active: ActiveRequestSnapshot[] = [
    { requestId: '请求-1', key: '小组', state: 'preempted', promptTokens: 7, generatedTokens: 2, kvBlocks: 1, priority: -5, ageMs: 1500 },
  ];
  const status = statusSnapshot(statusSources({ stats: stats.snapshot(), loop: { ...LOOP, active } }));
  const { responseSerialize, responseDeserialize } = Ops.service.GetStatus;
  expect(responseDeserialize(responseSerialize(status))).toEqual(status);
});
