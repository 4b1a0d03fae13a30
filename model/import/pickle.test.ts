import { describe, expect, test } from 'vitest';
import { CheckpointError } from '../../common/errors.js';
import { global, integer, modulePickle, op, tensor, text, tuple } from './fixtures/torch-archive.js';
import { parsePickle, PickleDict, TensorRef, Tuple } from './pickle.js';

const example = tensor({ storageType: 'HalfStorage', key: '7', storageElements: 24, offset: 4, shape: [2, 3], strides: [3, 1] });

function pickle(...parts: readonly (Buffer | readonly number[])[]): Buffer {
  return Buffer.concat([op.proto2, ...parts.map((part) => Buffer.from(part)), op.stop]);
}

test.each([
  { name: 'None', bytes: pickle(op.none), value: null },
  { name: 'True', bytes: pickle([0x88]), value: true },
  { name: '-2 as BININT', bytes: pickle([0x4a, 0xfe, 0xff, 0xff, 0xff]), value: -2 },
  { name: '-1 as LONG1', bytes: pickle([0x8a, 1, 0xff]), value: -1 },
  { name: '0 as LONG1 of no bytes', bytes: pickle([0x8a, 0]), value: 0 },
  { name: '2^63 as LONG1', bytes: pickle([0x8a, 9, 0, 0, 0, 0, 0, 0, 0, 0x80, 0]), value: 2n ** 63n },
  { name: '-2^63 as LONG4', bytes: pickle([0x8b, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80]), value: -(2n ** 63n) },
  { name: '-1.5', bytes: pickle([0x47, 0xbf, 0xf8, 0, 0, 0, 0, 0, 0]), value: -1.5 },
  { name: 'text', bytes: pickle(text('掩码')), value: '掩码' },
  { name: 'a list', bytes: pickle(op.emptyList, op.mark, text('a'), op.none, Buffer.from('e')), value: ['a', null] },
  { name: 'a nested tuple', bytes: pickle(tuple(integer(1), tuple(integer(2)))), value: new Tuple([1, new Tuple([2])]) },
  { name: 'a memo', bytes: pickle(text('a'), [0x71, 5], [0x68, 5], [0x86]), value: new Tuple(['a', 'a']) },
  {
    name: 'a dict with a frame, protocol 4',
    bytes: Buffer.from('\x80\x04\x95\x06\0\0\0\0\0\0\0}\x94\x8c\x01aNs.', 'latin1'),
    value: new PickleDict([['a', null]]),
  },
])('reads $name', ({ bytes, value }) => {
  expect(parsePickle(bytes, 'test')).toEqual(value);
});

test('reads a tensor as a description', () => {
  const ref = parsePickle(pickle(example), 'test') as TensorRef;
  expect(ref).toBeInstanceOf(TensorRef);
  expect({ ...ref, storage: { ...ref.storage } }).toEqual({
    storage: { type: 'torch.HalfStorage', key: '7', numElements: 24 },
    offset: 4,
    shape: [2, 3],
    strides: [3, 1],
  });
});

describe('a forbidden global is refused by its name and nothing is executed', () => {
  const call = (module: string, name: string): Buffer => Buffer.concat([global(module, name), tuple(text('touch executed')), op.reduce]);
  test.each([
    { name: 'os.system', bytes: pickle(call('os', 'system')) },
    { name: 'posix.system', bytes: pickle(call('posix', 'system')) },
    { name: 'builtins.eval', bytes: pickle(call('builtins', 'eval')) },
    { name: '__builtin__.exec', bytes: pickle(call('__builtin__', 'exec')) },
    { name: 'torch.load', bytes: pickle(call('torch', 'load')) },
    { name: 'torch.HalfStorage.__init__', bytes: pickle(call('torch', 'HalfStorage.__init__')) },
    { name: 'collections.OrderedDict.fromkeys', bytes: pickle(call('collections', 'OrderedDict.fromkeys')) },
    { name: 'numpy.core.multiarray._reconstruct', bytes: pickle(call('numpy.core.multiarray', '_reconstruct')) },
    { name: 'in the training state', full: 'os.system', bytes: modulePickle({ x: example }, { optimizer: call('os', 'system') }) },
    { name: 'not even called', full: 'os.system', bytes: pickle(global('os', 'system')) },
    { name: 'by STACK_GLOBAL', full: 'os.system', bytes: pickle(text('os'), text('system'), [0x93]) },
    { name: 'by INST', full: 'os.system', bytes: pickle(op.mark, Buffer.from('ios\nsystem\n')) },
    { name: 'with control characters', full: 'os.\\u001b[2Jsystem', bytes: pickle(global('os', '\u001b[2Jsystem')) },
  ])('$name', ({ name, full, bytes }) => {
    expectRefused(bytes, `test: the pickle names ${full ?? name}, which a checkpoint of tensors does not need`);
  });
});

