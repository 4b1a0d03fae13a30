import { once } from 'node:events';
import OpenAI from 'openai';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { RateLimitedError, UnauthenticatedError } from '../common/errors.js';
import { type Gate, LOCAL_CALLER } from '../coordinator/access/caller.js';
import { type FakeHttp, startFakeHttp } from '../coordinator/api/http/fake-http.js';
import { FakeEngine } from '../coordinator/group/fake-engine.js';

// The official client against the server over the fake engine.

const gate: Gate = {
  authorize(access, authorization) {
    if (access !== 'public' && authorization !== 'Bearer right') throw new UnauthenticatedError('no API key that this server knows');
    return LOCAL_CALLER;
  },
};

let http: FakeHttp;
let client: OpenAI;
let baseURL: string;
beforeEach(async () => {
  http = await startFakeHttp({ gate });
  baseURL = `http://${await http.listen()}/v1`;
  client = new OpenAI({ baseURL, apiKey: 'right', maxRetries: 0 });
});
afterEach(async () => {
  await http.close();
  vi.restoreAllMocks();
});

const options = { model: 'tiny', prompt: 'The capital of France is', max_tokens: 12, seed: 3 };

describe('completions', () => {
  test('create', async () => {
    const { data, response } = await client.completions.create(options).withResponse();
    expect(data).toMatchObject({ object: 'text_completion', model: 'tiny', usage: { completion_tokens: 12 } });
    expect(data.choices[0]!.text.length).toBeGreaterThan(0);
    expect(data.id).toBe(response.headers.get('x-request-id'));
  });

  test('the same seed gives the same text', async () => {
    const texts = await Promise.all([1, 2].map(async () => (await client.completions.create(options)).choices[0]!.text));
    expect(texts[0]).toBe(texts[1]);
  });

  test('stream, with usage at the end', async () => {
    const whole = await client.completions.create({ ...options, n: 2 });
    const stream = await client.completions.create({ ...options, n: 2, stream: true, stream_options: { include_usage: true } });
    const texts = ['', ''];
    let usage;
    for await (const chunk of stream) {
      for (const choice of chunk.choices) texts[choice.index] += choice.text;
      usage = chunk.usage ?? usage;
    }
    expect(texts).toEqual(whole.choices.map(({ text }) => text));
    expect(usage).toEqual(whole.usage);
  });

  test('n, best_of and several prompts', async () => {
    const { choices } = await client.completions.create({ ...options, prompt: ['One', 'Two'], n: 2, best_of: 4 });
    expect(choices.map(({ index }) => index)).toEqual([0, 1, 2, 3]);
  });

  test('stop', async () => {
    const { text } = (await client.completions.create(options)).choices[0]!;
    const stop = [text.slice(4, 7)];
    const stopped = await client.completions.create({ ...options, stop });
    expect(stopped.choices[0]).toMatchObject({ text: text.slice(0, text.indexOf(stop[0]!)), finish_reason: 'stop' });
  });

  test('logprobs and echo', async () => {
    const { choices } = await client.completions.create({ ...options, logprobs: 2, echo: true });
    const { text, logprobs } = choices[0]!;
    expect(text.startsWith(options.prompt)).toBe(true);
    expect(logprobs!.tokens!.length).toBe(logprobs!.text_offset!.length);
    expect(logprobs!.token_logprobs!.at(0)).toBe(null);
    expect(logprobs!.token_logprobs!.at(-1)).toBeLessThan(0);
  });

  test('suffix', async () => {
    const { choices } = await client.completions.create({ ...options, prompt: 'The ', suffix: ' fox.' });
    expect(choices[0]!.text).toBe((await client.completions.create({ ...options, prompt: 'The [MASK] fox.' })).choices[0]!.text);
  });

  test('biases, penalties and the rest of the parameters', async () => {
    await client.completions.create({
      ...options,
      logit_bias: { 100: -5 },
      presence_penalty: 0.5,
      frequency_penalty: 0.5,
      temperature: 0.7,
      top_p: 0.9,
      user: 'me',
    });
  });

  test('64 streams at once', async () => {
    const texts = await Promise.all(
      Array.from({ length: 64 }, async (_, i) => {
        let text = '';
        for await (const chunk of await client.completions.create({ ...options, seed: i, stream: true })) text += chunk.choices[0]!.text;
        return text;
      }),
    );
    expect(texts[63]).toBe((await client.completions.create({ ...options, seed: 63 })).choices[0]!.text);
  });
});

