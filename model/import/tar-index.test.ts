import { execFileSync } from 'node:child_process';
import { ftruncateSync, mkdirSync, mkdtempSync, openSync, readFileSync, rmSync, symlinkSync, writeFileSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { ByteSource } from './byte-source.js';
import { indexTar } from './tar-index.js';

let dir: string;
let sources: ByteSource[];
beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), 'tar-index-'));
  sources = [];
});
afterEach(() => {
  for (const source of sources) source.close();
  rmSync(dir, { recursive: true });
});

const longName = `${'a-long-folder-name/'.repeat(9)}${'and-a-long-file-name-'.repeat(4)}.pt`;
const contents: Readonly<Record<string, string>> = {
  latest: '12',
  'empty.bin': '',
  'block.bin': 'x'.repeat(512),
  'odd.bin': 'y'.repeat(1234),
  'ü.txt': 'z',
};

describe.each(['ustar', 'pax', 'gnu', 'v7'])('what tar --format=%s writes', (format) => {
  test('is found, also where it is cut into parts', () => {
    const files = format === 'ustar' || format === 'v7' ? contents : { ...contents, [longName]: 'deep' };
    const archive = pack(files, format);
    for (const partBytes of [archive.length, 512, 700]) {
      const source = sourceOf(archive, partBytes);
      const found = indexTar(source).map(({ name, offset, size }) => [name, source.read(offset, size).toString()]);
      expect(Object.fromEntries(found)).toEqual(Object.fromEntries(Object.entries(files).map(([name, text]) => [`./${name}`, text])));
    }
  });
});

test('a ustar name in two fields is put together', () => {
  const name = `${'d'.repeat(60)}/${'e'.repeat(60)}/file`;
  expect(indexTar(sourceOf(pack({ [name]: 'x' }, 'ustar'))).map((member) => member.name)).toEqual([`./${name}`]);
});

test.each(['gnu', 'pax'])('a size beyond 8 GiB (%s) is read as it is', (format) => {
  const size = 9 * 2 ** 30 + 5;
  const path = join(dir, 'large.tar');
  const fd = openSync(path, 'w+');
  const big = header({ name: 'big', size, type: '0' });
  const record = paxRecord('path', 'big-by-its-header') + paxRecord('size', String(size));
  const pax = [header({ name: 'pax', size: record.length, type: 'x' }), padded(record), header({ name: 'big', size: 0, type: '0' })];
  const start = Buffer.concat(format === 'gnu' ? [big] : pax);
  writeSync(fd, start);
  const end = start.length + Math.ceil(size / 512) * 512;
  writeSync(fd, header({ name: 'after', size: 3, type: '0' }), 0, 512, end);
  ftruncateSync(fd, end + 4 * 512); // holes, so no room is taken
  const source = ByteSource.open([path]);
  sources.push(source);
  const name = format === 'gnu' ? 'big' : 'big-by-its-header';
  expect(indexTar(source)).toEqual([
    { name, offset: start.length, size },
    { name: 'after', offset: end + 512, size: 3 },
  ]);
});

test('folders and links are no files', () => {
  mkdirSync(join(dir, 'in/folder'), { recursive: true });
  writeFileSync(join(dir, 'in/file'), 'x');
  symlinkSync('file', join(dir, 'in/link'));
  execFileSync('tar', ['-cf', 'links.tar', '-C', 'in', '.'], { cwd: dir });
  expect(indexTar(sourceOf(readFileSync(join(dir, 'links.tar')))).map(({ name }) => name)).toEqual(['./file']);
});

