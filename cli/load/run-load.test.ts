import { setTimeout as sleep } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { runLoad, type LoadOptions } from './run-load.js';
import type { Ending, LoadTarget } from './target.js';

/** Answers two messages of one token, then ends; `answered` is told of each request when it is sent. */
class FakeTarget implements LoadTarget {
  running = 0;
  mostRunning = 0;
  readonly sent: number[] = [];

  constructor(private readonly answer: (index: number) => Promise<void> = async () => {}) {}

  send: LoadTarget['send'] = (request, onTokens) => {
    this.sent.push(request.index);
    this.mostRunning = Math.max(this.mostRunning, ++this.running);
    let leave!: (ending: Ending) => void;
    const left = new Promise<Ending>((resolve) => (leave = resolve));
    const finished = this.answer(request.index).then((): Ending => {
      onTokens(1, [7]);
      onTokens(1, [8]);
      return { kind: 'finished', promptTokens: 3, outputTokens: 2, cachedPromptTokens: 0, serverQueueMs: null };
    });
    const ended = Promise.race([left, finished]).finally(() => this.running--);
    return { ended, cancel: () => leave({ kind: 'cancelled' }) };
  };

  close(): void {}
}

function options(target: LoadTarget, changes: Partial<LoadOptions>): LoadOptions {
  const length = { kind: 'constant', value: 2 } as const;
  const prompts = { kind: 'texts', texts: ['a'] } as const;
  return {
    target,
    workload: { seed: 1, prompts, outputTokens: length, cancelFraction: 0, keys: [] },
    pace: { kind: 'closed', concurrency: 3 },
    requests: 10,
    durationMs: null,
    warmUp: 0,
    signal: new AbortController().signal,
    ...changes,
  };
}

test('a closed loop keeps so many requests under way and sends each once', async () => {
  const target = new FakeTarget(() => sleep(2));
  const { records } = await runLoad(options(target, {}));
  expect(target.mostRunning).toBe(3);
  expect(target.sent).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
  expect(records.map(({ outcome, outputTokens }) => [outcome, outputTokens])).toEqual(Array.from({ length: 10 }, () => ['finished', 2]));
});

test('an open loop goes on sending while nothing is answered, and counts from when requests should have arrived', async () => {
  let answerAll!: () => void;
  const answered = new Promise<void>((resolve) => (answerAll = resolve));
  const target = new FakeTarget((index) => {
    if (index === 9) answerAll();
    return answered;
  });
  const { records } = await runLoad(options(target, { pace: { kind: 'open', rate: 500, arrivals: { kind: 'constant' } } }));
  expect(target.mostRunning).toBe(10);
  const byIndex = records.toSorted((a, b) => a.index - b.index);
  byIndex.forEach(({ intendedMs, sentMs }, i) => {
    expect(intendedMs - byIndex[0]!.intendedMs).toBeCloseTo(2 * i, 6);
    expect(sentMs).toBeGreaterThanOrEqual(intendedMs);
  });
});

test('warm-up requests are sent before and left out', async () => {
  const target = new FakeTarget();
  const { records } = await runLoad(options(target, { warmUp: 4 }));
  expect(target.sent).toHaveLength(14);
  expect(records.map(({ index }) => index).sort((a, b) => a - b)).toEqual([4, 5, 6, 7, 8, 9, 10, 11, 12, 13]);
});

test('a load without a number of requests ends after its time', async () => {
  const target = new FakeTarget(() => sleep(1));
  const { records } = await runLoad(options(target, { requests: null, durationMs: 30 }));
  expect(records.length).toBeGreaterThan(0);
  expect(target.running).toBe(0);
});

test('an interrupted load keeps what has ended and cancels the rest', async () => {
  const interrupt = new AbortController();
  const target = new FakeTarget(async (index) => {
    if (index === 5) interrupt.abort();
    if (index >= 3) await new Promise(() => {});
  });
  const result = await runLoad(options(target, { signal: interrupt.signal, requests: null }));
  expect(result.isInterrupted).toBe(true);
  expect(result.records.map(({ index }) => index)).toEqual([0, 1, 2]);
  expect(result.abandoned).toBe(3);
  expect(target.running).toBe(0);
});

test('an interrupted open loop does not wait for the next arrival', async () => {
  const interrupt = new AbortController();
  const target = new FakeTarget(async () => interrupt.abort());
  const pace = { kind: 'open', rate: 0.001, arrivals: { kind: 'constant' } } as const;
  const { isInterrupted } = await runLoad(options(target, { signal: interrupt.signal, pace }));
  expect(isInterrupted).toBe(true);
});

test('clients that leave are recorded as such, with the tokens that they got', async () => {
  const target = new FakeTarget(() => sleep(1));
  const defaults = options(target, {});
  const workload = { ...defaults.workload, cancelFraction: 1 };
  const tokens: (readonly number[])[] = [];
  const { records } = await runLoad({ ...defaults, workload, requests: 2, onTokens: (_record, _request, ids) => tokens.push(ids) });
  expect(records.map(({ outcome }) => outcome)).toEqual(['cancelled', 'cancelled']);
  expect(records[0]!.outputTokens).toBeGreaterThanOrEqual(1);
  expect(tokens[0]![0]).toBe(7);
});
