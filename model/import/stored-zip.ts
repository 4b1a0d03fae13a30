import { RandomAccessReader, fromRandomAccessReaderPromise, type Entry, type ZipFile } from 'yauzl';
import { CheckpointError } from '../../common/errors.js';
import { openRegularFile, readExactly, type OpenFile } from '../store/open-regular-file.js';

export interface ZipEntry {
  readonly name: string;
  readonly size: number;
  /** CRC-32 of the content, from the central directory. */
  readonly crc32: number;
}

// A rank of GLM-130B has about 850 entries.
const maxEntries = 1 << 18;

/**
 * A zip archive of uncompressed entries, read by byte ranges: what torch.save writes. Nothing is extracted, so entry names are only names.
 * Zip64 is read; compressed, encrypted and duplicate entries are refused.
 */
export class StoredZip {
  private readonly dataStarts = new Map<string, number>();

  private constructor(
    readonly path: string,
    private readonly file: OpenFile,
    private readonly zip: ZipFile,
    private readonly entriesByName: ReadonlyMap<string, Entry>,
  ) {}

  /** @throws CheckpointError where the file is no such archive */
  static async open(path: string): Promise<StoredZip> {
    const file = await openRegularFile(path);
    try {
      const reader = new OpenFileReader(file, path);
      const zip = await fromRandomAccessReaderPromise(reader, file.size, { autoClose: false });
      return new StoredZip(path, file, zip, await readDirectory(zip, path));
    } catch (error) {
      await file.handle.close();
      throw asCheckpointError(error, path);
    }
  }

  get entries(): ZipEntry[] {
    return [...this.entriesByName.values()].map((entry) => toZipEntry(entry));
  }

  entry(name: string): ZipEntry | undefined {
    const entry = this.entriesByName.get(name);
    return entry === undefined ? undefined : toZipEntry(entry);
  }

  /** Checks that the whole entry lies in the file, without reading it. @throws CheckpointError */
  async locate(name: string): Promise<void> {
    await this.dataStart(name);
  }

  /** Reads bytes [begin, end) of an entry. @throws CheckpointError where they do not lie in it, or the file ends before */
  async read(name: string, begin: number, end: number): Promise<Buffer> {
    const size = this.entriesByName.get(name)?.uncompressedSize ?? 0;
    if (!(begin >= 0 && begin <= end && end <= size)) {
      throw new CheckpointError(`${this.path}: entry ${name} has ${size} bytes, but bytes ${begin} to ${end} are needed`);
    }
    return readExactly(this.file, (await this.dataStart(name)) + begin, end - begin, this.path);
  }

  async close(): Promise<void> {
    this.zip.close();
    await this.file.handle.close();
  }

  private async dataStart(name: string): Promise<number> {
    const known = this.dataStarts.get(name);
    if (known !== undefined) return known;
    const entry = this.entriesByName.get(name);
    if (entry === undefined) throw new CheckpointError(`${this.path}: the archive has no entry ${name}`);
    try {
      const { fileDataStart } = await this.zip.readLocalFileHeaderPromise(entry, { minimal: true }); // checks the end against the file's size
      this.dataStarts.set(name, fileDataStart);
      return fileDataStart;
    } catch (error) {
      throw asCheckpointError(error, this.path);
    }
  }
}

async function readDirectory(zip: ZipFile, path: string): Promise<Map<string, Entry>> {
  if (zip.entryCount > maxEntries) {
    throw new CheckpointError(`${path}: the archive has ${zip.entryCount} entries, at most ${maxEntries} are read`);
  }
  const entries = new Map<string, Entry>();
  for await (const entry of zip.eachEntry()) {
    const name = entry.fileName;
    if (entries.has(name)) throw new CheckpointError(`${path}: the archive has two entries ${JSON.stringify(name)}`);
    if (entry.compressionMethod !== 0 || entry.isEncrypted()) {
      throw new CheckpointError(`${path}: entry ${JSON.stringify(name)} is compressed or encrypted; torch.save stores entries as they are`);
    }
    entries.set(name, entry);
  }
  return entries;
}

function toZipEntry(entry: Entry): ZipEntry {
  return { name: entry.fileName, size: entry.uncompressedSize, crc32: entry.crc32 };
}

/** yauzl's messages say what is wrong but not in which file. */
function asCheckpointError(error: unknown, path: string): Error {
  if (error instanceof CheckpointError) return error;
  return new CheckpointError(`${path} is no intact torch.save archive: ${(error as Error).message.split('\n')[0]}`);
}

/** Offsets come from the file and may be anything; out of range is an error here and not an exception in an fs callback. */
class OpenFileReader extends RandomAccessReader {
  constructor(
    private readonly file: OpenFile,
    private readonly path: string,
  ) {
    super();
  }

  override read(
    buffer: Buffer,
    offset: number,
    length: number,
    position: number,
    callback: (error: Error | null, bytesRead: number) => void,
  ): void {
    readExactly(this.file, position, length, this.path).then(
      (bytes) => callback(null, bytes.copy(buffer, offset)),
      (error: Error) => callback(error, 0),
    );
  }
}
