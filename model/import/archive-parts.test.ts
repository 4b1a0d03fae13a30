import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { CheckpointError, ConfigError } from '../../common/errors.js';
import { findParts } from './archive-parts.js';

let dir: string;
beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), 'archive-parts-'));
});
afterEach(() => rmSync(dir, { recursive: true }));

/** @returns what `findParts` finds, without the folder */
function find(files: readonly string[], ...from: readonly string[]): string[] {
  for (const name of files) writeFileSync(join(dir, name), '');
  return findParts(from.map((name) => join(dir, name))).map((path) => basename(path));
}

describe('parts come in the order of their names', () => {
  test.each([
    {
      name: 'digits',
      files: ['x.tar.part_02', 'x.tar.part_00', 'x.tar.part_01'],
      sorted: ['x.tar.part_00', 'x.tar.part_01', 'x.tar.part_02'],
    },
    { name: 'digits from 1 on', files: ['x.2', 'x.1'], sorted: ['x.1', 'x.2'] },
    {
      name: 'digits of different length',
      files: Array.from({ length: 11 }, (_, i) => `p${10 - i}`),
      sorted: Array.from({ length: 11 }, (_, i) => `p${i}`),
    },
    { name: 'letters', files: ['x.tar.ab', 'x.tar.aa'], sorted: ['x.tar.aa', 'x.tar.ab'] },
    { name: 'letters past z', files: [...lettersTo('bb')].reverse(), sorted: lettersTo('bb') },
    { name: 'names that are no series', files: ['b.tar', 'a.tar'], sorted: ['a.tar', 'b.tar'] },
    { name: 'one file', files: ['x.tar'], sorted: ['x.tar'] },
  ])('$name', ({ files, sorted }) => {
    expect(find(files, '*')).toEqual(sorted);
    expect(find(files, ...files)).toEqual(sorted);
  });

  test('a pattern takes what it says and nothing else', () => {
    const files = ['x.tar.part_00', 'x.tar.part_01', 'xatar.part_02', 'x.tar.part_03.tmp', '.x.tar.part_04', 'readme'];
    expect(find(files, 'x.tar.part_??')).toEqual(['x.tar.part_00', 'x.tar.part_01']);
  });

  test('a part that is named twice is there once', () => {
    expect(find(['p0', 'p1'], 'p*', 'p1')).toEqual(['p0', 'p1']);
  });
});

function lettersTo(last: string): string[] {
  const names: string[] = [];
  for (const a of 'abcdefghijklmnopqrstuvwxyz') {
    for (const b of 'abcdefghijklmnopqrstuvwxyz') if (names.at(-1) !== `x-${last}`) names.push(`x-${a}${b}`);
  }
  return names;
}

test.each([
  {
    name: 'in the middle',
    files: ['p_00', 'p_01', 'p_03'],
    message: 'a part is missing between DIR/p_01 and p_03: 3 parts were found, up to p_03',
  },
  { name: 'several', files: ['p_00', 'p_04'], message: '3 parts are missing between DIR/p_00 and p_04' },
  { name: 'the first ones', files: ['p_02', 'p_03'], message: 'the first parts are missing: DIR/p_02 is the first of 2 that are there' },
  { name: 'a letter', files: ['p.aa', 'p.ac'], message: 'a part is missing between DIR/p.aa and p.ac' },
  { name: 'the same number twice', files: ['p0', 'p1', 'p01'], message: 'p01 and DIR/p1 have the same number; give one of them' },
])('missing $name', ({ files, message }) => {
  expect(() => find(files, '*')).toThrow(CheckpointError);
  expect(() => find(files, '*')).toThrow(message.replaceAll('DIR', dir));
});

test('a pattern without a match, and a folder that is not there', () => {
  expect(() => find([], 'x*')).toThrow(ConfigError);
  expect(() => find([], 'x*')).toThrow(`no file matches ${dir}/x*`);
  expect(() => find([], 'sub/x*')).toThrow(`${dir}/sub cannot be read (ENOENT)`);
});
