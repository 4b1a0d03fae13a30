import { CheckpointError } from '../../common/errors.js';
import type { ByteSource } from './byte-source.js';
import { MisplacedBytesError } from './misplaced-bytes.js';

/** One regular file of a tar archive. */
export interface TarMember {
  readonly name: string;
  /** Of its content. */
  readonly offset: number;
  readonly size: number;
}

const blockBytes = 512;
const maxHeaders = 1 << 17;
/** Of long names and pax records. */
const maxExtensionBytes = 2 ** 20;

/**
 * Lists the regular files of a tar archive (ustar, pax and GNU) by going from header to header; content is not read.
 *
 * @param partHint says how much is missing where the archive ends too early; given how many bytes it should have at least
 * @throws CheckpointError where a header is damaged, or the archive ends before its end mark
 */
export function indexTar(archive: ByteSource, partHint: (neededBytes: number) => string = () => ''): TarMember[] {
  const members: TarMember[] = [];
  let next: { name?: string; size?: number } = {};
  let offset = 0;
  for (let headers = 0; ; headers++) {
    if (headers > maxHeaders) throw new CheckpointError(`${archive.label}: the archive has more than ${maxHeaders} headers`);
    if (offset + blockBytes > archive.size) {
      throw new CheckpointError(`${archive.label}: the archive ends without its end mark${partHint(offset + 2 * blockBytes)}`);
    }
    const header = readHeader(archive, offset, members.at(-1)?.name ?? null);
    if (header === null) break;
    const size = next.size ?? header.size;
    const content = offset + blockBytes;
    const name = next.name ?? header.name;
    if (content + size > archive.size) {
      throw new CheckpointError(
        `${archive.label}: ${JSON.stringify(name)} ends at byte ${content + size} of the archive, which has ${archive.size}${partHint(content + size)}`,
      );
    }
    const extension = 'xgLK'.includes(header.type) ? readExtension(archive, { name, content, size }) : null;
    if (header.type === 'x') next = { ...next, ...paxRecords(extension!, archive.label) };
    else if (header.type === 'L') next = { ...next, name: textOf(extension!) };
    else if (extension === null) {
      if (header.type === '0' || header.type === '\0' || header.type === '7') members.push({ name, offset: content, size });
      else if (header.type === 'S')
        throw new CheckpointError(`${archive.label}: ${JSON.stringify(name)} is stored as a sparse file; pack it without --sparse`);
      next = {};
    }
    offset = content + Math.ceil(size / blockBytes) * blockBytes;
  }
  return members;
}

interface TarHeader {
  readonly name: string;
  readonly size: number;
  readonly type: string;
}

/** @returns null for the end mark */
function readHeader(archive: ByteSource, offset: number, after: string | null): TarHeader | null {
  const block = archive.read(offset, blockBytes);
  if (block.every((byte) => byte === 0)) return null;
  const size = isHeader(block) ? numberOf(block.subarray(124, 136)) : null;
  if (size === null) {
    const place = archive.extentsOf(offset, blockBytes);
    const where = `${place[0]!.path}, byte ${place[0]!.offset}`;
    const what = after === null ? 'is no tar archive' : `has a damaged header after ${JSON.stringify(after)} (its checksum is wrong)`;
    throw new MisplacedBytesError(
      `${archive.label} ${what}: ${where}${after === null ? compression(block) || missingStart(archive) : ''}`,
      place,
      isHeader,
    );
  }
  const prefix = block.toString('latin1', 257, 263) === 'ustar\0' ? textOf(block.subarray(345, 500)) : ''; // GNU has other fields there
  const name = textOf(block.subarray(0, 100));
  return { name: prefix === '' ? name : `${prefix}/${name}`, size, type: String.fromCharCode(block[156]!) };
}

/** The sum of a header's bytes stands in it, that field taken as spaces; old programs summed signed bytes, which differs for names beyond ASCII only. */
function isHeader(block: Buffer): boolean {
  const sum = numberOf(block.subarray(148, 156));
  let unsigned = 8 * 32;
  let signed = 8 * 32;
  for (let i = 0; i < blockBytes; i++) {
    if (i >= 148 && i < 156) continue;
    unsigned += block[i]!;
    signed += block.readInt8(i);
  }
  return sum !== null && (sum === unsigned || sum === signed) && block.some((byte) => byte !== 0);
}

/** Octal digits, or base 256 where the top bit is set. @returns null for what is neither, or beyond 2^53 */
function numberOf(field: Buffer): number | null {
  if (field[0] === 0x80) {
    const value = field.subarray(1).reduce((sum, byte) => 256 * sum + byte, 0);
    return Number.isSafeInteger(value) ? value : null;
  }
  const text = field
    .toString('latin1')
    .replace(/[\0 ]+$/, '')
    .trimStart();
  return /^[0-7]{0,12}$/.test(text) ? Number.parseInt(text || '0', 8) : null;
}

function readExtension(archive: ByteSource, { name, content, size }: { name: string; content: number; size: number }): Buffer {
  if (size <= maxExtensionBytes) return archive.read(content, size);
  throw new CheckpointError(
    `${archive.label}: the extended header ${JSON.stringify(name)} has ${size} bytes, at most ${maxExtensionBytes} are read`,
  );
}

/** `LENGTH KEY=VALUE\n`, the length being that of the whole record. */
function paxRecords(bytes: Buffer, label: string): { name?: string; size?: number } {
  const records: { name?: string; size?: number } = {};
  for (let at = 0; at < bytes.length;) {
    const head = /^(\d{1,7}) /.exec(bytes.toString('latin1', at, at + 8));
    const end = at + Number(head?.[1] ?? 0);
    const record = bytes.toString('utf8', at + (head?.[0].length ?? 0), end - 1);
    const equals = record.indexOf('=');
    if (head === null || end > bytes.length || end <= at + head[0].length || equals < 1 || bytes[end - 1] !== 10) {
      throw new CheckpointError(`${label}: a pax header is damaged`);
    }
    const value = record.slice(equals + 1);
    const key = record.slice(0, equals);
    if (key === 'path') records.name = value;
    if (key === 'size') records.size = sizeOf(value, label);
    if (key.startsWith('GNU.sparse')) throw new CheckpointError(`${label}: the archive has a sparse file; pack it without --sparse`);
    at = end;
  }
  return records;
}

function sizeOf(text: string, label: string): number {
  const size = /^\d{1,16}$/.test(text) ? Number(text) : NaN;
  if (!Number.isSafeInteger(size)) throw new CheckpointError(`${label}: a pax header gives the size ${JSON.stringify(text.slice(0, 40))}`);
  return size;
}

function textOf(field: Buffer): string {
  const end = field.indexOf(0);
  return field.toString('utf8', 0, end === -1 ? field.length : end);
}

function missingStart(archive: ByteSource): string {
  return archive.extents.length > 1 ? '; is the part before it missing?' : '';
}

function compression(block: Buffer): string {
  const magic = block.toString('latin1', 0, 6);
  const name = magic.startsWith('\x1f\x8b')
    ? 'gzip'
    : magic.startsWith('\xfd7zXZ')
      ? 'xz'
      : magic.startsWith('\x28\xb5\x2f\xfd')
        ? 'zstd'
        : null;
  return name === null ? '' : `; it is compressed with ${name}, unpack that first`;
}
