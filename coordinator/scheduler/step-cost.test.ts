import fc from 'fast-check';
import { expect, test } from 'vitest';
import { stepMs, StepCostTable, tokensWithin } from './step-cost.js';

test('knows nothing before steps of two sizes were seen a few times', () => {
  const table = new StepCostTable();
  for (let i = 0; i < 10; i++) table.observe(8, 5);
  expect(table.cost).toBeNull();
  for (let i = 0; i < 3; i++) table.observe(1, 2);
  expect(table.cost).toBeNull();
  table.observe(1, 2);
  expect(table.cost).toEqual([
    { tokens: 1, ms: 2 },
    { tokens: 8, ms: 5 },
  ]);
});

test('reads times and sizes off the line between two points, and beyond the last', () => {
  const cost = [
    { tokens: 1, ms: 1 },
    { tokens: 5, ms: 3 },
    { tokens: 9, ms: 3 },
    { tokens: 13, ms: 7 },
  ];
  expect([1, 3, 5, 7, 11, 15].map((tokens) => stepMs(cost, tokens))).toEqual([1, 2, 3, 3, 5, 9]);
  expect([1, 2, 3, 5, 9].map((ms) => tokensWithin(cost, ms))).toEqual([1, 3, 9, 11, 15]);
  expect(tokensWithin(cost, 0.5)).toBe(1);
  expect(tokensWithin(cost.slice(1, 3), 4)).toBe(Infinity);
});

test('follows a machine that becomes slower', () => {
  const table = new StepCostTable();
  for (let i = 0; i < 50; i++) for (const tokens of [1, 32]) table.observe(tokens, tokens);
  for (let i = 0; i < 200; i++) for (const tokens of [1, 32]) table.observe(tokens, 2 * tokens);
  expect(stepMs(table.cost!, 16)).toBeCloseTo(32, 1);
});

test('a longer time never has room for fewer tokens', () => {
  const steps = fc.array(
    fc.record({ tokens: fc.double({ min: 0.5, max: 2000, noNaN: true }), ms: fc.double({ min: 0, max: 1000, noNaN: true }) }),
    {
      minLength: 20,
      maxLength: 200,
    },
  );
  fc.assert(
    fc.property(steps, fc.double({ min: 0, max: 500, noNaN: true }), fc.double({ min: 0, max: 500, noNaN: true }), (seen, ms, more) => {
      const table = new StepCostTable();
      for (const { tokens, ms: took } of seen) table.observe(tokens, took);
      const { cost } = table;
      if (cost) expect(tokensWithin(cost, ms + more)).toBeGreaterThanOrEqual(tokensWithin(cost, ms) - 1e-6);
    }),
  );
});
