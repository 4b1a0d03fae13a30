import { crc32 as zlibCrc32 } from 'node:zlib';
import type { TorchDtype } from '../import/torch-tensor.js';
import type { Crc32 } from '../import/tensor-reader.js';
import type { ByteSink } from './byte-sink.js';

/** A dense tensor that a file is going to hold. */
export interface PlannedTorchTensor {
  readonly name: string;
  readonly dtype: 'float16' | 'float32' | 'int8';
  readonly shape: readonly number[];
}

/** Where everything in the file goes; sizes are all that it depends on, so it is known before the first byte of data. */
export interface TorchLayout {
  readonly tensors: readonly PlannedTorchTensor[];
  readonly pickle: Buffer;
  readonly entries: readonly TorchEntry[];
  readonly directoryOffset: number;
  /** Of the whole file. */
  readonly bytes: number;
}

interface TorchEntry {
  readonly name: string;
  readonly offset: number;
  /** Local header, name and padding. */
  readonly headerBytes: number;
  readonly size: number;
}

const dtypes: Readonly<Record<PlannedTorchTensor['dtype'] & TorchDtype, { storage: string; itemBytes: number }>> = {
  float16: { storage: 'HalfStorage', itemBytes: 2 },
  float32: { storage: 'FloatStorage', itemBytes: 4 },
  int8: { storage: 'CharStorage', itemBytes: 1 },
};

const version = Buffer.from('3\n'); // of torch.save's zip layout
const max32 = 0xffffffff;

/**
 * The layout that torch.save gives `{ "module": { name: tensor, ... } }`: an uncompressed zip (zip64 where an entry or the file needs it), a
 * protocol 2 pickle, each storage aligned to 64 bytes, sizes and CRCs behind the data.
 *
 * @param root folder inside the archive: the file's name without `.pt`, as torch.save has it
 */
export function layOutTorchFile(root: string, tensors: readonly PlannedTorchTensor[]): TorchLayout {
  const pickle = modulePickle(tensors);
  const contents = [
    { name: 'data.pkl', size: pickle.length },
    ...tensors.map((tensor, key) => ({ name: `data/${key}`, size: plannedBytes(tensor) })),
    { name: 'version', size: version.length },
  ];
  let offset = 0;
  const entries = contents.map(({ name, size }): TorchEntry => {
    const entry = { name: `${root}/${name}`, offset, size, headerBytes: 0 };
    const headerBytes = localHeader(entry).length;
    offset += headerBytes + size + descriptorBytes(entry);
    return { ...entry, headerBytes };
  });
  const directoryBytes = entries.reduce((sum, entry) => sum + directoryEntry(entry, 0).length, 0);
  return { tensors, pickle, entries, directoryOffset: offset, bytes: offset + directoryBytes + endBytes };
}

export function plannedBytes({ dtype, shape }: PlannedTorchTensor): number {
  return shape.reduce((bytes, count) => bytes * count, dtypes[dtype].itemBytes);
}

/** Streams a torch.save file: tensors come in the planned order, each in any number of pieces. */
export class TorchFileWriter {
  private readonly crcs: number[] = [];
  private next = 0;
  private current: { bytesLeft: number; crc: number } | null = null;

  private constructor(
    private readonly sink: ByteSink,
    private readonly layout: TorchLayout,
    private readonly crc32: Crc32,
  ) {}

  static async create(sink: ByteSink, layout: TorchLayout, crc32: Crc32 = zlibCrc32): Promise<TorchFileWriter> {
    const writer = new TorchFileWriter(sink, layout, crc32);
    await writer.writeEntry(layout.pickle);
    return writer;
  }

  /** `bytes` have to stay as they are until the next call has returned: see {@link ByteSink}. */
  async append(name: string, bytes: Uint8Array): Promise<void> {
    const tensor = this.layout.tensors[this.next];
    if (tensor?.name !== name) throw new Error(`tensor ${name} is written where ${tensor?.name ?? 'nothing'} is due`);
    if (this.current === null) {
      await this.sink.write(localHeader(this.entry()));
      this.current = { bytesLeft: plannedBytes(tensor), crc: 0 };
    }
    if (bytes.length > this.current.bytesLeft) throw new Error(`tensor ${name} gets more bytes than its shape has`);
    await this.sink.write(bytes);
    this.current.crc = this.crc32(bytes, this.current.crc);
    this.current.bytesLeft -= bytes.length;
    if (this.current.bytesLeft > 0) return;
    await this.endEntry(this.current.crc);
    this.current = null;
    this.next++;
  }

  /** Writes what follows the data. The sink stays open. */
  async finish(): Promise<void> {
    const missing = this.layout.tensors[this.next];
    if (missing !== undefined) throw new Error(`tensor ${missing.name} was never written`);
    await this.writeEntry(version);
    const directory = Buffer.concat(this.layout.entries.map((entry, i) => directoryEntry(entry, this.crcs[i]!)));
    await this.sink.write(directory);
    await this.sink.write(archiveEnd(this.layout.entries.length, this.layout.directoryOffset, directory.length));
  }

