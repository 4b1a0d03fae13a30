import { join } from 'node:path';
import { FileSink, type ByteSink } from '../export/byte-sink.js';

/** What a tar archive is going to hold: a file's size is known before its content. */
export interface PlannedTarFile {
  readonly name: string;
  readonly bytes: number;
}

/**
 * A GNU tar archive cut into files of equal size, named as `split` names them: `glm-130b-sat.tar.part_00`, ... The content of each file comes
 * through {@link write} after {@link startFile}.
 */
export class TarPartsWriter implements ByteSink {
  private readonly partBytes: number;
  private part: { sink: FileSink; bytesLeft: number } | null = null;
  private nextPart = 0;
  private padding = 0;

  constructor(
    private readonly dir: string,
    private readonly archiveName: string,
    private readonly parts: number,
    private readonly files: readonly PlannedTarFile[],
  ) {
    this.partBytes = Math.ceil(tarBytes(files) / parts);
  }

  async startFile(file: PlannedTarFile): Promise<void> {
    await this.endFile();
    await this.write(tarHeader(file));
    this.padding = paddingOf(file.bytes);
  }

  async write(bytes: Uint8Array): Promise<void> {
    for (let done = 0; done < bytes.length;) {
      this.part ??= { sink: await FileSink.create(join(this.dir, this.nextName())), bytesLeft: this.partBytes };
      const count = Math.min(this.part.bytesLeft, bytes.length - done);
      await this.part.sink.write(bytes.subarray(done, done + count));
      done += count;
      this.part.bytesLeft -= count;
      if (this.part.bytesLeft > 0) continue;
      await this.part.sink.finish();
      this.part = null;
    }
  }

  async finish(): Promise<void> {
    await this.endFile();
    await this.write(Buffer.alloc(endBytes(this.files)));
    await this.part?.sink.finish();
  }

  async abandon(): Promise<void> {
    await this.part?.sink.abandon();
  }

  private async endFile(): Promise<void> {
    if (this.padding > 0) await this.write(Buffer.alloc(this.padding));
    this.padding = 0;
  }

  private nextName(): string {
    const digits = Math.max(2, String(this.parts - 1).length);
    return `${this.archiveName}.part_${String(this.nextPart++).padStart(digits, '0')}`;
  }
}

const blockBytes = 512;
/** GNU tar ends with zeros up to a multiple of this. */
const recordBytes = 20 * blockBytes;

function contentBytes(files: readonly PlannedTarFile[]): number {
  return files.reduce((sum, { bytes }) => sum + blockBytes + bytes + paddingOf(bytes), 0);
}

function endBytes(files: readonly PlannedTarFile[]): number {
  const content = contentBytes(files) + 2 * blockBytes;
  return 2 * blockBytes + ((recordBytes - (content % recordBytes)) % recordBytes);
}

export function tarBytes(files: readonly PlannedTarFile[]): number {
  return contentBytes(files) + endBytes(files);
}

function paddingOf(bytes: number): number {
  return (blockBytes - (bytes % blockBytes)) % blockBytes;
}

/** A name that ends in a slash is a folder. Sizes of 8 GiB and more are in base 256, GNU tar's way. */
function tarHeader({ name, bytes }: PlannedTarFile): Buffer {
  const header = Buffer.alloc(blockBytes);
  const isFolder = name.endsWith('/');
  header.write(name, 0, 100, 'utf8');
  header.write(isFolder ? '0000755\0' : '0000644\0', 100, 'latin1');
  header.write('0000000\0', 108, 'latin1');
  header.write('0000000\0', 116, 'latin1');
  if (bytes < 8 ** 11) header.write(`${bytes.toString(8).padStart(11, '0')}\0`, 124, 'latin1');
  else {
    header.writeUInt8(0x80, 124);
    header.writeBigUInt64BE(BigInt(bytes), 128);
  }
  header.write('00000000000\0', 136, 'latin1');
  header.fill(' ', 148, 156);
  header.write(isFolder ? '5' : '0', 156, 'latin1');
  header.write('ustar  \0', 257, 'latin1');
  const sum = header.reduce((total, byte) => total + byte, 0);
  header.write(`${sum.toString(8).padStart(6, '0')}\0 `, 148, 'latin1');
  return header;
}
