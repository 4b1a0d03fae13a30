import { CheckpointError } from '../../common/errors.js';

/**
 * What a pickle can hold here: plain data, and tensors described by numbers. Lists are arrays; tuples are {@link Tuple}; a dict's keys are
 * primitive values or tuples, the latter by identity.
 */
export type PickleValue =
  null | boolean | number | bigint | string | Uint8Array | PickleValue[] | Tuple | PickleDict | Global | StorageRef | TensorRef;

export class Tuple {
  constructor(readonly items: readonly PickleValue[]) {}
}
export class PickleDict extends Map<PickleValue, PickleValue> {}

/** One of {@link allowedGlobals}, as the pickle names it: `torch HalfStorage`. It is a word; nothing is imported. */
export class Global {
  constructor(readonly name: string) {}
}

/** A storage of the archive: `key` names its entry, `numElements` is what the pickle claims of it. */
export class StorageRef {
  constructor(
    readonly type: string,
    readonly key: string,
    readonly numElements: number,
  ) {}
}

/** A strided view of a storage; sizes and strides in elements, not yet checked against the storage. */
export class TensorRef {
  constructor(
    readonly storage: StorageRef,
    readonly offset: number,
    readonly shape: readonly number[],
    readonly strides: readonly number[],
  ) {}
}

const storageTypes = ['Half', 'Float', 'Double', 'BFloat16', 'Char', 'Byte', 'Short', 'Int', 'Long', 'Bool'].map(
  (type) => `torch.${type}Storage`,
);

/** All that a pickle may name. A dict of tensors needs no more; anything else is refused, wherever in the file it stands. */
export const allowedGlobals: ReadonlySet<string> = new Set([
  'collections.OrderedDict',
  'torch._utils._rebuild_tensor_v2',
  'torch._utils._rebuild_parameter',
  ...storageTypes,
]);

// A rank of GLM-130B has about 850 tensors in a pickle of 150 kB.
const maxPickleBytes = 16 * 2 ** 20;
const maxStack = 1 << 20;
const maxMemo = 1 << 20;
const maxIntegerBytes = 1024;

/**
 * Reads the pickle of a torch.save archive, protocols 2 to 5, and executes nothing: REDUCE is a switch over the few names of
 * {@link allowedGlobals}, BUILD is accepted on an OrderedDict only and ignored (PyTorch hangs `_metadata` there), and an opcode that is not
 * needed for plain data is refused.
 *
 * @param source what to call the file in an error
 * @throws CheckpointError names the global or the opcode and its offset
 */
export function parsePickle(bytes: Uint8Array, source: string): PickleValue {
  if (bytes.length > maxPickleBytes) {
    throw new CheckpointError(`${source}: the pickle has ${bytes.length} bytes, at most ${maxPickleBytes} are read`);
  }
  return new PickleMachine(bytes, source).run();
}

class PickleMachine {
  private readonly data: Buffer;
  private position = 0;
  private opcodeOffset = 0;
  private readonly stack: PickleValue[] = [];
  /** Stack heights at each MARK. */
  private readonly marks: number[] = [];
  private readonly memo = new Map<number, PickleValue>();

