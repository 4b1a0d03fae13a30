import { expect, test } from 'vitest';
import type { Phase, Sample } from './contestant.js';
import type { CaseRun, Round } from './measure-case.js';
import { median, summarize } from './summary.js';

const lengths = { prefillTokens: 512, decodeTokens: 24 };
const stepMs = { total: 3, compute: 2, collectives: 1 };

/** Rates as [decode, prefill, batch]; bandwidth in bytes per second. */
function round(
  rates: Record<string, [number, number, number]>,
  { bandwidth = 100, peak = 1000, otherLoad = 0 }: { bandwidth?: number; peak?: number; otherLoad?: number | null } = {},
): Round {
  const samples = Object.entries(rates).map(([name, [decode, prefill, batch]]): [string, Record<Phase, Sample>] => {
    const sample = (tokensPerSecond: number): Sample => ({ tokensPerSecond, stepMs: null });
    return [
      name,
      { decode: { ...sample(decode), stepMs: name === 'peer' ? null : stepMs }, prefill: sample(prefill), batch: sample(batch) },
    ];
  });
  const limits = { readBandwidth: { oneThread: bandwidth / 2, allThreads: bandwidth }, productPeak: peak, otherLoad };
  return { limits, samples: Object.fromEntries(samples) };
}

function summarizeRounds(rounds: readonly Round[], productsPerToken: number | null = 10) {
  const about = Object.fromEntries(
    Object.keys(rounds[0]!.samples).map((name) => [name, { bytesPerToken: name === 'peer' ? 8 : 5, description: name }]),
  );
  const run: CaseRun = { rounds, about };
  return summarize({ name: 'peer', title: 'a model', lengths, productsPerToken }, run);
}

test('every ratio is one within a round, of what was measured in that round', () => {
  const { contestants } = summarizeRounds([round({ peer: [5, 20, 10], '1 x 2': [10, 60, 40], '2 x 1': [9, 50, 45] })]);
  expect(contestants['peer']!.ratios).toEqual({ decodeOfBandwidth: 0.4, prefillOfPeak: 0.2, batchOfDecode: 2 });
  expect(contestants['1 x 2']!.ratios).toEqual({
    ...{ decodeOfBandwidth: 0.5, prefillOfPeak: 0.6, batchOfDecode: 4 },
    ...{ decodeOfPeer: 2, prefillOfPeer: 3, batchOfPeer: 4 },
  });
  expect(contestants['2 x 1']!.ratios).toEqual({
    ...{ decodeOfBandwidth: 0.45, prefillOfPeak: 0.5, batchOfDecode: 5, decodeOfFirst: 0.9 },
    ...{ decodeOfPeer: 1.8, prefillOfPeer: 2.5, batchOfPeer: 4.5 },
  });
});

test('the median of ratios is reported, not the ratio of medians', () => {
  const rounds = [
    round({ peer: [1, 1, 1], '1 x 2': [4, 1, 1] }),
    round({ peer: [10, 1, 1], '1 x 2': [20, 1, 1] }),
    round({ peer: [2, 1, 1], '1 x 2': [6, 1, 1] }),
  ];
  const summary = summarizeRounds(rounds).contestants['1 x 2']!;
  expect(summary.ratios.decodeOfPeer).toBe(3); // of 4, 2, 3; the medians of the rates are 2 and 6
  expect(summary.tokensPerSecond.decode).toBe(6);
});

test('a machine that slows down takes the limits of each round with it', () => {
  const rounds = [1, 2, 4].map((slower) => round({ '1 x 2': [16 / slower, 1, 1] }, { bandwidth: 100 / slower }));
  const summary = summarizeRounds(rounds);
  expect(summary.contestants['1 x 2']!.ratios.decodeOfBandwidth).toBeCloseTo(0.8);
  expect(summary.readBandwidth).toEqual({ oneThread: 25, allThreads: 50 });
});

test('what there is nothing to compare with has no ratio', () => {
  const { ratios } = summarizeRounds([round({ '1 x 2': [10, 60, 40] })], null).contestants['1 x 2']!;
  expect(ratios).toEqual({ decodeOfBandwidth: 0.5, batchOfDecode: 4 });
});

test.each([
  { loads: [0.1, 0.4, 0.2], worst: 0.4 },
  { loads: [0.1, null], worst: null },
])('other work is the largest of the rounds: $loads', ({ loads, worst }) => {
  expect(summarizeRounds(loads.map((otherLoad) => round({ '1 x 2': [1, 1, 1] }, { otherLoad }))).otherLoad).toBe(worst);
});

test('steps are reported of who tells them', () => {
  const { contestants } = summarizeRounds([round({ peer: [1, 1, 1], '1 x 2': [1, 1, 1] })]);
  expect(contestants['1 x 2']!.stepMs).toEqual(stepMs);
  expect(contestants['peer']!.stepMs).toBeNull();
});

test.each([
  { values: [3], result: 3 },
  { values: [10, 9, 100], result: 10 },
  { values: [4, 1, 3, 2], result: 2.5 },
])('the median of $values', ({ values, result }) => {
  expect(median(values)).toBe(result);
});