describe('an allowed global is called in no other way than torch.save does', () => {
  const storage = Buffer.concat([
    tuple(text('storage'), global('torch', 'HalfStorage'), text('0'), text('cpu'), integer(4)),
    op.persistentId,
  ]);
  const rebuild = (...args: readonly Buffer[]): Buffer => pickle(global('torch._utils', '_rebuild_tensor_v2'), tuple(...args), op.reduce);
  test.each([
    {
      name: 'too few arguments',
      bytes: rebuild(storage, integer(0)),
      message: 'torch._utils._rebuild_tensor_v2 with 2 arguments, it takes 6 or 7',
    },
    {
      name: 'no storage',
      bytes: rebuild(op.none, integer(0), tuple(), tuple(), op.newFalse, op.none),
      message: 'the first argument is no storage',
    },
    {
      name: 'a shape that is text',
      bytes: rebuild(storage, integer(0), text('4'), tuple(), op.newFalse, op.none),
      message: 'the shape is no tuple of at most 8 numbers',
    },
    {
      name: 'a stride missing',
      bytes: rebuild(storage, integer(0), tuple(integer(4)), tuple(), op.newFalse, op.none),
      message: '1 dimensions but 0 strides',
    },
    {
      name: 'arguments that are a list',
      bytes: pickle(global('collections', 'OrderedDict'), op.emptyList, op.reduce),
      message: 'arguments of collections.OrderedDict are no tuple',
    },
    {
      name: 'an OrderedDict of something',
      bytes: pickle(global('collections', 'OrderedDict'), tuple(op.none), op.reduce),
      message: 'collections.OrderedDict with 1 arguments, it takes none',
    },
    {
      name: 'a parameter of no tensor',
      bytes: pickle(global('torch._utils', '_rebuild_parameter'), tuple(op.none), op.reduce),
      message: '_rebuild_parameter takes a tensor and two more arguments',
    },
    {
      name: 'a storage class called',
      bytes: pickle(global('torch', 'HalfStorage'), tuple(integer(1)), op.reduce),
      message: 'torch.HalfStorage is no function',
    },
    { name: 'text called', bytes: pickle(text('os.system'), tuple(), op.reduce), message: 'REDUCE calls something that is no global' },
    {
      name: 'state of a tensor',
      bytes: pickle(example, op.emptyDict, op.build),
      message: 'opcode BUILD sets the state of something that is no OrderedDict',
    },
    {
      name: 'another persistent id',
      bytes: pickle(tuple(text('module'), op.none), op.persistentId),
      message: 'a persistent id that is no storage',
    },
  ])('$name', ({ bytes, message }) => expectRefused(bytes, message));
});