  constructor(
    bytes: Uint8Array,
    private readonly source: string,
  ) {
    this.data = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  run(): PickleValue {
    for (;;) {
      this.opcodeOffset = this.position;
      const opcode = this.uint(1);
      if (opcode === Opcode.STOP) break;
      this.execute(opcode);
      if (this.stack.length > maxStack) this.fail(`more than ${maxStack} values on the stack`);
    }
    const result = this.pop();
    if (this.stack.length > 0 || this.marks.length > 0) this.fail('values are left over at its end');
    return result;
  }

  private execute(opcode: number): void {
    switch (opcode) {
      case Opcode.PROTO: {
        const protocol = this.uint(1);
        if (protocol < 2 || protocol > 5) this.fail(`protocol ${protocol}, this reader takes 2 to 5`);
        return;
      }
      case Opcode.FRAME:
        this.take(8); // the length of a frame is a hint for readers of streams
        return;

      case Opcode.NONE:
        return this.push(null);
      case Opcode.NEWTRUE:
        return this.push(true);
      case Opcode.NEWFALSE:
        return this.push(false);
      case Opcode.BININT:
        return this.push(this.take(4).readInt32LE());
      case Opcode.BININT1:
        return this.push(this.uint(1));
      case Opcode.BININT2:
        return this.push(this.uint(2));
      case Opcode.LONG1:
        return this.push(this.longInteger(this.uint(1)));
      case Opcode.LONG4:
        return this.push(this.longInteger(this.uint(4)));
      case Opcode.BINFLOAT:
        return this.push(this.take(8).readDoubleBE());
      case Opcode.SHORT_BINUNICODE:
        return this.push(this.text(this.uint(1)));
      case Opcode.BINUNICODE:
        return this.push(this.text(this.uint(4)));
      case Opcode.BINUNICODE8:
        return this.push(this.text(this.uint8Bytes()));
      case Opcode.SHORT_BINSTRING:
        return this.push(this.take(this.uint(1)).toString('latin1'));
      case Opcode.BINSTRING:
        return this.push(this.take(this.uint(4)).toString('latin1'));
      case Opcode.SHORT_BINBYTES:
        return this.push(this.take(this.uint(1)));
      case Opcode.BINBYTES:
        return this.push(this.take(this.uint(4)));
      case Opcode.BINBYTES8:
        return this.push(this.take(this.uint8Bytes()));

      case Opcode.EMPTY_LIST:
        return this.push([]);
      case Opcode.EMPTY_DICT:
        return this.push(new PickleDict());
      case Opcode.EMPTY_TUPLE:
        return this.push(new Tuple([]));
      case Opcode.TUPLE1:
        return this.push(new Tuple(this.popMany(1)));
      case Opcode.TUPLE2:
        return this.push(new Tuple(this.popMany(2)));
      case Opcode.TUPLE3:
        return this.push(new Tuple(this.popMany(3)));
      case Opcode.MARK:
        if (this.marks.length >= maxStack) this.fail(`more than ${maxStack} marks`);
        this.marks.push(this.stack.length);
        return;
      case Opcode.TUPLE:
        return this.push(new Tuple(this.popToMark()));
      case Opcode.LIST:
        return this.push(this.popToMark());
      case Opcode.DICT: {
        const dict = new PickleDict();
        this.setItems(dict, this.popToMark());
        return this.push(dict);
      }
      case Opcode.APPEND: {
        const item = this.pop();
        this.topList().push(item);
        return;
      }
      case Opcode.APPENDS: {
        const items = this.popToMark();
        const list = this.topList();
        for (const item of items) list.push(item);
        return;
      }
      case Opcode.SETITEM: {
        const items = this.popMany(2);
        return this.setItems(this.topDict(), items);
      }
      case Opcode.SETITEMS: {
        const items = this.popToMark();
        return this.setItems(this.topDict(), items);
      }
      case Opcode.POP:
        this.pop();
        return;
      case Opcode.POP_MARK:
        this.popToMark();
        return;
      case Opcode.DUP:
        return this.push(this.top());

      case Opcode.BINPUT:
        return this.remember(this.uint(1));
      case Opcode.LONG_BINPUT:
        return this.remember(this.uint(4));
      case Opcode.MEMOIZE:
        return this.remember(this.memo.size);
      case Opcode.BINGET:
        return this.push(this.recall(this.uint(1)));
      case Opcode.LONG_BINGET:
        return this.push(this.recall(this.uint(4)));

      case Opcode.GLOBAL:
        return this.push(this.global(this.line(), this.line()));
      case Opcode.STACK_GLOBAL: {
        const [module, name] = this.popMany(2);
        if (typeof module !== 'string' || typeof name !== 'string') this.fail('a global whose name is not text');
        return this.push(this.global(module, name));
      }
      case Opcode.INST: // never written by protocol 2; read this far so that the message can name what it wanted
        this.global(this.line(), this.line());
        return this.fail('opcode 0x69 (INST) is not allowed');
      case Opcode.BINPERSID:
        return this.push(this.storage(this.pop()));
      case Opcode.REDUCE: {
        const [callee, args] = this.popMany(2);
        return this.push(this.reduce(callee, args));
      }
      case Opcode.BUILD: {
        this.pop();
        if (!(this.top() instanceof PickleDict)) this.fail('opcode BUILD sets the state of something that is no OrderedDict');
        return;
      }

      default: {
        const name = refusedOpcodes[opcode];
        return this.fail(`opcode 0x${opcode.toString(16).padStart(2, '0')}${name === undefined ? '' : ` (${name})`} is not allowed`);
      }
    }
  }

  /** The only place where a pickle has an effect beyond plain data; each callee takes exactly the arguments that torch.save writes. */
  private reduce(callee: PickleValue | undefined, args: PickleValue | undefined): PickleValue {
    if (!(callee instanceof Global)) this.fail('REDUCE calls something that is no global');
    if (!(args instanceof Tuple)) this.fail(`arguments of ${callee.name} are no tuple`);
    switch (callee.name) {
      case 'collections.OrderedDict':
        if (args.items.length !== 0) this.fail(`${callee.name} with ${args.items.length} arguments, it takes none`);
        return new PickleDict();
      case 'torch._utils._rebuild_tensor_v2':
        return this.rebuildTensor(args.items);
      case 'torch._utils._rebuild_parameter': {
        const [tensor] = args.items;
        if (args.items.length !== 3 || !(tensor instanceof TensorRef)) this.fail(`${callee.name} takes a tensor and two more arguments`);
        return tensor;
      }
      default:
        return this.fail(`${callee.name} is no function`);
    }
  }

  /** (storage, offset, size, stride, requires_grad, backward_hooks[, metadata]): torch/_utils.py. */
  private rebuildTensor(args: readonly PickleValue[]): TensorRef {
    const name = 'torch._utils._rebuild_tensor_v2';
    const [storage, offset, shape, strides] = args;
    if (args.length !== 6 && args.length !== 7) this.fail(`${name} with ${args.length} arguments, it takes 6 or 7`);
    if (!(storage instanceof StorageRef)) this.fail(`${name}: the first argument is no storage`);
    const dims = this.sizes(shape, `${name}: the shape`);
    const steps = this.sizes(strides, `${name}: the strides`);
    if (dims.length !== steps.length) this.fail(`${name}: ${dims.length} dimensions but ${steps.length} strides`);
    return new TensorRef(storage, this.size(offset, `${name}: the offset`), dims, steps);
  }

  /** ('storage', type, key, device, number of elements): torch/serialization.py, persistent_id. */
  private storage(id: PickleValue): StorageRef {
    if (!(id instanceof Tuple) || id.items.length !== 5 || id.items[0] !== 'storage') this.fail('a persistent id that is no storage');
    const [, type, key, , numElements] = id.items;
    if (!(type instanceof Global) || !storageTypes.includes(type.name)) this.fail('a storage whose type is no storage class');
    if (typeof key !== 'string') this.fail('a storage whose key is not text');
    return new StorageRef(type.name, key, this.size(numElements, `storage ${key}: the number of elements`));
  }

  private sizes(value: PickleValue | undefined, what: string): number[] {
    if (!(value instanceof Tuple) || value.items.length > 8) this.fail(`${what} is no tuple of at most 8 numbers`);
    return value.items.map((item) => this.size(item, what));
  }

  private size(value: PickleValue | undefined, what: string): number {
    if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < 0) this.fail(`${what} is no whole number from 0 to 2^53 - 1`);
    return value;
  }

