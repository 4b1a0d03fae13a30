/** How long a step may be where several keys share it. */
import { expect, test } from 'vitest';
import { type KeyShare, schedule, type PendingExtend, type RunningRequest, type SchedulerState } from './schedule.js';
import type { StepCost } from './step-cost.js';

const limits = { stepTokens: 256, maxBatchTokens: 768, maxExtends: 256, numLayers: 8 };
/** Steps of a CPU: ten tokens take twice what none does. */
const stepCost = line(1, 0.1);

function line(fixedMs: number, perTokenMs: number): StepCost {
  return [1, 401].map((tokens) => ({ tokens, ms: fixedMs + perTokenMs * tokens }));
}

interface Sequences {
  readonly key: string;
  readonly count: number;
  readonly lastStep?: (i: number) => number;
}

function decoding({ key, count, lastStep = () => 0 }: Sequences): RunningRequest[] {
  return Array.from({ length: count }, (_, i) => ({
    id: i,
    key,
    priority: 0,
    maxSequences: 1,
    blocks: 1,
    ownBlocks: 1,
    lastStep: lastStep(i),
    pending: [extend(1)],
  }));
}

function extend(runTokens: number): PendingExtend {
  return { runTokens, newBlocks: 0, sharedBlock: -1, sharedHolders: 0, computesContext: null };
}

function state(running: RunningRequest[], change: Partial<SchedulerState> = {}): SchedulerState {
  const keys = new Map<string, KeyShare>([...new Set(running.map(({ key }) => key))].map((key) => [key, { weight: 1, counter: 0 }]));
  return { running, queues: [], keys, slice: null, freeBlocks: 1000, totalBlocks: 2000, stepCost, ...change };
}

/** Extends of each key in the step. */
function taken(running: RunningRequest[], change: Partial<SchedulerState> = {}): Record<string, number> {
  const { run } = schedule(state(running, change), limits);
  const counts: Record<string, number> = {};
  for (const { key, pending } of running) counts[key] = (counts[key] ?? 0) + pending.filter((each) => run.includes(each)).length;
  return counts;
}

test('one key alone runs everything', () => {
  expect(taken(decoding({ key: 'a', count: 64 }))).toEqual({ a: 64 });
});

test('beside one sequence of another key a full batch runs in parts: the step takes no more than twice what that one would alone', () => {
  // 2 * (1 + 0.1) = 1 + 0.1 * 12
  expect(taken([...decoding({ key: 'a', count: 64 }), ...decoding({ key: 'b', count: 1 })])).toEqual({ a: 11, b: 1 });
});

test('where tokens cost next to nothing nobody has to wait', () => {
  const running = [...decoding({ key: 'a', count: 64 }), ...decoding({ key: 'b', count: 1 })];
  expect(taken(running, { stepCost: line(10, 0.01) })).toEqual({ a: 64, b: 1 });
  expect(taken(running, { stepCost: null })).toEqual({ a: 64, b: 1 });
});

test('a key of three times the weight may have steps of four thirds only', () => {
  const running = [...decoding({ key: 'a', count: 64 }), ...decoding({ key: 'b', count: 1 })];
  const keys = new Map([
    ['a', { weight: 1, counter: 0 }],
    ['b', { weight: 3, counter: 0 }],
  ]);
  expect(taken(running, { keys })).toEqual({ a: 3, b: 1 });
});

test('equals share equally', () => {
  expect(taken([...decoding({ key: 'a', count: 40 }), ...decoding({ key: 'b', count: 40 })])).toEqual({ a: 40, b: 40 });
  expect(taken([...decoding({ key: 'a', count: 40 }), ...decoding({ key: 'b', count: 20 })])).toEqual({ a: 30, b: 20 });
});

test('the sequences that have to wait take turns', () => {
  const running = [...decoding({ key: 'a', count: 64, lastStep: (i) => (i < 50 ? 9 : 8) }), ...decoding({ key: 'b', count: 1 })];
  const { run } = schedule(state(running), limits);
  expect(run).toHaveLength(12);
  for (const request of running.slice(50, 61)) expect(run).toContain(request.pending[0]);
});

test('a long prompt of another key goes through the layers in as small parts as it can', () => {
  const prompt: RunningRequest = { ...decoding({ key: 'a', count: 1 })[0]!, pending: [extend(64)] };
  const { slice } = schedule(state([prompt, ...decoding({ key: 'b', count: 1 })]), limits);
  expect(slice).toMatchObject({ firstLayer: 0, endLayer: 1 }); // 8 tokens of the 12
});

test('a key that only waits counts too, so that its first prompt finds a short step', () => {
  const waiting = { ...decoding({ key: 'b', count: 1 })[0]!, pending: [extend(8)], neededBlocks: 1, isHeldBack: false };
  const { admit, run } = schedule(state(decoding({ key: 'a', count: 64 }), { queues: [[waiting]] }), limits);
  expect(admit).toEqual([waiting]);
  // 2 * (1 + 0.1 * 8) = 1 + 0.1 * 26
  expect(run.filter(({ runTokens }) => runTokens === 1)).toHaveLength(18);
});