  private async writeEntry(content: Buffer): Promise<void> {
    await this.sink.write(localHeader(this.entry()));
    await this.sink.write(content);
    await this.endEntry(zlibCrc32(content));
  }

  private async endEntry(crc: number): Promise<void> {
    await this.sink.write(descriptor(this.entry(), crc));
    this.crcs.push(crc);
  }

  /** The one that is being written: entry i is begun when i CRCs are known. */
  private entry(): TorchEntry {
    return this.layout.entries[this.crcs.length]!;
  }
}

// --- zip: as PyTorch's PyTorchStreamWriter writes it (caffe2/serialize/inline_container.cc) ------------------------------------------

const alignment = 64;
/** Sizes follow the data; names are UTF-8. */
const flags = 0x0808;
/** Zip64 end record, its locator, end record. */
const endBytes = 56 + 20 + 22;

/** The zip64 field has what does not fit 32 bits, in this order. */
function zip64Field({ size, offset }: Pick<TorchEntry, 'size' | 'offset'>): Buffer {
  const values = [...(size >= max32 ? [size, size] : []), ...(offset >= max32 ? [offset] : [])];
  if (values.length === 0) return Buffer.alloc(0);
  const field = Buffer.alloc(4 + 8 * values.length);
  field.writeUInt16LE(1, 0);
  field.writeUInt16LE(8 * values.length, 2);
  for (const [i, value] of values.entries()) field.writeBigUInt64LE(BigInt(value), 4 + 8 * i);
  return field;
}

function localHeader(entry: Pick<TorchEntry, 'name' | 'size' | 'offset'>): Buffer {
  const name = Buffer.from(entry.name, 'utf8');
  const zip64 = zip64Field(entry);
  const unpadded = entry.offset + 30 + name.length + zip64.length + 4;
  const padding = (alignment - (unpadded % alignment)) % alignment;
  const header = Buffer.alloc(30 + name.length + zip64.length + 4 + padding, 'Z');
  header.fill(0, 0, 30);
  header.write('PK\x03\x04', 0, 'latin1');
  header.writeUInt16LE(flags, 6);
  header.writeUInt16LE(name.length, 26);
  header.writeUInt16LE(header.length - 30 - name.length, 28);
  name.copy(header, 30);
  zip64.copy(header, 30 + name.length);
  header.write('FB', 30 + name.length + zip64.length, 'latin1');
  header.writeUInt16LE(padding, 32 + name.length + zip64.length);
  return header;
}

function descriptorBytes(entry: Pick<TorchEntry, 'size' | 'offset'>): number {
  return zip64Field(entry).length > 0 ? 24 : 16;
}

function descriptor(entry: TorchEntry, crc: number): Buffer {
  const bytes = Buffer.alloc(descriptorBytes(entry));
  bytes.write('PK\x07\x08', 0, 'latin1');
  bytes.writeUInt32LE(crc, 4);
  if (bytes.length === 24) {
    bytes.writeBigUInt64LE(BigInt(entry.size), 8);
    bytes.writeBigUInt64LE(BigInt(entry.size), 16);
  } else {
    bytes.writeUInt32LE(entry.size, 8);
    bytes.writeUInt32LE(entry.size, 12);
  }
  return bytes;
}

function directoryEntry(entry: TorchEntry, crc: number): Buffer {
  const zip64 = zip64Field(entry);
  const fixed = Buffer.alloc(46);
  fixed.write('PK\x01\x02', 0, 'latin1');
  fixed.writeUInt16LE(flags, 8);
  fixed.writeUInt32LE(crc, 16);
  fixed.writeUInt32LE(Math.min(entry.size, max32), 20);
  fixed.writeUInt32LE(Math.min(entry.size, max32), 24);
  const name = Buffer.from(entry.name, 'utf8');
  fixed.writeUInt16LE(name.length, 28);
  fixed.writeUInt16LE(zip64.length, 30);
  fixed.writeUInt32LE(Math.min(entry.offset, max32), 42);
  return Buffer.concat([fixed, name, zip64]);
}

function archiveEnd(entries: number, directoryOffset: number, directoryBytes: number): Buffer {
  const end = Buffer.alloc(endBytes);
  end.write('PK\x06\x06', 0, 'latin1');
  end.writeBigUInt64LE(44n, 4);
  end.writeUInt16LE(0x031e, 12);
  end.writeUInt16LE(45, 14);
  end.writeBigUInt64LE(BigInt(entries), 24);
  end.writeBigUInt64LE(BigInt(entries), 32);
  end.writeBigUInt64LE(BigInt(directoryBytes), 40);
  end.writeBigUInt64LE(BigInt(directoryOffset), 48);
  end.write('PK\x06\x07', 56, 'latin1');
  end.writeBigUInt64LE(BigInt(directoryOffset + directoryBytes), 64);
  end.writeUInt32LE(1, 72);
  end.write('PK\x05\x06', 76, 'latin1');
  end.writeUInt16LE(Math.min(entries, 0xffff), 84);
  end.writeUInt16LE(Math.min(entries, 0xffff), 86);
  end.writeUInt32LE(Math.min(directoryBytes, max32), 88);
  end.writeUInt32LE(Math.min(directoryOffset, max32), 92);
  return end;
}