test('models', async () => {
  expect((await client.models.list()).data.map(({ id }) => id)).toEqual(['tiny']);
  expect((await client.models.retrieve('tiny')).object).toBe('model');
});

describe('errors are the client’s classes', () => {
  test('BadRequestError', async () => {
    const error = await rejection(client.completions.create({ ...options, n: 1000 }));
    expect(error).toBeInstanceOf(OpenAI.BadRequestError);
    expect(error).toMatchObject({
      status: 400,
      param: 'n',
      type: 'invalid_request_error',
      requestID: expect.stringMatching(/^cmpl-/) as string,
    });
  });

  test('AuthenticationError', async () => {
    const stranger = new OpenAI({ baseURL, apiKey: 'wrong', maxRetries: 0 });
    const error = await rejection(stranger.completions.create(options));
    expect(error).toBeInstanceOf(OpenAI.AuthenticationError);
    expect(error).toMatchObject({ code: 'invalid_api_key' });
  });

  test('NotFoundError', async () => {
    const error = await rejection(client.completions.create({ ...options, model: 'gpt-4' }));
    expect(error).toBeInstanceOf(OpenAI.NotFoundError);
    expect(error).toMatchObject({ code: 'model_not_found' });
  });

  test('RateLimitError, and the client comes again after the time that it is told', async () => {
    const generate = vi.spyOn(http.service, 'generate').mockImplementation(() => {
      throw new RateLimitedError('too many tokens in this minute', 900);
    });
    const error = (await rejection(client.completions.create(options))) as InstanceType<typeof OpenAI.RateLimitError>;
    expect(error).toBeInstanceOf(OpenAI.RateLimitError);
    expect(error.headers.get('retry-after')).toBe('1');
    generate.mockRestore();
    let isFirst = true;
    const { service } = http;
    const original = service.generate.bind(service);
    vi.spyOn(service, 'generate').mockImplementation((...args) => {
      if (!isFirst) return original(...args);
      isFirst = false;
      throw new RateLimitedError('too many tokens in this minute', 900);
    });
    const patient = new OpenAI({ baseURL, apiKey: 'right', maxRetries: 1 });
    expect((await patient.completions.create(options)).choices).toHaveLength(1);
  });

  test('in the middle of a stream', async () => {
    const { service } = http;
    const original = service.generate.bind(service);
    vi.spyOn(service, 'generate').mockImplementation((...args) => {
      const ticket = original(...args);
      return { ...ticket, done: ticket.done.then(() => Promise.reject(new RateLimitedError('used up'))) };
    });
    const stream = await client.completions.create({ ...options, stream: true });
    const read = (async () => {
      for await (const _ of stream); // to its end
    })();
    expect(await rejection(read)).toMatchObject({ message: expect.stringContaining('used up') as string });
  });
});

test('an AbortController ends the request in the engine', async () => {
  let release = (): void => {};
  const held = new Promise<void>((resolve) => (release = resolve));
  // eslint-disable-next-line @typescript-eslint/unbound-method -- called on its engine below
  const { step } = FakeEngine.prototype;
  let steps = 0;
  vi.spyOn(FakeEngine.prototype, 'step').mockImplementation(async function (this: FakeEngine, plan) {
    if (++steps > 3) await held;
    return step.call(this, plan);
  });
  const controller = new AbortController();
  const disconnected = once(http.app.server, 'connection').then(([socket]) => once(socket as NodeJS.ReadableStream, 'close'));
  const stream = await client.completions.create({ ...options, max_tokens: 400, stream: true }, { signal: controller.signal });
  let chunks = 0;
  for await (const _ of stream) if (++chunks === 1) controller.abort();
  await disconnected;
  release();
  await expect.poll(() => http.loop.snapshot()).toMatchObject({ running: 0, queued: 0, cancelled: 1, finished: 0, kv: { usedBlocks: 0 } });
});

function rejection(promise: Promise<unknown>): Promise<unknown> {
  return promise.then(
    () => Promise.reject(new Error('nothing was thrown')),
    (error: unknown) => error,
  );
}
