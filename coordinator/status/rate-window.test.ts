import fc from 'fast-check';
import { expect, test } from 'vitest';
import { RateWindow } from './rate-window.js';

test('a steady flow has its rate, from the first second on', () => {
  const window = new RateWindow(['tokens', 'steps'], 0);
  for (let nowMs = 0; nowMs < 30_000; nowMs += 10) {
    window.add({ tokens: 3, steps: 1 }, nowMs);
    if (nowMs < 1000) continue;
    const { sums, seconds } = window.read(nowMs);
    expect(sums.tokens / seconds).toBeGreaterThan(290);
    expect(sums.tokens / seconds).toBeLessThan(310);
    expect(sums.tokens).toBe(3 * sums.steps);
  }
});

test('a young server divides by one second at least, an idle one comes to zero', () => {
  const window = new RateWindow(['tokens'], 1_000_000);
  window.add({ tokens: 7 }, 1_000_010);
  expect(window.read(1_000_010)).toEqual({ sums: { tokens: 7 }, seconds: 1 });
  expect(window.read(1_005_000).sums.tokens).toBe(7);
  expect(window.read(1_011_000).sums.tokens).toBe(0);
});

test('the sums are of what was added within 10 s, to the slot', () => {
  const event = fc.record({ afterMs: fc.integer({ min: 0, max: 4_000 }), amount: fc.integer({ min: 0, max: 100 }) });
  fc.assert(
    fc.property(fc.array(event, { maxLength: 60 }), (events) => {
      const window = new RateWindow(['tokens'], 0);
      let nowMs = 0;
      const added = events.map(({ afterMs, amount }) => {
        nowMs += afterMs;
        window.add({ tokens: amount }, nowMs);
        return { atMs: nowMs, amount };
      });
      const since = (ms: number): number => added.filter(({ atMs }) => atMs > nowMs - ms).reduce((sum, { amount }) => sum + amount, 0);
      const { tokens } = window.read(nowMs).sums;
      expect(tokens).toBeGreaterThanOrEqual(since(10_000));
      expect(tokens).toBeLessThanOrEqual(since(10_501));
    }),
  );
});