// --- pickle: as Python's pickler writes protocol 2 -----------------------------------------------------------------------------------

/** Items that Python's pickler sets with one SETITEMS. */
const batchItems = 1000;

function modulePickle(tensors: readonly PlannedTorchTensor[]): Buffer {
  const pickle = new Pickler();
  pickle.op('}').memoize().text('module').op('}').memoize();
  for (let begin = 0; begin < tensors.length; begin += batchItems) {
    const batch = tensors.slice(begin, begin + batchItems);
    if (batch.length > 1) pickle.op('(');
    for (const [i, tensor] of batch.entries()) pickleTensor(pickle.text(tensor.name), tensor, begin + i);
    pickle.op(batch.length > 1 ? 'u' : 's');
  }
  return pickle.op('s').op('.').bytes();
}

/** torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks) */
function pickleTensor(pickle: Pickler, { dtype, shape }: PlannedTorchTensor, key: number): void {
  const elements = shape.reduce((product, count) => product * count, 1);
  const strides = shape.map((_, axis) => shape.slice(axis + 1).reduce((product, count) => product * count, 1));
  pickle.global('torch._utils', '_rebuild_tensor_v2').op('(');
  pickle.op('(').shared('storage').global('torch', dtypes[dtype].storage).text(String(key)).shared('cpu').integer(elements);
  pickle.op('t').memoize().op('Q');
  pickle.integer(0).sizes(shape).sizes(strides).op('\x89');
  pickle.global('collections', 'OrderedDict').op(')').op('R').memoize();
  pickle.op('t').memoize().op('R').memoize();
}

class Pickler {
  private readonly parts: Buffer[] = [Buffer.from([0x80, 2])];
  private memoSize = 0;
  private readonly memo = new Map<string, number>();

  op(opcode: string): this {
    this.parts.push(Buffer.from(opcode, 'latin1'));
    return this;
  }

  memoize(): this {
    return this.indexed('q', 'r', this.memoSize++);
  }

  text(value: string): this {
    const bytes = Buffer.from(value, 'utf8');
    const length = Buffer.alloc(5, 'X');
    length.writeUInt32LE(bytes.length, 1);
    this.parts.push(length, bytes);
    return this.memoize();
  }

  /** Text that Python holds once, so that its pickler refers back to it. */
  shared(value: string): this {
    return this.once(value, () => this.text(value));
  }

  global(module: string, name: string): this {
    return this.once(`${module}\n${name}`, () => this.op(`c${module}\n${name}\n`).memoize());
  }

  /** From 0 on. */
  integer(value: number): this {
    const bytes = Buffer.alloc(10);
    if (value < 2 ** 8) {
      bytes.write('K', 'latin1');
      bytes.writeUInt8(value, 1);
      this.parts.push(bytes.subarray(0, 2));
    } else if (value < 2 ** 16) {
      bytes.write('M', 'latin1');
      bytes.writeUInt16LE(value, 1);
      this.parts.push(bytes.subarray(0, 3));
    } else if (value < 2 ** 31) {
      bytes.write('J', 'latin1');
      bytes.writeInt32LE(value, 1);
      this.parts.push(bytes.subarray(0, 5));
    } else {
      // LONG1: two's complement in as few bytes as it takes
      const length = (value.toString(2).length >> 3) + 1;
      bytes.write('\x8a', 'latin1');
      bytes.writeUInt8(length, 1);
      bytes.writeBigInt64LE(BigInt(value), 2);
      this.parts.push(bytes.subarray(0, 2 + length));
    }
    return this;
  }

  sizes(values: readonly number[]): this {
    if (values.length === 0) return this.op(')'); // the empty tuple is not memoized
    if (values.length > 3) this.op('(');
    for (const value of values) this.integer(value);
    return this.op(['', '\x85', '\x86', '\x87'][values.length] ?? 't').memoize();
  }

  bytes(): Buffer {
    return Buffer.concat(this.parts);
  }

  private once(key: string, write: () => void): this {
    const known = this.memo.get(key);
    if (known !== undefined) return this.indexed('h', 'j', known);
    write();
    this.memo.set(key, this.memoSize - 1);
    return this;
  }

  private indexed(short: string, long: string, index: number): this {
    const bytes = Buffer.alloc(index < 256 ? 2 : 5);
    bytes.write(index < 256 ? short : long, 'latin1');
    if (index < 256) bytes.writeUInt8(index, 1);
    else bytes.writeUInt32LE(index, 1);
    this.parts.push(bytes);
    return this;
  }
}
