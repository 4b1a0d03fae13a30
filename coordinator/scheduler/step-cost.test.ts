import { expect, test } from 'vitest';
import { StepCostFit } from './step-cost.js';

test('finds what a step and a token take', () => {
  const fit = new StepCostFit();
  expect(fit.cost).toBeNull();
  for (let i = 0; i < 100; i++) fit.observe(1 + (i % 40), 2 + 0.5 * (1 + (i % 40)));
  expect(fit.cost!.fixedMs).toBeCloseTo(2, 6);
  expect(fit.cost!.perTokenMs).toBeCloseTo(0.5, 6);
});

test('steps that are all alike say nothing of a token, and leave what was known', () => {
  const fit = new StepCostFit();
  for (let i = 0; i < 10; i++) fit.observe(8, 6);
  expect(fit.cost).toBeNull();
  for (let i = 0; i < 100; i++) fit.observe(1 + (i % 40), 2 + 0.5 * (1 + (i % 40)));
  for (let i = 0; i < 10_000; i++) fit.observe(8, 6);
  expect(fit.cost!.perTokenMs).toBeCloseTo(0.5, 6);
  expect(fit.cost!.fixedMs + 8 * fit.cost!.perTokenMs).toBeCloseTo(6, 6);
});

test('is never negative', () => {
  const fit = new StepCostFit();
  for (let i = 0; i < 100; i++) fit.observe(i % 50, 50 - (i % 50));
  expect(fit.cost!.perTokenMs).toBeGreaterThan(0);
  expect(fit.cost!.fixedMs).toBeGreaterThanOrEqual(0);
});