  private global(module: string, name: string): Global {
    const full = `${module}.${name}`;
    if (!allowedGlobals.has(full)) {
      throw new CheckpointError(
        `${this.source}: the pickle names ${printable(full)}, which a checkpoint of tensors does not need (offset ${this.opcodeOffset}); ` +
          'nothing was executed, do not load this file with other programs',
      );
    }
    return new Global(full);
  }

  private setItems(dict: PickleDict, items: readonly PickleValue[]): void {
    if (items.length % 2 !== 0) this.fail('a dict key without a value');
    for (let i = 0; i < items.length; i += 2) {
      const key = items[i]!;
      if (Array.isArray(key) || key instanceof PickleDict) this.fail('a dict key that is a list or a dict');
      dict.set(key, items[i + 1]!);
    }
  }

  private push(value: PickleValue): void {
    this.stack.push(value);
  }

  private pop(): PickleValue {
    if (this.stack.length <= (this.marks.at(-1) ?? 0)) this.fail('a value is missing on the stack');
    return this.stack.pop()!;
  }

  private popMany(count: number): PickleValue[] {
    if (this.stack.length - count < (this.marks.at(-1) ?? 0)) this.fail('a value is missing on the stack');
    return this.stack.splice(this.stack.length - count);
  }

  private popToMark(): PickleValue[] {
    const mark = this.marks.pop();
    if (mark === undefined) this.fail('a mark is missing on the stack');
    return this.stack.splice(mark);
  }

  private top(): PickleValue {
    if (this.stack.length <= (this.marks.at(-1) ?? 0)) this.fail('a value is missing on the stack');
    return this.stack.at(-1)!;
  }

  private topList(): PickleValue[] {
    const list = this.top();
    if (!Array.isArray(list)) this.fail('an item is appended to something that is no list');
    return list;
  }

  private topDict(): PickleDict {
    const dict = this.top();
    if (!(dict instanceof PickleDict)) this.fail('an item is set in something that is no dict');
    return dict;
  }

  private remember(index: number): void {
    this.memo.set(index, this.top());
    if (this.memo.size > maxMemo) this.fail(`more than ${maxMemo} memo entries`);
  }

