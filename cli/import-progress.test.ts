import { describe, expect, test } from 'vitest';
import type { ImportProgress } from '../model/import/import-checkpoint.js';
import { ImportProgressView, progressBar } from './import-progress.js';

const GiB = 2 ** 30;
const half: ImportProgress = { phase: 'import', name: 'a.weight', tensors: 71, totalTensors: 142, bytes: 5 * GiB, totalBytes: 10 * GiB };
const rates = { bytesPerSecond: 1.5e9, secondsLeft: 200 };

test.each([
  { width: 100, bar: 'import [############.............]  50 %  5.0 GiB of 10.0 GiB  1.50 GB/s  3m20s left  71/142 tensors' },
  { width: 80, bar: 'import [##########...........]  50 %  5.0 GiB of 10.0 GiB  1.50 GB/s  3m20s left' },
  { width: 72, bar: 'import [######.......]  50 %  5.0 GiB of 10.0 GiB  1.50 GB/s  3m20s left' },
  { width: 40, bar: 'import  50 %  5.0 GiB of 10.0 GiB  1.50…' },
])('a bar of $width columns', ({ width, bar }) => {
  expect(progressBar(half, rates, width)).toBe(bar);
});

describe('the view', () => {
  function viewOn(output: { isTTY?: boolean; columns?: number }): {
    view: ImportProgressView;
    written: string[];
    at: (ms: number) => void;
  } {
    let now = 0;
    const written: string[] = [];
    const view = new ImportProgressView({ ...output, write: (text) => written.push(text) }, () => now);
    return { view, written, at: (ms) => (now = ms) };
  }

  test('in a terminal one line is drawn again and again, and ends with a line break', () => {
    const { view, written, at } = viewOn({ isTTY: true, columns: 120 });
    view.update({ ...half, bytes: 0, tensors: 0 });
    at(2000);
    view.update({ ...half, bytes: 2 * GiB });
    view.close();
    view.close();
    expect(written).toEqual([
      '\rimport [..............................]   0 %  0 B of 10.0 GiB  0/142 tensors\u001b[K',
      '\rimport [######........................]  20 %  2.0 GiB of 10.0 GiB  1.07 GB/s  8s left  71/142 tensors\u001b[K',
      '\n',
    ]);
  });

  test('elsewhere there is a plain line every few seconds, and one at the end', () => {
    const { view, written, at } = viewOn({});
    for (let second = 0; second <= 11; second++) {
      at(second * 1000);
      view.update({ ...half, bytes: second * 1e9, totalBytes: 11e9, tensors: second === 11 ? 142 : second });
    }
    view.close();
    expect(written).toEqual([
      '5/142 tensors, 4.7 GiB of 10.2 GiB, 1.00 GB/s, 6s left: a.weight\n',
      '10/142 tensors, 9.3 GiB of 10.2 GiB, 1.00 GB/s, 1s left: a.weight\n',
      '142/142 tensors, 10.2 GiB of 10.2 GiB, 1.00 GB/s, 0s left: a.weight\n',
    ]);
  });

  test('the rate is that of the last seconds, and begins anew with another phase', () => {
    const { view, written, at } = viewOn({});
    for (let second = 0; second <= 40; second++) {
      at(second * 1000);
      view.update({ ...half, bytes: second <= 20 ? second * 1e9 : 20e9 + (second - 20) * 1e8, totalBytes: 100e9 });
    }
    expect(written.at(-1)).toContain(', 0.10 GB/s, 13m00s left');
    at(45_000);
    view.update({ ...half, phase: 'check', bytes: 0 });
    expect(written.at(-1)).toBe('checking what is there: 71/142 tensors, 0 B of 10.0 GiB: a.weight\n');
  });
});
