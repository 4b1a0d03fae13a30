import { expect, test } from 'vitest';
import { createRandom } from './random.js';

/** Enough that the bounds below are wide; the seeds are fixed, so the tests give the same every time. */
const DRAWS = 50_000;

function moments(draw: () => number): { mean: number; variance: number } {
  const values = Array.from({ length: DRAWS }, draw);
  const mean = values.reduce((sum, value) => sum + value, 0) / DRAWS;
  return { mean, variance: values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / DRAWS };
}

test('the same seeds give the same numbers, and any other seed gives others', () => {
  const draw = (...seeds: number[]): number[] => {
    const random = createRandom(...seeds);
    return Array.from({ length: 5 }, () => random.uniform());
  };
  expect(draw(1, 2)).toEqual(draw(1, 2));
  const rows = [draw(1), draw(2), draw(1, 1), draw(1, 2), draw(2, 1), draw(1, 2 ** 40), draw(1, 2 ** 41)].map(String);
  expect(new Set(rows).size).toBe(rows.length);
});

test('uniform numbers have mean 1/2 and variance 1/12, whole ones reach both ends', () => {
  const { mean, variance } = moments(createRandom(7).uniform);
  expect(mean).toBeCloseTo(0.5, 2);
  expect(variance).toBeCloseTo(1 / 12, 2);
  const random = createRandom(8);
  const values = Array.from({ length: 1000 }, () => random.integer(3, 5));
  expect([...new Set(values)].sort()).toEqual([3, 4, 5]);
});

test('normal numbers have mean 0 and variance 1', () => {
  const { mean, variance } = moments(createRandom(9).normal);
  expect(mean).toBeCloseTo(0, 1);
  expect(variance).toBeCloseTo(1, 1);
});

test.each([0.25, 1, 4])('gamma numbers of shape %d have that mean and variance', (shape) => {
  const random = createRandom(10, shape * 100);
  const { mean, variance } = moments(() => random.gamma(shape));
  expect(mean / shape).toBeCloseTo(1, 1);
  expect(variance / shape).toBeCloseTo(1, 1);
});
