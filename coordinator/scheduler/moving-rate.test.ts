import { expect, test } from 'vitest';
import { MovingRate } from './moving-rate.js';

test('is 0 before the first event', () => {
  const rate = new MovingRate(10_000);
  expect(rate.at(0)).toBe(0);
  expect(rate.at(5000)).toBe(0);
});

test('knows a steady rate from the beginning', () => {
  const rate = new MovingRate(10_000);
  for (let ms = 100; ms <= 2000; ms += 100) rate.count(ms);
  expect(rate.at(2000)).toBeGreaterThan(0.009);
  expect(rate.at(2000)).toBeLessThan(0.012);
});

test('events that come in bursts count as many as they are', () => {
  const rate = new MovingRate(10_000);
  for (let ms = 2000; ms <= 60_000; ms += 2000) for (let i = 0; i < 64; i++) rate.count(ms);
  for (const ms of [60_000, 61_999]) {
    expect(rate.at(ms)).toBeGreaterThan(0.028);
    expect(rate.at(ms)).toBeLessThan(0.036);
  }
});

test('forgets what is long past', () => {
  const rate = new MovingRate(10_000);
  for (let ms = 10; ms <= 30_000; ms += 10) rate.count(ms);
  for (let ms = 31_000; ms <= 90_000; ms += 1000) rate.count(ms);
  expect(rate.at(90_000)).toBeCloseTo(0.001, 3);
});
