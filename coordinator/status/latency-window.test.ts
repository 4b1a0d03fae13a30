import fc from 'fast-check';
import { expect, test } from 'vitest';
import { LatencyWindow } from './latency-window.js';

const duration = fc.double({ min: 0.02, max: 3_000_000, noNaN: true });

test('percentiles are those of the sorted durations, within 2.5 %', () => {
  fc.assert(
    fc.property(fc.array(duration, { minLength: 1, maxLength: 300 }), (durations) => {
      const window = new LatencyWindow();
      durations.forEach((ms, i) => window.add(ms, i));
      const sorted = [...durations].sort((a, b) => a - b);
      const exact = (share: number): number => sorted[Math.ceil(share * sorted.length) - 1]!;
      const { p50, p90, p99, count } = window.percentiles(durations.length);
      expect(count).toBe(durations.length);
      for (const [seen, share] of [
        [p50, 0.5],
        [p90, 0.9],
        [p99, 0.99],
      ] as const) {
        expect(Math.abs(seen / exact(share) - 1)).toBeLessThan(0.025);
      }
    }),
  );
});

test('what is older than a minute no longer counts, what is younger does', () => {
  const window = new LatencyWindow();
  window.add(1000, 0);
  window.add(10, 30_000);
  expect(window.percentiles(59_999).count).toBe(2);
  expect(window.percentiles(66_000)).toMatchObject({ count: 1 });
  expect(window.percentiles(66_000).p99).toBeCloseTo(10, 0);
  expect(window.percentiles(600_000)).toEqual({ p50: 0, p90: 0, p99: 0, count: 0 });
});

test('a slot that comes round again begins empty', () => {
  const window = new LatencyWindow();
  window.add(5, 1_000);
  window.add(5, 66_000); // the same place of the ring
  expect(window.percentiles(66_000).count).toBe(1);
});

test('durations beyond the scale count at its ends', () => {
  const window = new LatencyWindow();
  for (const ms of [0, 1e-9, -1]) window.add(ms, 0);
  expect(window.percentiles(0)).toMatchObject({ count: 3 });
  expect(window.percentiles(0).p99).toBeLessThan(0.02);
  window.add(1e12, 0);
  expect(window.percentiles(0).p99).toBeGreaterThan(3_000_000);
});