  private recall(index: number): PickleValue {
    const value = this.memo.get(index);
    if (value === undefined) this.fail(`memo entry ${index} does not exist`);
    return value;
  }

  private take(length: number): Buffer {
    if (length > this.data.length - this.position) this.fail('the pickle ends in the middle of an opcode');
    this.position += length;
    return this.data.subarray(this.position - length, this.position);
  }

  private uint(length: 1 | 2 | 4): number {
    return this.take(length).readUIntLE(0, length);
  }

  private uint8Bytes(): number {
    const value = this.take(8).readBigUInt64LE();
    return value > BigInt(maxPickleBytes) ? Infinity : Number(value); // take() refuses infinity
  }

  private text(length: number): string {
    return this.take(length).toString('utf8');
  }

  private line(): string {
    const end = this.data.indexOf(0x0a, this.position);
    if (end < 0 || end - this.position > 1000) this.fail('a name without an end of line');
    const text = this.text(end - this.position);
    this.position = end + 1;
    return text;
  }

  /** Two's complement, little-endian. */
  private longInteger(length: number): number | bigint {
    if (length > maxIntegerBytes) this.fail(`an integer of ${length} bytes, at most ${maxIntegerBytes} are read`);
    if (length === 0) return 0;
    const hex = Buffer.from(this.take(length)).reverse().toString('hex');
    const value = BigInt.asIntN(length * 8, BigInt(`0x${hex}`));
    return value >= Number.MIN_SAFE_INTEGER && value <= Number.MAX_SAFE_INTEGER ? Number(value) : value;
  }

  private fail(what: string): never {
    throw new CheckpointError(`${this.source}: damaged or unsupported pickle, ${what} (offset ${this.opcodeOffset})`);
  }
}

/** A name from the file, fit for one line of a terminal. */
function printable(text: string): string {
  return JSON.stringify(text).slice(1, -1).slice(0, 200);
}

const Opcode = {
  MARK: 0x28,
  EMPTY_TUPLE: 0x29,
  STOP: 0x2e,
  POP: 0x30,
  POP_MARK: 0x31,
  DUP: 0x32,
  BINBYTES: 0x42,
  SHORT_BINBYTES: 0x43,
  BINFLOAT: 0x47,
  BININT: 0x4a,
  BININT1: 0x4b,
  BININT2: 0x4d,
  NONE: 0x4e,
  BINPERSID: 0x51,
  REDUCE: 0x52,
  BINSTRING: 0x54,
  SHORT_BINSTRING: 0x55,
  BINUNICODE: 0x58,
  EMPTY_LIST: 0x5d,
  APPEND: 0x61,
  BUILD: 0x62,
  GLOBAL: 0x63,
  DICT: 0x64,
  APPENDS: 0x65,
  BINGET: 0x68,
  INST: 0x69,
  LONG_BINGET: 0x6a,
  LIST: 0x6c,
  BINPUT: 0x71,
  LONG_BINPUT: 0x72,
  SETITEM: 0x73,
  TUPLE: 0x74,
  SETITEMS: 0x75,
  EMPTY_DICT: 0x7d,
  PROTO: 0x80,
  TUPLE1: 0x85,
  TUPLE2: 0x86,
  TUPLE3: 0x87,
  NEWTRUE: 0x88,
  NEWFALSE: 0x89,
  LONG1: 0x8a,
  LONG4: 0x8b,
  SHORT_BINUNICODE: 0x8c,
  BINUNICODE8: 0x8d,
  BINBYTES8: 0x8e,
  STACK_GLOBAL: 0x93,
  MEMOIZE: 0x94,
  FRAME: 0x95,
} as const;

/** Names for the message only: opcodes that build objects or belong to protocols 0 and 1. */
const refusedOpcodes: Readonly<Record<number, string>> = {
  0x46: 'FLOAT',
  0x49: 'INT',
  0x4c: 'LONG',
  0x50: 'PERSID',
  0x53: 'STRING',
  0x56: 'UNICODE',
  0x67: 'GET',
  0x6f: 'OBJ',
  0x70: 'PUT',
  0x81: 'NEWOBJ',
  0x82: 'EXT1',
  0x83: 'EXT2',
  0x84: 'EXT4',
  0x8f: 'EMPTY_SET',
  0x90: 'ADDITEMS',
  0x91: 'FROZENSET',
  0x92: 'NEWOBJ_EX',
  0x96: 'BYTEARRAY8',
  0x97: 'NEXT_BUFFER',
  0x98: 'READONLY_BUFFER',
};