describe('a damaged pickle', () => {
  test.each([
    {
      name: 'an object built by NEWOBJ',
      bytes: pickle(op.none, op.none, [0x81]),
      message: 'opcode 0x81 (NEWOBJ) is not allowed (offset 4)',
    },
    { name: 'an extension code', bytes: pickle([0x82, 1]), message: 'opcode 0x82 (EXT1) is not allowed (offset 2)' },
    { name: 'an unknown opcode', bytes: pickle([0xfe]), message: 'opcode 0xfe is not allowed (offset 2)' },
    { name: 'protocol 1', bytes: Buffer.from([0x80, 1, 0x4e, 0x2e]), message: 'protocol 1, this reader takes 2 to 5' },
    { name: 'no end', bytes: Buffer.from([0x80, 2, 0x4e]), message: 'the pickle ends in the middle of an opcode (offset 3)' },
    {
      name: 'text longer than the file',
      bytes: Buffer.from('X\xff\xff\xff\xffabc', 'latin1'),
      message: 'the pickle ends in the middle of an opcode',
    },
    {
      name: 'text of 2^64 - 1 bytes',
      bytes: Buffer.from('\x8d\xff\xff\xff\xff\xff\xff\xff\xff', 'latin1'),
      message: 'the pickle ends in the middle of an opcode',
    },
    {
      name: 'an integer of 2 GB',
      bytes: Buffer.from('\x8b\xff\xff\xff\x7f', 'latin1'),
      message: 'an integer of 2147483647 bytes, at most 1024 are read',
    },
    { name: 'an empty stack', bytes: pickle(), message: 'a value is missing on the stack' },
    { name: 'a value below a mark', bytes: pickle(op.none, op.mark, [0x85]), message: 'a value is missing on the stack' },
    { name: 'a mark missing', bytes: pickle(op.none, op.tuple), message: 'a mark is missing on the stack' },
    {
      name: 'a memo entry that was never stored',
      bytes: pickle([0x6a, 0xff, 0xff, 0xff, 0xff]),
      message: 'memo entry 4294967295 does not exist',
    },
    { name: 'values left over', bytes: pickle(op.none, op.none), message: 'values are left over at its end' },
    { name: 'half a dict item', bytes: pickle(op.emptyDict, op.mark, op.none, op.setItems), message: 'a dict key without a value' },
    {
      name: 'a list as a key',
      bytes: pickle(op.emptyDict, op.emptyList, op.none, op.setItem),
      message: 'a dict key that is a list or a dict',
    },
    { name: 'a name without an end', bytes: Buffer.from(`c${'x'.repeat(5000)}`), message: 'a name without an end of line' },
    { name: 'a stack without bound', bytes: Buffer.alloc(2 ** 21, 'N'), message: 'more than 1048576 values on the stack' },
    { name: 'marks without bound', bytes: Buffer.alloc(2 ** 21, '('), message: 'more than 1048576 marks' },
    {
      name: 'more bytes than are read',
      bytes: Buffer.alloc(2 ** 24 + 1),
      message: 'the pickle has 16777217 bytes, at most 16777216 are read',
    },
  ])('$name', ({ bytes, message }) => expectRefused(bytes, message));

  test('a dict that contains itself ends', () => {
    const dict = parsePickle(pickle(op.emptyDict, [0x71, 0], text('self'), [0x68, 0], op.setItem), 'test') as PickleDict;
    expect(dict.get('self')).toBe(dict);
  });

  test('3000 random changes give a value or a CheckpointError', () => {
    const original = modulePickle({ a: example, b: example }, { iteration: integer(49300), state: tuple(op.none, op.emptyList) });
    let state = 12345;
    const random = (below: number): number => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return Math.floor((state / 2 ** 32) * below);
    };
    let refused = 0;
    for (let i = 0; i < 3000; i++) {
      const bytes = Buffer.from(original.subarray(0, i % 4 === 0 ? random(original.length) : original.length));
      for (let change = 0; change <= random(3) && bytes.length > 0; change++) bytes[random(bytes.length)] = random(256);
      try {
        parsePickle(bytes, 'test');
      } catch (error) {
        expect(error, `change ${i}`).toBeInstanceOf(CheckpointError);
        refused++;
      }
    }
    expect(refused).toBeGreaterThan(1000);
    expect(refused).toBeLessThan(3000);
  });
});

function expectRefused(bytes: Buffer, message: string): void {
  let seen: unknown = null;
  try {
    parsePickle(bytes, 'test');
  } catch (error) {
    seen = error;
  }
  expect(seen).toBeInstanceOf(CheckpointError);
  expect((seen as Error).message).toContain(message);
  expect((seen as Error).message).not.toContain('\n');
}
