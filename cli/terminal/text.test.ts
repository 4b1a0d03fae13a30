import fc from 'fast-check';
import { expect, test } from 'vitest';
import { pad, printable, truncate, widthOf } from './text.js';

test.each([
  ['tandem', 6],
  ['请求', 4],
  ['a请', 3],
  ['e\u0301', 1],
  ['👩🏽', 2],
  ['…█░', 3],
])('"%s" takes %i columns', (text, columns) => {
  expect(widthOf(text)).toBe(columns);
});

test.each([
  ['a\u001b[2Jb', 'a\\u{1b}[2Jb'],
  ['line\nbreak\ttab', 'line\\u{a}break\\u{9}tab'],
  ['\u202eright to left', '\\u{202e}right to left'],
  ['zero\u200bwidth', 'zero\\u{200b}width'],
  ['\u2028', '\\u{2028}'],
  ['half \ud83d of a pair', 'half \\u{d83d} of a pair'],
  ['c1 \u009b31m', 'c1 \\u{9b}31m'],
  ['请求 é ok', '请求 é ok'],
])('%j is shown as %s', (text, shown) => {
  expect(printable(text)).toBe(shown);
});

test.each([
  ['请求编号', 8, '请求编号'],
  ['请求编号', 7, '请求编…'],
  ['请求编号', 6, '请求…'],
  ['请求', 1, '…'],
  ['请求', 0, ''],
  ['e\u0301e\u0301e\u0301', 2, 'e\u0301…'],
])('%s in %i columns is %s', (text, width, cut) => {
  expect(truncate(text, width)).toBe(cut);
});

const anyText = fc.string({ unit: 'binary', maxLength: 30 });

test('whatever is cut and padded has no control characters and the width that was asked for, or one less before a wide character', () => {
  fc.assert(
    fc.property(anyText, fc.integer({ min: 0, max: 20 }), (text, width) => {
      const cut = truncate(printable(text), width);
      expect(cut).not.toMatch(/[\p{Cc}\p{Cf}]/u);
      expect(widthOf(cut)).toBeLessThanOrEqual(width);
      expect(widthOf(pad(cut, width))).toBe(width);
      expect(widthOf(pad(cut, width, 'right'))).toBe(width);
    }),
  );
});
