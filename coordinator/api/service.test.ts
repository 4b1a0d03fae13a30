import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { join } from 'node:path';
import {
  CancelledError,
  DeadlineError,
  EngineError,
  InvalidRequestError,
  NotReadyError,
  PromptTooLongError,
  QueueFullError,
  type TandemError,
} from '../../common/errors.js';
import { createLogger } from '../../common/log.js';
import { tinyModelDir } from '../../model/tiny/tiny-model.js';
import { LONG_TEXT_CHARACTERS, type TextToEncode, ThreadedEncoder } from '../../model/tokenizer/threaded-encoder.js';
import { LOCAL_CALLER } from '../access/caller.js';
import { requestOf } from '../generation/letter-model.js';
import { type GenerationRequest, type Prompt, type ScoreRequest } from '../generation/request.js';
import { NO_OBSERVER, type RejectReason } from '../status/observer.js';
import { type FakeService, startFakeService } from './fake-service.js';
import { type CallContext, type ServiceOptions, ServingService } from './service.js';

const CONTEXT: CallContext = { caller: LOCAL_CALLER, requestId: null, priority: 0, timeoutMs: null };
/** Many characters, few tokens: it is long, and fits the tiny model. */
const BLANKS = ' '.repeat(LONG_TEXT_CHARACTERS);

let fake: FakeService;
let encoder: ThreadedEncoder;
let encoded: TextToEncode[];
let rejected: RejectReason[];
let service: ServingService;
beforeAll(async () => {
  fake = await startFakeService();
  encoder = new ThreadedEncoder({
    tokenizer: fake.service.requireTokenizer(),
    path: join(tinyModelDir, 'tokenizer.model'),
    config: fake.service.config.tokenizer!,
    log: createLogger('test', 'silent'),
  });
});
afterAll(() => Promise.all([fake.close(), encoder.close()]));
beforeEach(() => {
  encoded = [];
  rejected = [];
  service = serviceWith({});
});

function serviceWith(options: Partial<ServiceOptions>): ServingService {
  return new ServingService({
    config: fake.service.config,
    modelName: 'tiny',
    tokenizer: fake.service.requireTokenizer(),
    encoder: {
      encode: (texts, signal) => {
        encoded.push(...texts);
        return encoder.encode(texts, signal);
      },
    },
    blockSize: 16,
    limits: fake.service.limits,
    loop: () => fake.loop,
    health: () => fake.service.health,
    observer: { ...NO_OBSERVER, rejected: (reason) => rejected.push(reason) },
    ...options,
  });
}

function generationOf(prompt: Prompt): GenerationRequest {
  return requestOf('', { prompt });
}

function ofText(text: string): Prompt {
  return { kind: 'text', text };
}

async function rejection(promise: Promise<unknown>): Promise<TandemError> {
  return promise.then(
    () => expect.unreachable('it was taken'),
    (error: unknown) => error as TandemError,
  );
}

