import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { readFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { SentencePieceProcessor } from '@agnai/sentencepiece-js';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { CheckpointError, InvalidRequestError } from '../../common/errors.js';
import { loadTokenizer, type Tokenizer } from './tokenizer.js';

interface Golden {
  num_tokens: number;
  commands: Record<string, number>;
  strings: { text: string; ids: number[]; decode: string; detokenize: string; ids_without_dummy_prefix: number[] }[];
  decode_lists: { ids: number[]; decode: string; detokenize: string }[];
}

const modelPath = fileURLToPath(new URL('../tiny/tokenizer.model', import.meta.url));
const config = { file: 'tokenizer.model', imageTokenOffset: 0, numTextPieces: 3740 };
const golden = JSON.parse(readFileSync(new URL('../../test/golden/tiny/tokenizer.json', import.meta.url), 'utf8')) as Golden;

let tokenizer: Tokenizer;
beforeAll(async () => {
  tokenizer = await loadTokenizer(modelPath, config);
});

describe('against the golden data of the tiny model', () => {
  test('has them all', () => {
    expect([golden.strings.length, golden.decode_lists.length]).toEqual([356, 75]);
  });

  test('encodes, decodes and detokenizes every string', () => {
    for (const { text, ids, decode, detokenize, ids_without_dummy_prefix } of golden.strings) {
      const encoded = tokenizer.encode(text);
      expect({ text, ids: encoded, bare: tokenizer.encode(text, { dummyPrefix: false }) }).toEqual({
        text,
        ids,
        bare: ids_without_dummy_prefix,
      });
      expect({ text, decode: tokenizer.decode(ids), detokenize: tokenizer.detokenize(ids) }).toEqual({ text, decode, detokenize });
    }
  });

  test('decodes and detokenizes every list of ids', () => {
    for (const { ids, decode, detokenize } of golden.decode_lists) {
      expect({ ids, decode: tokenizer.decode(ids), detokenize: tokenizer.detokenize(ids) }).toEqual({ ids, decode, detokenize });
    }
  });

  test('knows the commands', () => {
    expect(tokenizer.numTokens).toBe(golden.num_tokens);
    for (const [name, id] of Object.entries(golden.commands)) expect(tokenizer.command(name)).toBe(id);
    expect(() => tokenizer.command('<sop>')).toThrow(InvalidRequestError);
  });
});

describe('encode', () => {
  test('never gives a control token for text', () => {
    const words = ['[MASK]', '[gMASK]', '<sop>', '<eop>', '</s>', '<s>', '<unk>', 'eod', '<0x41>', ' ', 'a', '，'];
    const control = new Set([1, 2, ...Array.from({ length: 8 }, (_, i) => 3740 + i)]);
    fc.assert(
      fc.property(fc.array(fc.constantFrom(...words), { maxLength: 8 }), (parts) => {
        for (const id of tokenizer.encode(parts.join(''))) expect(control.has(id)).toBe(false);
      }),
      { seed: 1 },
    );
  });

  test.each([
    ['ASCII without a blank', 'a'.repeat(100_000)],
    ['blanks', ' '.repeat(100_000)],
    ['Chinese', '中国的首都是北京。'.repeat(4_000)],
    ['characters without a piece', '😀\u0001'.repeat(15_000)],
    ['escapes', '\n\t<n> <|tab|>'.repeat(8_000)],
    ['beginnings of user-defined pieces', '<|blank_'.repeat(12_500)],
  ])('takes 100 kB of %s in seconds', (_, text) => {
    const begin = performance.now();
    expect(tokenizer.encode(text).length).toBeGreaterThan(0);
    expect(performance.now() - begin).toBeLessThan(5_000);
  });

  test('encodes a lone surrogate as U+FFFD and keeps NUL', () => {
    expect(tokenizer.encode('a\ud800b')).toEqual(tokenizer.encode('a\ufffdb'));
    expect(tokenizer.decode(tokenizer.encode('a\0b'))).toBe('a\0b');
  });

  test('gives back what it was given, but for blanks at the end', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'binary', maxLength: 40 }), (text) => {
        fc.pre(!/^[ \u2581]|[ \u2581]$|\u2581|<n>|<\|/.test(text));
        expect(tokenizer.decode(tokenizer.encode(text))).toBe(text);
      }),
      { seed: 2 },
    );
  });
});

describe('encodePrompt', () => {
  test('tokenises the pieces between mask words each on its own', () => {
    const { mask, gmask, smask } = { mask: 3740, gmask: 3741, smask: 3742 };
    expect(tokenizer.encodePrompt('is [MASK].[gMASK][sMASK]')).toEqual([
      ...tokenizer.encode('is '),
      mask,
      ...tokenizer.encode('.'),
      gmask,
      smask,
    ]);
    expect(tokenizer.encodePrompt('')).toEqual([]);
  });
});

describe('decode', () => {
  test('is what SentencePiece itself decodes', async () => {
    const original = new SentencePieceProcessor();
    await original.load(modelPath); // not extended: neither bytes nor blanks
    fc.assert(
      fc.property(fc.array(fc.integer({ min: 0, max: 3739 }), { maxLength: 12 }), (ids) => {
        expect(tokenizer.decode(ids)).toBe(original.decodeIds(ids).replaceAll('<n>', '\n'));
      }),
      { seed: 3 },
    );
  });

  test('writes padding rows as U+FFFD', () => {
    expect(tokenizer.decode([4084, 5])).toBe('\ufffd the');
    expect(tokenizer.detokenize([4095])).toBe('\ufffd');
  });

  test.each([[[-1]], [[1.5]], [[Number.NaN]]])('refuses %j', (ids) => {
    expect(() => tokenizer.decode(ids)).toThrow(InvalidRequestError);
  });

  test('refuses image tokens, which detokenize and stream write as U+FFFD', async () => {
    const offset = await loadTokenizer(modelPath, { ...config, imageTokenOffset: 20000 });
    const ids = offset.encode('the capital');
    expect(ids).toEqual(tokenizer.encode('the capital').map((id) => id + 20000));
    expect(offset.decode(ids)).toBe('the capital');
    expect(() => offset.decode([19999])).toThrow('id 0 is 19999, text ids are integers from 20000');
    expect(offset.detokenize([19999])).toBe('\ufffd');
    expect(offset.stream().push(19999)).toBe('\ufffd');
    expect([offset.command('eos'), offset.command('[MASK]')]).toEqual([20002, 23740]);
  });
});

