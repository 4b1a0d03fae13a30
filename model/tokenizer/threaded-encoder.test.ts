import { execFile } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { copyFile, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import type { Worker } from 'node:worker_threads';
import fc from 'fast-check';
import { afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { CancelledError, DeadlineError, EngineError, NotReadyError, QueueFullError } from '../../common/errors.js';
import { createLogger } from '../../common/log.js';
import { packageRoot } from '../../common/package-root.js';
import {
  LONG_TEXT_CHARACTERS,
  startEncoderThread,
  type TextToEncode,
  ThreadedEncoder,
  type ThreadedEncoderOptions,
} from './threaded-encoder.js';
import { loadTokenizer, type Tokenizer } from './tokenizer.js';

const path = join(packageRoot, 'model/tiny/tokenizer.model');
const config = { file: 'tokenizer.model', imageTokenOffset: 0, numTextPieces: 3740 };
const MEBIBYTE = 'The quick brown fox. '.repeat(50_000).slice(0, 2 ** 20);
/** Makes the texts that it is sent along with long. */
const FILLER = plain('a '.repeat(LONG_TEXT_CHARACTERS / 2));

let tokenizer: Tokenizer;
let threads: Worker[];
let encoder: ThreadedEncoder;
beforeAll(async () => {
  tokenizer = await loadTokenizer(path, config);
});
beforeEach(() => {
  threads = [];
  encoder = encoderWith({});
});
afterEach(() => encoder.close());

function encoderWith(options: Partial<ThreadedEncoderOptions>): ThreadedEncoder {
  const { startThread = startEncoderThread } = options;
  return new ThreadedEncoder({
    tokenizer,
    path,
    config,
    log: createLogger('test', 'silent'),
    ...options,
    startThread: (data) => {
      const thread = startThread(data);
      threads.push(thread);
      return thread;
    },
  });
}

function plain(text: string): TextToEncode {
  return { text, asPrompt: false, dummyPrefix: true };
}

describe('the ids are those of the tokenizer', () => {
  test('for every golden string', async () => {
    const golden = JSON.parse(readFileSync(join(packageRoot, 'test/golden/tiny/tokenizer.json'), 'utf8')) as {
      strings: { text: string; ids: number[]; ids_without_dummy_prefix: number[] }[];
    };
    const texts = golden.strings.map(({ text }) => plain(text));
    expect(await encoder.encode(texts)).toEqual(golden.strings.map(({ ids }) => ids));
    const bare = golden.strings.map(({ text }) => ({ text, asPrompt: false, dummyPrefix: false }));
    expect(await encoder.encode(bare)).toEqual(golden.strings.map((each) => each.ids_without_dummy_prefix));
    const prompts = golden.strings.map(({ text }) => ({ text: `${text}[MASK]${text} [gMASK]`, asPrompt: true, dummyPrefix: true }));
    expect(await encoder.encode(prompts)).toEqual(prompts.map(({ text }) => tokenizer.encodePrompt(text)));
    expect(threads.length).toBe(1);
  });

  test('for any string, lone surrogates included', async () => {
    const codeUnits = fc.array(fc.integer({ min: 0, max: 0xffff }), { maxLength: 30 }).map((units) => String.fromCharCode(...units));
    const words = fc
      .array(fc.constantFrom('[MASK]', '[gMASK]', '<sop>', '\ud83d', '\ude00', '  ', '\n', '中', 'a'))
      .map((all) => all.join(''));
    const texts = fc.array(
      fc.record({ text: fc.oneof(codeUnits, words, fc.string({ unit: 'binary' })), asPrompt: fc.boolean(), dummyPrefix: fc.boolean() }),
    );
    await fc.assert(
      fc.asyncProperty(texts, async (parts) => {
        const [, ...ids] = await encoder.encode([FILLER, ...parts]);
        const inPlace = parts.map(({ text, asPrompt, dummyPrefix }) =>
          asPrompt ? tokenizer.encodePrompt(text) : tokenizer.encode(text, { dummyPrefix }),
        );
        expect(ids).toEqual(inPlace);
      }),
      { seed: 1 },
    );
    expect(threads.length).toBe(1);
  });
});

describe('what waits for what', () => {
  test('timers run while a MiB is encoded', async () => {
    let ticks = 0;
    const timer = setInterval(() => ticks++, 1);
    const [ids] = await encoder.encode([plain(MEBIBYTE)]);
    clearInterval(timer);
    expect(ticks).toBeGreaterThan(10);
    expect(ids).toEqual(tokenizer.encode(MEBIBYTE));
  });

  test('short texts need no thread and do not wait for long ones, which come in order', async () => {
    const done: string[] = [];
    const encode = async (name: string, text: string) => {
      const [ids] = await encoder.encode([plain(text)]);
      expect(ids).toEqual(tokenizer.encode(text));
      done.push(name);
    };
    await encode('first', 'a short text');
    expect(threads.length).toBe(0);
    await Promise.all([encode('MiB', MEBIBYTE), encode('long', FILLER.text), encode('short', 'a'.repeat(LONG_TEXT_CHARACTERS - 1))]);
    expect(done).toEqual(['first', 'short', 'MiB', 'long']);
    expect(threads.length).toBe(1);
  });

  test('texts that would wait beyond the bound are refused, and there is room again later', async () => {
    encoder = encoderWith({ maxWaitingBytes: 3 * LONG_TEXT_CHARACTERS });
    const long = plain('中'.repeat(LONG_TEXT_CHARACTERS / 2) + 'a'.repeat(LONG_TEXT_CHARACTERS / 2)); // twice as many bytes as characters
    const running = encoder.encode([plain(MEBIBYTE)]);
    const waiting = encoder.encode([long]);
    const refused = encoder.encode([long]);
    await expect(refused).rejects.toThrow(QueueFullError);
    await expect(refused).rejects.toMatchObject({
      message: '4096 bytes of text wait to be encoded, with these 4096 it would be more than 6144: try again later',
      retryAfterMs: 4,
    });
    const fitting = encoder.encode([FILLER]);
    await Promise.all([running, waiting, fitting]);
    expect(await encoder.encode([long])).toEqual([tokenizer.encode(long.text)]);
  });

  test('a text of any length may wait alone', async () => {
    encoder = encoderWith({ maxWaitingBytes: 1 });
    const [, second] = await Promise.all([encoder.encode([FILLER]), encoder.encode([plain(MEBIBYTE)])]);
    expect(second[0]!.length).toBe(tokenizer.encode(MEBIBYTE).length);
  });
});

describe('cancelling', () => {
  test('frees the place of a text that waits', async () => {
    encoder = encoderWith({ maxWaitingBytes: 1 });
    const cancel = new AbortController();
    const running = encoder.encode([plain(MEBIBYTE)]);
    const waiting = encoder.encode([FILLER], cancel.signal);
    await expect(encoder.encode([FILLER])).rejects.toThrow(QueueFullError);
    cancel.abort();
    await expect(waiting).rejects.toThrow(CancelledError);
    const next = encoder.encode([FILLER]);
    expect(await next).toEqual([tokenizer.encode(FILLER.text)]);
    await running;
  });

  test('gives up a text under way; the next one gets its own ids', async () => {
    const cancel = new AbortController();
    const running = encoder.encode([plain(MEBIBYTE)], cancel.signal);
    cancel.abort(new DeadlineError('too late'));
    await expect(running).rejects.toThrow(DeadlineError);
    expect(await encoder.encode([FILLER])).toEqual([tokenizer.encode(FILLER.text)]);
    await expect(encoder.encode([plain('a')], cancel.signal)).rejects.toThrow(DeadlineError);
    expect(threads.length).toBe(1);
  });
});

describe('when the thread dies', () => {
  test('the texts under way fail, those that wait go to a new thread', async () => {
    const running = encoder.encode([plain(MEBIBYTE)]);
    const waiting = encoder.encode([FILLER]);
    await threads[0]!.terminate();
    await expect(running).rejects.toThrow(EngineError);
    expect(await waiting).toEqual([tokenizer.encode(FILLER.text)]);
    expect(threads.length).toBe(2);
  });

  test('idle, the next text starts a new one', async () => {
    await encoder.encode([FILLER]);
    await threads[0]!.terminate();
    expect(await encoder.encode([FILLER])).toEqual([tokenizer.encode(FILLER.text)]);
    expect(threads.length).toBe(2);
  });

  test('of its memory, only the text that took it fails', async () => {
    encoder = encoderWith({ startThread: (data) => startEncoderThread(data, { maxOldGenerationSizeMb: 32 }) });
    const running = encoder.encode([plain('\n'.repeat(8 * 2 ** 20))]);
    const cause = new Promise((resolve) => threads[0]!.once('error', resolve));
    await expect(running).rejects.toThrow(EngineError);
    expect(await cause).toMatchObject({ code: 'ERR_WORKER_OUT_OF_MEMORY' });
    expect(await encoder.encode([FILLER])).toEqual([tokenizer.encode(FILLER.text)]);
    expect(threads.length).toBe(2);
  });

  test('because the tokenizer can not be read, the next text tries again', async () => {
    const dir = await mkdtemp(join(tmpdir(), 'tandem-encoder-'));
    try {
      encoder = encoderWith({ path: join(dir, 'tokenizer.model') });
      await expect(encoder.encode([FILLER])).rejects.toThrow(EngineError);
      await copyFile(path, join(dir, 'tokenizer.model'));
      expect(await encoder.encode([FILLER])).toEqual([tokenizer.encode(FILLER.text)]);
    } finally {
      await rm(dir, { recursive: true });
    }
  });

  test('because it can not be started, the text fails', async () => {
    encoder = encoderWith({
      startThread: () => {
        throw new Error('no threads left');
      },
    });
    const both = await Promise.allSettled([encoder.encode([FILLER]), encoder.encode([FILLER])]);
    for (const result of both) expect(result).toMatchObject({ status: 'rejected', reason: expect.any(EngineError) as EngineError });
  });
});

describe('close', () => {
  test('while busy fails what runs and waits, and ends the thread', async () => {
    const all = [encoder.encode([plain(MEBIBYTE)]), encoder.encode([FILLER])];
    const failed = Promise.all(all.map((each) => expect(each).rejects.toThrow(NotReadyError)));
    const exit = new Promise((resolve) => threads[0]!.once('exit', resolve));
    await Promise.all([encoder.close(), encoder.close(), exit, failed]);
    await expect(encoder.encode([FILLER])).rejects.toThrow(NotReadyError);
    expect(await encoder.encode([plain('a')])).toEqual([tokenizer.encode('a')]);
    expect(threads.length).toBe(1);
  });

  test('is not needed for a process to end', async () => {
    const module = (file: string) => JSON.stringify(join(packageRoot, 'dist/model/tokenizer', file));
    const script = `
      import { loadTokenizer } from ${module('tokenizer.js')};
      import { ThreadedEncoder } from ${module('threaded-encoder.js')};
      const [path, config] = [${JSON.stringify(path)}, ${JSON.stringify(config)}];
      const encoder = new ThreadedEncoder({ tokenizer: await loadTokenizer(path, config), path, config, log: console });
      const busy = setInterval(() => {}, 1000);
      const [ids] = await encoder.encode([${JSON.stringify(FILLER)}]);
      clearInterval(busy);
      console.log(ids.length);`;
    const { stdout } = await promisify(execFile)(process.execPath, ['--input-type=module', '--eval', script]);
    expect(Number(stdout)).toBe(tokenizer.encode(FILLER.text).length);
  });
});