describe('prepare', () => {
  test('encodes a long prompt, and what is generated is the same', async () => {
    const request = generationOf(ofText(`The capital${BLANKS}of [MASK] is \ud83d and 北京`));
    const prepared = await service.prepare(request);
    expect(prepared).toEqual({ ...request, prompt: { ...request.prompt, ids: expect.any(Array) as number[] } });
    expect(encoded.length).toBe(1);
    const results = [request, prepared].map((each) => service.generate(each, CONTEXT, () => {}).done);
    const [plain, ahead] = await Promise.all(results);
    expect(ahead!.value.outputs[0]!.ids.length).toBeGreaterThan(0);
    expect(ahead!.value).toEqual(plain!.value);
  });

  test('leaves short texts, ids, and all where there is no thread as they are', async () => {
    const ids = Array.from({ length: 2 * LONG_TEXT_CHARACTERS }, () => 5);
    for (const prompt of [ofText('The capital of [MASK]'), { kind: 'ids', ids } as const]) {
      const request = generationOf(prompt);
      expect(await service.prepare(request)).toBe(request);
    }
    expect(encoded).toEqual([]);
    const long = generationOf(ofText(BLANKS));
    expect(await serviceWith({ encoder: null }).prepare(long)).toBe(long);
  });

  test('takes short prompts of one call for long together', async () => {
    const requests = Array.from({ length: 4 }, (_, i) => generationOf(ofText(`${BLANKS.slice(0, LONG_TEXT_CHARACTERS / 4)} ${i}`)));
    const prepared = await service.prepareAll([generationOf({ kind: 'ids', ids: [7] }), ...requests]);
    const tokenizer = service.requireTokenizer();
    expect(prepared.map(({ prompt }) => prompt.ids)).toEqual([
      [7],
      ...requests.map(({ prompt }) => prompt.kind === 'text' && tokenizer.encodePrompt(prompt.text)),
    ]);
  });

  test('refuses a text that can not fit before encoding it', async () => {
    const error = await rejection(service.prepare(generationOf(ofText('a'.repeat(service.config.maxSequenceLength * 80 + 1)))));
    expect(error).toBeInstanceOf(PromptTooLongError);
    expect(encoded).toEqual([]);
    expect(rejected).toEqual(['invalid']);
  });

  test('refuses text without a tokenizer, and anything while there is no loop', async () => {
    const request = generationOf(ofText(BLANKS));
    expect(await rejection(serviceWith({ tokenizer: null, encoder: null }).prepare(request))).toBeInstanceOf(InvalidRequestError);
    expect(await rejection(serviceWith({ loop: () => null }).prepare(request))).toBeInstanceOf(NotReadyError);
    expect(encoded).toEqual([]);
    expect(rejected).toEqual(['invalid', 'not_ready']);
  });

  test('counts a full queue as a refusal, but neither a client that left nor a defect', async () => {
    const request = generationOf(ofText(BLANKS));
    for (const error of [new QueueFullError('full'), new CancelledError('left'), new EngineError('died')]) {
      const failing = serviceWith({ encoder: { encode: () => Promise.reject(error) } });
      expect(await rejection(failing.prepare(request))).toBe(error);
    }
    expect(rejected).toEqual(['queue_full']);
  });

  test('is done when its client has all of its tokens', async () => {
    const tokens: number[] = [];
    const other = service.generate({ ...generationOf(ofText('Other')), maxNewTokens: 100, endTokens: [] }, CONTEXT, () => {}); // steps go on
    const { done } = service.generate(generationOf(ofText('Hello')), CONTEXT, (delta) => tokens.push(...delta.tokens));
    const { value } = await done;
    expect(tokens).toHaveLength(value.generatedTokens);
    await other.done;
  });

  test('and what comes after it have the time of the call together', async () => {
    const timing = { timeoutMs: 3_600_000, arrivedMs: performance.now() - 3_600_000 };
    const endless = { encode: (_: unknown, signal?: AbortSignal) => new Promise<never>((_resolve, reject) => signal!.addEventListener('abort', () => reject(signal!.reason as Error))) }; // prettier-ignore
    for (const signal of [undefined, new AbortController().signal]) {
      expect(await rejection(serviceWith({ encoder: endless }).prepare(generationOf(ofText(BLANKS)), signal, timing))).toBeInstanceOf(
        DeadlineError,
      );
    }
    const { done } = service.generate(
      { ...generationOf(ofText('Hello')), maxNewTokens: 100, endTokens: [] },
      { ...CONTEXT, ...timing },
      () => {},
    );
    expect(await rejection(done)).toBeInstanceOf(DeadlineError);
  });

  test('can be cancelled', async () => {
    const cancel = new AbortController();
    const preparing = rejection(service.prepare(generationOf(ofText(BLANKS)), cancel.signal));
    cancel.abort();
    expect(await preparing).toBeInstanceOf(CancelledError);
  });
});

describe('prepareScore', () => {
  test('encodes prompt and choices, and scores are the same', async () => {
    const choice = { kind: 'ids', ids: [9, 10] } as const;
    const request: ScoreRequest = {
      prompt: ofText(`The capital of [MASK]${BLANKS}`),
      mode: 'mask',
      choices: [ofText('London [MASK]'), choice, ofText('Paris')],
    };
    const prepared = await service.prepareScore(request);
    expect(prepared.choices[0]).toEqual({ ...request.choices[0], ids: service.requireTokenizer().encode('London [MASK]') });
    expect(prepared.choices[1]).toBe(choice);
    const [plain, ahead] = await Promise.all([request, prepared].map((each) => service.score(each, CONTEXT).done));
    expect(ahead!.value).toEqual(plain!.value);
  });

  test('leaves short ones as they are, and names a choice that can not fit', async () => {
    const request: ScoreRequest = { prompt: ofText('a'), mode: 'mask', choices: [ofText('b'), ofText('c')] };
    expect(await service.prepareScore(request)).toBe(request);
    const long = 'a'.repeat(service.config.maxSequenceLength * 80 + 1);
    const error = await rejection(service.prepareScore({ ...request, choices: [ofText('b'), ofText(long)] }));
    expect(error.message).toContain('choice 1');
    expect(encoded).toEqual([]);
  });
});

test.each([
  { asPrompt: true, dummyPrefix: true },
  { asPrompt: false, dummyPrefix: true },
  { asPrompt: false, dummyPrefix: false },
])('tokenize gives the ids of short and long texts with $asPrompt, $dummyPrefix', async (how) => {
  const tokenizer = service.requireTokenizer();
  for (const text of ['a [MASK]', `a [MASK]${BLANKS.repeat(100)}b`]) {
    const ids = how.asPrompt ? tokenizer.encodePrompt(text) : tokenizer.encode(text, how);
    expect(await service.tokenize(text, how)).toEqual(ids);
    expect(await serviceWith({ encoder: null }).tokenize(text, how)).toEqual(ids);
  }
  await expect(serviceWith({ tokenizer: null }).tokenize('a', how)).rejects.toThrow(InvalidRequestError);
});