describe('what is no intact archive', () => {
  test.each([
    {
      name: 'a changed byte in a header',
      change: (tar: Buffer) => tar.writeUInt8(1, 1024 + 3),
      message: /part_02 has a damaged header after "a" \(its checksum is wrong\): .*part_02, byte 0/,
    },
    { name: 'a changed first header', change: (tar: Buffer) => tar.writeUInt8(1, 3), message: /is no tar archive: .*part_00, byte 0/ },
    {
      name: 'gzip',
      change: (tar: Buffer) => tar.write('\x1f\x8b\x08', 'latin1'),
      message: /is no tar archive: .*; it is compressed with gzip/,
    },
  ])('$name', ({ change, message }) => {
    const archive = Buffer.concat([
      header({ name: 'a', size: 1, type: '0' }),
      padded('1'),
      header({ name: 'b', size: 1, type: '0' }),
      padded('2'),
      padded('\0\0'),
    ]);
    change(archive);
    expect(() => indexTar(sourceOf(archive, 512, (i) => `part_0${i}`))).toThrow(
      message.source.startsWith('part_02') ? new RegExp(message.source.slice(8)) : message,
    );
  });

  test.each([
    { name: 'in a file', keep: 700, message: '"a" ends at byte 1536 of the archive, which has 700 (1536 needed)' },
    { name: 'after a file', keep: 1536, message: 'the archive ends without its end mark (2560 needed)' },
  ])('an end $name', ({ keep, message }) => {
    const archive = Buffer.concat([header({ name: 'a', size: 1024, type: '0' }), Buffer.alloc(1024, 1), Buffer.alloc(1024)]);
    expect(() => indexTar(sourceOf(archive.subarray(0, keep)), (needed) => ` (${needed} needed)`)).toThrow(message);
  });

  test.each(['', '5 size=1\n', '99 path=x\n', '9 size=zz\n', '26 size=99999999999999999\n', '6path=\n'])('the pax header %j', (record) => {
    const archive = [
      header({ name: 'p', size: record.length, type: 'x' }),
      padded(record),
      header({ name: 'a', size: 0, type: '0' }),
      Buffer.alloc(1024),
    ];
    const index = (): unknown => indexTar(sourceOf(Buffer.concat(archive)));
    if (record === '') expect(index()).toHaveLength(1);
    else expect(index).toThrow(/a pax header (is damaged|gives the size)/);
  });

  test('a sparse file and a header that is too long', () => {
    expect(() => indexTar(sourceOf(Buffer.concat([header({ name: 's', size: 0, type: 'S' }), Buffer.alloc(1024)])))).toThrow(
      'stored as a sparse file',
    );
    const long = Buffer.concat([header({ name: 'l', size: 2 ** 21, type: 'L' }), Buffer.alloc(2 ** 21 + 1024)]);
    expect(() => indexTar(sourceOf(long))).toThrow('the extended header "l" has 2097152 bytes, at most 1048576 are read');
  });
});

function pack(files: Readonly<Record<string, string>>, format: string): Buffer {
  const folder = mkdtempSync(join(dir, 'pack-'));
  for (const [name, text] of Object.entries(files)) {
    mkdirSync(join(folder, name, '..'), { recursive: true });
    writeFileSync(join(folder, name), text);
  }
  return execFileSync('tar', [`--format=${format}`, '-cf', '-', '.'], { cwd: folder, maxBuffer: 2 ** 24 });
}

function sourceOf(archive: Buffer, partBytes = archive.length, name = (i: number): string => `part_${i}`): ByteSource {
  const folder = mkdtempSync(join(dir, 'parts-'));
  const paths: string[] = [];
  for (let begin = 0; begin < archive.length; begin += partBytes) {
    const path = join(folder, name(paths.length));
    writeFileSync(path, archive.subarray(begin, begin + partBytes));
    paths.push(path);
  }
  const source = ByteSource.open(paths, paths.length === 1 ? paths[0]! : join(folder, 'part_02'));
  sources.push(source);
  return source;
}

function header({ name, size, type }: { name: string; size: number; type: string }): Buffer {
  const block = Buffer.alloc(512);
  block.write(name, 0);
  if (size < 8 ** 11) block.write(`${size.toString(8).padStart(11, '0')}\0`, 124);
  else {
    block.writeUInt8(0x80, 124);
    block.writeBigUInt64BE(BigInt(size), 128);
  }
  block.fill(' ', 148, 156);
  block.write(type, 156);
  block.write('ustar\x0000', 257, 'latin1');
  block.write(
    `${block
      .reduce((sum, byte) => sum + byte, 0)
      .toString(8)
      .padStart(6, '0')}\0 `,
    148,
  );
  return block;
}

function padded(text: string): Buffer {
  const block = Buffer.alloc(Math.max(1, Math.ceil(text.length / 512)) * 512);
  block.write(text);
  return text.length === 0 ? Buffer.alloc(0) : block;
}

function paxRecord(key: string, value: string): string {
  const rest = ` ${key}=${value}\n`;
  const length = rest.length + 2; // of two digits
  return `${length}${rest}`;
}
