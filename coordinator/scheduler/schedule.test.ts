import { expect, test } from 'vitest';
import { schedule, type PendingExtend, type SchedulerState } from './schedule.js';

const limits = { maxBatchTokens: 16, maxExtends: 6 };

/** Extends are written as their run lengths; ids count from 0, those of waiting requests from 100, and a request's id is its first Extend's. */
function stateOf(pending: number[], waiting: { reserve: number; runs: number[] }[], unreservedBlocks: number): SchedulerState {
  const extendsOf = (lengths: number[], first: number): PendingExtend[] => lengths.map((runTokens, i) => ({ id: first + i, runTokens }));
  let next = 100;
  return {
    pending: extendsOf(pending, 0),
    waiting: waiting.map(({ reserve, runs }) => {
      const id = next;
      next += runs.length;
      return { id, reserveBlocks: reserve, pending: extendsOf(runs, id) };
    }),
    unreservedBlocks,
  };
}

const one = (runs: number[], reserve = 1) => ({ reserve, runs });

test.each([
  { name: 'nothing to do is an empty plan', pending: [], waiting: [], free: 8, admit: [], run: [] },
  { name: 'all sequences decode together', pending: [1, 1, 1], waiting: [], free: 0, admit: [], run: [0, 1, 2] },
  { name: 'decoding goes before a longer run that came earlier', pending: [15, 1, 1], waiting: [], free: 0, admit: [], run: [1, 2] },
  { name: 'a longer run takes what decoding leaves', pending: [1, 14, 1], waiting: [], free: 0, admit: [], run: [0, 2, 1] },
  {
    name: 'admits in arrival order up to the token budget',
    pending: [],
    waiting: [one([7]), one([7]), one([7])],
    free: 8,
    admit: [100, 101, 102],
    run: [100, 101],
  },
  {
    name: 'a short prompt does not overtake a long one',
    pending: [1, 1],
    waiting: [one([15]), one([3])],
    free: 8,
    admit: [100],
    run: [0, 1],
  },
  {
    name: 'a request waits for all the blocks it can need',
    pending: [1],
    waiting: [one([3], 5), one([3], 1)],
    free: 4,
    admit: [],
    run: [0],
  },
  { name: 'reservations of the same step add up', pending: [], waiting: [one([3], 3), one([3], 3)], free: 5, admit: [100], run: [100] },
  {
    name: 'a step takes no more Extends than allowed',
    pending: [1, 1, 1, 1, 1, 1, 1],
    waiting: [],
    free: 8,
    admit: [],
    run: [0, 1, 2, 3, 4, 5],
  },
  { name: 'a run goes on when a request waits for blocks', pending: [3, 4], waiting: [one([1], 9)], free: 8, admit: [], run: [0, 1] },
  { name: 'behind a run that does not fit nobody is admitted', pending: [1, 16], waiting: [one([1])], free: 8, admit: [], run: [0] },
])('$name', ({ pending, waiting, free, admit, run }) => {
  expect(schedule(stateOf(pending, waiting, free), limits)).toEqual({ admit, run });
});

test('a waiting request is older than what a running one asks for later', () => {
  const state = {
    pending: [{ id: 7, runTokens: 10 }],
    waiting: [{ id: 1, reserveBlocks: 1, pending: [{ id: 5, runTokens: 10 }] }],
    unreservedBlocks: 1,
  };
  expect(schedule(state, limits)).toEqual({ admit: [1], run: [5] });
});
