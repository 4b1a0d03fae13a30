import { expect, test } from 'vitest';
import type { PromptSource } from './workload.js';
import { planRequest, type WorkloadOptions } from './workload.js';

const ids: PromptSource & { kind: 'ids' } = {
  kind: 'ids',
  lengths: { kind: 'uniform', low: 4, high: 9 },
  low: 100,
  high: 199,
  maxTokens: null,
  sharedContexts: 0,
  uniqueFraction: 0,
};
const workload: WorkloadOptions = {
  seed: 1,
  prompts: ids,
  outputTokens: { kind: 'uniform', low: 2, high: 20 },
  cancelFraction: 0,
  keys: [],
};
const plan = (options: Partial<WorkloadOptions>, count = 2000) =>
  Array.from({ length: count }, (_, index) => planRequest(index, { ...workload, ...options }));

test('a request is the same whenever it is planned, and every seed gives other ones', () => {
  expect(planRequest(17, workload)).toEqual(planRequest(17, workload));
  expect(planRequest(17, workload)).not.toEqual(planRequest(17, { ...workload, seed: 2 }));
  expect(new Set(plan({}).map(({ prompt }) => JSON.stringify(prompt))).size).toBe(2000);
});

test('tokens and lengths stay within what was asked for', () => {
  for (const { prompt, outputTokens } of plan({})) {
    if (!('ids' in prompt)) throw new Error('ids were asked for');
    expect(prompt.ids.length).toBeGreaterThanOrEqual(4);
    expect(prompt.ids.length).toBeLessThanOrEqual(9);
    expect(prompt.ids.every((id) => id >= 100 && id <= 199)).toBe(true);
    expect(outputTokens).toBeGreaterThanOrEqual(2);
    expect(outputTokens).toBeLessThanOrEqual(20);
  }
});

test('prompts are cut to leave room for the output, and say so', () => {
  for (const { prompt, outputTokens, isCut } of plan({ prompts: { ...ids, maxTokens: 20 } })) {
    if (!('ids' in prompt)) throw new Error('ids were asked for');
    expect(prompt.ids.length + outputTokens).toBeLessThanOrEqual(21); // one token of prompt is left in any case
    if (isCut) expect(prompt.ids.length).toBe(Math.max(1, 20 - outputTokens));
  }
});

test('shared contexts are so many different prompts, and the unique fraction has its own', () => {
  const different = (uniqueFraction: number): number =>
    new Set(plan({ prompts: { ...ids, sharedContexts: 5, uniqueFraction } }).map(({ prompt }) => JSON.stringify(prompt))).size;
  expect(different(0)).toBe(5);
  expect(different(0.5) / 2000).toBeCloseTo(0.5, 1);
});

test('leaving clients leave in mid-stream, and change nothing else', () => {
  const some = plan({ cancelFraction: 0.5 });
  expect(some.filter(({ cancelAfter }) => cancelAfter !== null).length / some.length).toBeCloseTo(0.5, 1);
  for (const { cancelAfter, outputTokens } of some) if (cancelAfter !== null) expect(cancelAfter).toBeLessThan(outputTokens);
  expect(some.map((request) => ({ ...request, cancelAfter: null }))).toEqual(plan({}));
});

test('keys are taken in turn', () => {
  expect(plan({ keys: ['a', 'b'] }, 3).map(({ key }) => key)).toEqual(['a', 'b', 'a']);
  expect(planRequest(0, workload).key).toBeNull();
});
