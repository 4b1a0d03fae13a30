import { expect, test } from 'vitest';
import { formatBytes, formatCount, formatDuration, formatMs, formatTable, formatWorkerState } from './format.js';

test.each([
  [0, '0.00 ms'],
  [0.4237, '0.42 ms'],
  [12.34, '12.3 ms'],
  [999.6, '1000 ms'],
  [12_345, '12.3 s'],
  [119_999, '120 s'],
  [120_000, '2m00s'],
])('%d ms is %s', (ms, shown) => {
  expect(formatMs(ms)).toBe(shown);
});

test.each([
  [0.9, '0s'],
  [59.9, '59s'],
  [303, '5m03s'],
  [11_100, '3h05m'],
  [1_051_200, '12d04h'],
])('%d seconds are %s', (seconds, shown) => {
  expect(formatDuration(seconds)).toBe(shown);
});

test.each([
  [0, '0'],
  [3.14159, '3.14'],
  [31.4159, '31.4'],
  [314.159, '314'],
  [1_234_567, '1,234,567'],
])('%d is %s', (count, shown) => {
  expect(formatCount(count)).toBe(shown);
});

test('bytes have a binary unit', () => {
  expect([0, 1023, 1024, 13_002_342, 2 ** 40].map(formatBytes)).toEqual(['0 B', '1023 B', '1.0 KiB', '12.4 MiB', '1.0 TiB']);
});

test('columns are aligned as a terminal shows them', () => {
  expect(
    formatTable(
      ['name', 'n'],
      [
        ['请求', '5'],
        ['ab', '10'],
      ],
    ).split('\n'),
  ).toEqual(['name   n', '请求   5', 'ab    10']);
});

test.each([
  { worker: { state: 'loading', loadedBytes: 0, loadBytes: 0 }, shown: 'loading' },
  { worker: { state: 'loading', loadedBytes: 340, loadBytes: 1000 }, shown: 'loading 34 %' },
  { worker: { state: 'ready', loadedBytes: 0, loadBytes: 0 }, shown: 'ready' },
])('a worker is $shown', ({ worker, shown }) => {
  expect(formatWorkerState(worker)).toBe(shown);
});
