import { expect, test } from 'vitest';
import { arrivalTimes, parseArrivals } from './arrivals.js';
import { createRandom } from './random.js';

const ARRIVALS = 50_000;
const RATE = 20;
const MEAN_MS = 1000 / RATE;

function gaps(text: string): number[] {
  const times = arrivalTimes(parseArrivals(text), RATE, createRandom(3));
  const all = Array.from({ length: ARRIVALS + 1 }, () => times.next().value);
  expect(all[0]).toBe(0);
  return all.slice(1).map((ms, i) => ms - all[i]!);
}

test.each([
  { text: 'constant', squaredVariation: 0 },
  { text: 'poisson', squaredVariation: 1 },
  { text: 'gamma:1', squaredVariation: 1 },
  { text: 'gamma:0.25', squaredVariation: 4 },
  { text: 'gamma:4', squaredVariation: 0.25 },
])('$text arrivals keep the rate, with a squared variation of $squaredVariation', ({ text, squaredVariation }) => {
  const all = gaps(text);
  const mean = all.reduce((sum, gap) => sum + gap, 0) / ARRIVALS;
  const variance = all.reduce((sum, gap) => sum + (gap - mean) ** 2, 0) / ARRIVALS;
  expect(mean / MEAN_MS).toBeCloseTo(1, 1);
  expect(Math.abs(variance / MEAN_MS ** 2 - squaredVariation)).toBeLessThan(0.1 * Math.max(1, squaredVariation));
  expect(Math.min(...all)).toBeGreaterThanOrEqual(0);
});

test.each(['', 'gamma', 'gamma:0', 'gamma:-1', 'gamma:x', 'uniform', 'poisson:2'])('arrivals "%s" are refused', (text) => {
  expect(() => parseArrivals(text)).toThrow(/--arrivals .*allowed are/);
});
