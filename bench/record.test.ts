import { expect, test } from 'vitest';
import { compareRuns, type RecordedRun } from './record.js';
import { renderComparisons, renderMarkdown, renderText, replaceSection } from './report.js';
import type { CaseSummary, ContestantSummary } from './summary.js';

type Ratios = ContestantSummary['ratios'];

function contestant(ratios: Ratios, description = 'avx2 kernels'): ContestantSummary {
  const stepMs = { total: 100.126, compute: 97, collectives: 0.5 };
  return { description, bytesPerToken: 1.75e9, tokensPerSecond: { decode: 9.5, prefill: 60, batch: 40 }, stepMs, ratios };
}

function runOf(contestants: CaseSummary['contestants'], cpu = 'a processor'): RecordedRun {
  const summary: CaseSummary = {
    ...{ title: 'a model', prefillTokens: 512, readBandwidth: { oneThread: 20e9, allThreads: 33.34e9 } },
    ...{ productPeak: 271e9, otherLoad: 0.026, contestants },
  };
  return { date: '2026-01-02', cpu, compiler: 'gcc 12', node: '20.19.0', repeats: 3, cases: { peer: summary } };
}

const compare = (before: Ratios, now: Ratios, tolerance = 0.15) =>
  compareRuns(runOf({ '1 x 2': contestant(before) }), runOf({ '1 x 2': contestant(now) }), tolerance);

test.each([
  { name: 'as before', now: 2, hasFallen: false },
  { name: 'better', now: 9, hasFallen: false },
  { name: 'a little worse', now: 1.71, hasFallen: false },
  { name: 'worse', now: 1.69, hasFallen: true },
  { name: 'not a number', now: NaN, hasFallen: true },
])('a ratio that is $name has fallen: $hasFallen', ({ now, hasFallen }) => {
  expect(compare({ decodeOfPeer: 2 }, { decodeOfPeer: now })).toEqual([
    { what: 'a model, 1 x 2: decode / peer', recorded: 2, now, hasFallen },
  ]);
});

test('the tolerance can be narrower', () => {
  expect(compare({ decodeOfPeer: 2 }, { decodeOfPeer: 1.95 }, 0.01)[0]!.hasFallen).toBe(true);
});

test('only what both runs have is compared, and nothing of the peer itself', () => {
  const before = runOf({ peer: contestant({ decodeOfBandwidth: 0.5 }), '1 x 2': contestant({ decodeOfPeer: 2, decodeOfBandwidth: 0.8 }) });
  const now = runOf({
    peer: contestant({ decodeOfBandwidth: 0.1 }),
    '1 x 2': contestant({ decodeOfBandwidth: 0.7 }),
    '2 x 1': contestant({ decodeOfFirst: 1 }),
  });
  expect(compareRuns(before, now, 0.15).map(({ what, hasFallen }) => [what, hasFallen])).toEqual([
    ['a model, 1 x 2: decode / read bandwidth', false],
  ]);
  expect(compareRuns({ ...before, cases: {} }, now, 0.15)).toEqual([]);
});

test('a comparison is shown with its change, and what has fallen is marked', () => {
  const lines = renderComparisons([
    { what: 'a', recorded: 2, now: 1.5, hasFallen: true },
    { what: 'b', recorded: 2, now: 2.1, hasFallen: false },
  ]).split('\n');
  expect(lines[1]).toMatch(/^a +2\.000 +1\.500 +-25\.0 % +FALLEN$/);
  expect(lines[2]).toMatch(/^b +2\.000 +2\.100 +5\.0 %$/);
});

test('the record becomes Markdown: a part for each instruction set, ratios that are there, limits', () => {
  const peer = { ...contestant({ decodeOfBandwidth: 0.5 }, 'llama.cpp'), stepMs: null };
  const record = { avx2: runOf({ peer, '1 x 2': contestant({ decodeOfBandwidth: 0.85, decodeOfPeer: 2.345 }) }), generic: runOf({}) };
  const text = renderMarkdown(record);
  expect(text.split('\n')).toEqual(
    expect.arrayContaining([
      '### avx2',
      '2026-01-02, a processor, avx2 kernels (gcc 12, Node 20.19.0); medians of 3 rounds, 2 threads each.',
      '| model | who | decode / read bandwidth | decode / peer |',
      '| --- | --- | --- | --- |',
      '| a model | peer | 50 % |  |',
      '| a model | 1 x 2 | 85 % | 2.35 |',
      '| a model | 1 x 2 | 9.50 | 40.00 | 60.0 (512) | 1750.0 MB | 100.13 / 97.00 / 0.50 |',
      '| a model | 20.0 | 33.3 | 271 | 3 % at most |',
      '- a model, peer: llama.cpp',
      '### generic',
    ]),
  );
  expect(renderText('avx2', record.avx2)).toContain('9.50');
});

test('the measured part of a document is replaced, the rest stays', () => {
  const document = 'before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n';
  const once = replaceSection(document, 'new');
  expect(once).toBe('before\n<!-- bench:begin -->\n\nnew\n\n<!-- bench:end -->\nafter\n');
  expect(replaceSection(once, 'new')).toBe(once);
  for (const broken of ['no marks', '<!-- bench:end --> <!-- bench:begin -->'])
    expect(() => replaceSection(broken, 'new')).toThrow('bench:begin');
});
