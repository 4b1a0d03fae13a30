import { RandomAccessReader, fromRandomAccessReaderPromise, type Entry } from 'yauzl';
import { CheckpointError } from '../../common/errors.js';
import { ByteSource } from './byte-source.js';
import { MisplacedBytesError } from './misplaced-bytes.js';

export interface ZipEntry {
  readonly name: string;
  readonly size: number;
  /** CRC-32 of the content, from the central directory. */
  readonly crc32: number;
}

// A rank of GLM-130B has about 850 entries.
const maxEntries = 1 << 18;
const localHeaderBytes = 30;
const endRecordBytes = 22;

/**
 * A zip archive of uncompressed entries, read by byte ranges: what torch.save writes. Nothing is extracted, so entry names are only names.
 * Zip64 is read; compressed, encrypted and duplicate entries are refused.
 */
export class StoredZip {
  private readonly contents = new Map<string, ByteSource>();

  private constructor(
    private readonly source: ByteSource,
    private readonly entriesByName: ReadonlyMap<string, Entry>,
  ) {}

  /** @param from a path, or the bytes, which stay the caller's then @throws CheckpointError where it is no such archive */
  static async open(from: string | ByteSource): Promise<StoredZip> {
    const source = typeof from === 'string' ? ByteSource.open([from]) : from;
    try {
      return new StoredZip(source, await readDirectory(source));
    } catch (error) {
      const converted = directoryError(error, source);
      if (source !== from) source.close();
      throw converted;
    }
  }

  get path(): string {
    return this.source.label;
  }

  get entries(): ZipEntry[] {
    return [...this.entriesByName.values()].map((entry) => toZipEntry(entry));
  }

  entry(name: string): ZipEntry | undefined {
    const entry = this.entriesByName.get(name);
    return entry === undefined ? undefined : toZipEntry(entry);
  }

  /**
   * The bytes of an entry, which have not been read. That they are where the directory says is checked by the header in front of them.
   * @param what to call it in an error
   * @throws CheckpointError
   */
  content(name: string, what = `entry ${name}`): ByteSource {
    const known = this.contents.get(name);
    if (known !== undefined) return known;
    const entry = this.entriesByName.get(name);
    if (entry === undefined) throw new CheckpointError(`${this.path}: the archive has no entry ${name}`);
    const content = this.source.section(`${this.path}, entry ${name}`, this.dataStart(entry, what), entry.uncompressedSize);
    this.contents.set(name, content);
    return content;
  }

  /** Reads bytes [begin, end) of an entry. @throws CheckpointError where they do not lie in it */
  async read(name: string, begin: number, end: number): Promise<Buffer> {
    return this.content(name).read(begin, end - begin);
  }

  /** Closes the file that {@link open} was given by its path. */
  async close(): Promise<void> {
    this.source.close();
  }

  private dataStart(entry: Entry, what: string): number {
    const { relativeOffsetOfLocalHeader: offset, fileNameRaw: name } = entry;
    const length = localHeaderBytes + name.length;
    const isRight = (bytes: Buffer): boolean => bytes.readUInt32LE(0) === 0x04034b50 && bytes.subarray(localHeaderBytes).equals(name);
    const header = this.source.read(offset, length);
    if (isRight(header) && header.readUInt16LE(26) === name.length) return offset + length + header.readUInt16LE(28);
    const place = this.source.extentsOf(offset, length);
    throw new MisplacedBytesError(
      `${this.path}: ${what} is not where the archive's directory says (${place[0]!.path}, byte ${place[0]!.offset}): the file is damaged`,
      place,
      isRight,
    );
  }
}

async function readDirectory(source: ByteSource): Promise<Map<string, Entry>> {
  const zip = await fromRandomAccessReaderPromise(new SourceReader(source), source.size, { autoClose: false });
  if (zip.entryCount > maxEntries) {
    throw new CheckpointError(`${source.label}: the archive has ${zip.entryCount} entries, at most ${maxEntries} are read`);
  }
  const entries = new Map<string, Entry>();
  for await (const entry of zip.eachEntry()) {
    const name = entry.fileName;
    if (entries.has(name)) throw new CheckpointError(`${source.label}: the archive has two entries ${JSON.stringify(name)}`);
    if (entry.compressionMethod !== 0 || entry.isEncrypted()) {
      throw new CheckpointError(
        `${source.label}: entry ${JSON.stringify(name)} is compressed or encrypted; torch.save stores entries as they are`,
      );
    }
    entries.set(name, entry);
  }
  return entries;
}

function toZipEntry(entry: Entry): ZipEntry {
  return { name: entry.fileName, size: entry.uncompressedSize, crc32: entry.crc32 };
}

/** yauzl's messages say what is wrong but not in which file. The directory is at the end, after it a record that torch.save writes without a comment. */
function directoryError(error: unknown, source: ByteSource): Error {
  if (error instanceof CheckpointError) return error;
  const place = source.extentsOf(Math.max(0, source.size - endRecordBytes), endRecordBytes);
  const message = `${source.label} is no intact torch.save archive: ${(error as Error).message.split('\n')[0]}`;
  const isEnd = (bytes: Buffer): boolean => bytes.length === endRecordBytes && bytes.readUInt32LE(0) === 0x06054b50;
  const isThere = source.size >= endRecordBytes && isEnd(source.read(source.size - endRecordBytes, endRecordBytes));
  return isThere
    ? new CheckpointError(`${message} (its directory ends in ${place.at(-1)!.path})`)
    : new MisplacedBytesError(message, place, isEnd);
}

/** Offsets come from the file and may be anything; out of range is an error here and not an exception in a callback. */
class SourceReader extends RandomAccessReader {
  constructor(private readonly source: ByteSource) {
    super();
  }

  override read(
    buffer: Buffer,
    offset: number,
    length: number,
    position: number,
    callback: (error: Error | null, bytesRead: number) => void,
  ): void {
    queueMicrotask(() => {
      try {
        this.source.readInto(buffer.subarray(offset, offset + length), position);
      } catch (error) {
        return callback(error as Error, 0);
      }
      callback(null, length);
    });
  }
}
