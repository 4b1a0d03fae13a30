import { expect, test } from 'vitest';
import { TokenBucket } from './token-bucket.js';

test('begins full, and fills up again at its rate but not beyond', () => {
  const bucket = new TokenBucket(600, 1000);
  expect(bucket.waitMs(600, 1000)).toBe(0);
  bucket.take(600, 1000);
  expect(bucket.waitMs(100, 1000)).toBe(10_000);
  expect(bucket.waitMs(100, 6000)).toBe(5000);
  expect(bucket.waitMs(100, 11_000)).toBe(0);
  expect(bucket.waitMs(600, 1_000_000)).toBe(0);
  bucket.take(600, 1_000_000);
  expect(bucket.waitMs(1, 1_000_000)).toBeGreaterThan(0);
});

test('a debt has to be paid back first', () => {
  const bucket = new TokenBucket(60, 0);
  bucket.take(90, 0);
  expect(bucket.waitMs(1, 0)).toBe(31_000);
});

test('a full bucket is enough for what is larger than it', () => {
  const bucket = new TokenBucket(60, 0);
  expect(bucket.waitMs(1000, 0)).toBe(0);
  bucket.take(1, 0);
  expect(bucket.waitMs(1000, 0)).toBe(1000);
});
