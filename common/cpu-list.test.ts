import { expect, test } from 'vitest';
import { cpusOfRank, formatCpuList, parseCpuList } from './cpu-list.js';

const allowed = [0, 1, 2, 3, 8, 9, 10];

test.each([
  { text: '0', cpus: [0] },
  { text: '0-3,8', cpus: [0, 1, 2, 3, 8] },
  { text: '8,1-2,2', cpus: [1, 2, 8] },
  { text: '0-3:2,8-10:2', cpus: [0, 2, 8, 10] },
])('$text names $cpus', ({ text, cpus }) => {
  expect(parseCpuList(text, allowed)).toEqual(cpus);
});

test.each(['', ',', '0,', 'a', '-1', '3-1', '0-3:0', '0:2', '0x1', '1.5', '99999', '0-1024'])('"%s" is no list', (text) => {
  expect(() => parseCpuList(text, null)).toThrow(`--cpus ${text}: a list of CPUs`);
});

test('a CPU that may not be used is named, and which ones may', () => {
  expect(() => parseCpuList('2-5', allowed)).toThrow('--cpus 2-5: this process may not use 4-5, allowed are 0-3,8-10');
});

test('a CPU that does not exist is not among the allowed ones of this process', () => {
  expect(() => parseCpuList('1023')).toThrow(/may not use 1023, allowed are \d/);
});

test.each([
  {
    cpus: [0, 1, 2, 3],
    worldSize: 2,
    shares: [
      [0, 1],
      [2, 3],
    ],
  },
  { cpus: [0, 1, 8], worldSize: 2, shares: [[0], [1, 8]] },
  { cpus: [4, 5], worldSize: 1, shares: [[4, 5]] },
  {
    cpus: [0, 1, 2, 3, 8, 9, 10],
    worldSize: 3,
    shares: [
      [0, 1],
      [2, 3],
      [8, 9, 10],
    ],
  },
])('$cpus over $worldSize ranks', ({ cpus, worldSize, shares }) => {
  expect(shares.map((_, rank) => cpusOfRank(cpus, rank, worldSize))).toEqual(shares);
});

test('two ranks do not share a CPU', () => {
  expect(() => cpusOfRank([3], 0, 2)).toThrow('--cpus 3: 2 workers need as many CPUs at least');
});

test.each([
  { cpus: [], text: '' },
  { cpus: [0, 1, 2, 3, 8, 10, 11], text: '0-3,8,10-11' },
])('$text', ({ cpus, text }) => {
  expect(formatCpuList(cpus)).toBe(text);
});