describe('stream', () => {
  const anyId = fc.oneof(
    fc.integer({ min: 0, max: 4095 }),
    fc.integer({ min: 3828, max: 4083 }), // bytes
    fc.constantFrom(0, 1, 2, 3, 4, 5, 3744, 3748, 3749, 3827),
    fc.constantFrom(...[0xe4, 0xbd, 0xa0, 0xf0, 0x9f, 0x98, 0x80, 0xc3, 0xa9, 0xed].map((byte) => 3828 + byte)),
    // Bytes that spell escapes: <n>, <|tab|>, <|blank_12|>
    fc.constantFrom(...Buffer.from('<n>|tab|blank_128').values()).map((byte) => 3828 + byte),
  );

  test('pieces of any ids are whole characters, joined the decoded text', () => {
    fc.assert(
      fc.property(fc.array(anyId, { maxLength: 48 }), (ids) => {
        const stream = tokenizer.stream();
        const pieces = ids.map((id) => stream.push(id));
        pieces.push(stream.flush());
        expect(pieces.join('')).toBe(tokenizer.decode(ids));
        for (const piece of pieces) expect(Buffer.from(piece).toString()).toBe(piece); // no half of a surrogate pair
      }),
      { seed: 4, numRuns: 2000 },
    );
  });

  test.each([
    ['a character of four bytes', [4068, 3987, 3980, 3956], ['', '', '', '😀']],
    ['a byte that breaks a character', [4068, 3987, 3893, 13], ['', '', '\ufffd\ufffdA', ' a']],
    ['an escape in bytes', [...Buffer.from('x<n>').values()].map((byte) => 3828 + byte), ['x', '', '', '\n']],
    ['what only begins like an escape', [...Buffer.from('<|x').values()].map((byte) => 3828 + byte), ['', '', '<|x']],
  ])('%s', (_, ids, pieces) => {
    const stream = tokenizer.stream();
    expect(ids.map((id) => stream.push(id))).toEqual(pieces);
    expect([stream.isHolding, stream.flush()]).toEqual([false, '']);
  });

  test('says that it holds text back, and gives it at the end', () => {
    const stream = tokenizer.stream();
    expect([stream.push(4068) + stream.push(3987), stream.isHolding, stream.flush(), stream.isHolding]).toEqual([
      '',
      true,
      '\ufffd\ufffd',
      false,
    ]);
  });
});

describe('loadTokenizer refuses', () => {
  let folder: string;
  let bytes: Buffer;
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'tandem-tokenizer-'));
    bytes = await readFile(modelPath);
  });
  afterAll(() => rm(folder, { recursive: true }));

  async function loadBytes(content: Uint8Array, numTextPieces = 3740): Promise<Tokenizer> {
    const path = join(folder, 'x.model');
    await writeFile(path, content);
    return loadTokenizer(path, { ...config, numTextPieces });
  }

  test('a file that is not there', async () => {
    await expect(loadTokenizer(join(folder, 'none'), config)).rejects.toThrow(CheckpointError);
  });

  test('another number of pieces', async () => {
    await expect(loadBytes(bytes, 130000)).rejects.toThrow('x.model has 3740 pieces, config.json says num_text_pieces 130000');
  });

  test('a file of another kind', async () => {
    await expect(loadBytes(Buffer.from('{"format": "tandem-store"}'))).rejects.toThrow(
      'x.model is not a SentencePiece model that can be used',
    );
    await expect(loadBytes(Buffer.alloc(0))).rejects.toThrow('x.model has 0 pieces');
  });

  test('a file that is cut short anywhere', async () => {
    for (const length of [1, 7, 1000, 30_001, bytes.length - 1]) {
      await expect(loadBytes(bytes.subarray(0, length))).rejects.toThrow(CheckpointError);
    }
  });

  test('lengths beyond the file, numbers without an end', async () => {
    await expect(loadBytes(Buffer.from([0x0a, 0xff, 0xff, 0xff, 0xff, 0x7f, 1]))).rejects.toThrow('runs past the end (7 bytes)');
    await expect(loadBytes(Buffer.alloc(20, 0xff))).rejects.toThrow('a number is longer than 10 bytes');
  });

  // Found by npm run bench:fuzz: the C++ code throws what is no Error.
  test('a zero byte in a piece', async () => {
    const damaged = Buffer.from(bytes);
    damaged[damaged.indexOf('Answer')] = 0;
    await expect(loadBytes(damaged)).rejects.toThrow(CheckpointError);
    await expect(loadBytes(damaged)).rejects.toThrow('x.model could not be loaded, it is damaged');
  });

  test('random bytes', async () => {
    await fc.assert(
      fc.asyncProperty(fc.uint8Array({ maxLength: 64 }), async (content) => {
        await expect(loadBytes(content)).rejects.toThrow(CheckpointError);
      }),
      { seed: 5, numRuns: 50 },
    );
  });
});
