import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type FakeHttp, startFakeHttp } from './fake-http.js';

interface Choice {
  index: number;
  text: string;
  finish_reason: string | null;
  logprobs: { tokens: string[]; token_logprobs: (number | null)[]; top_logprobs: unknown[]; text_offset: number[] } | null;
  blank?: number;
  blanks?: { text: string; token_ids: number[]; mask_position: number; finish_reason: string }[];
  token_ids?: number[];
}
interface Answer {
  id: string;
  object: string;
  model: string;
  choices: Choice[];
  usage?: {
    prompt_tokens: number;
    completion_tokens: number;
    total_tokens: number;
    prompt_tokens_details: { cached_tokens: number };
  } | null;
  timings?: Record<string, number>;
}

let http: FakeHttp;
beforeAll(async () => {
  http = await startFakeHttp();
});
afterAll(() => http.close());

async function post(body: object, headers: Record<string, string> = {}) {
  return http.app.inject({ method: 'POST', url: '/v1/completions', headers, payload: { model: 'tiny', ...body } });
}

async function complete(body: object): Promise<Answer> {
  const response = await post(body);
  expect(response.body).not.toContain('"error"');
  expect(response.statusCode).toBe(200);
  return response.json<Answer>();
}

async function streamed(body: object): Promise<Answer[]> {
  const response = await post({ stream: true, ...body });
  expect(response.headers['content-type']).toBe('text/event-stream; charset=utf-8');
  const events = response.body.split('\n\n');
  expect(events.pop()).toBe('');
  expect(events.pop()).toBe('data: [DONE]');
  return events.map((event) => JSON.parse(event.replace(/^data: /, '')) as Answer);
}

function textOf(chunks: readonly Answer[], index = 0): string {
  return chunks
    .flatMap(({ choices }) => choices)
    .filter((choice) => choice.index === index)
    .map(({ text }) => text)
    .join('');
}

describe('a completion', () => {
  test('is an OpenAI text_completion of 16 tokens by default', async () => {
    const answer = await complete({ prompt: 'The capital of France is', ignore_eos: true, seed: 1 });
    expect(answer).toMatchObject({
      object: 'text_completion',
      model: 'tiny',
      choices: [{ index: 0, finish_reason: 'length', logprobs: null }],
      usage: { completion_tokens: 16, prompt_tokens_details: { cached_tokens: 0 } },
    });
    expect(answer.id).toMatch(/^cmpl-/);
    expect(answer.usage!.total_tokens).toBe(answer.usage!.prompt_tokens + 16);
    expect(Object.keys(answer.timings!)).toEqual(['queue_ms', 'prefill_ms', 'decode_ms', 'stall_ms']);
    expect(answer.choices[0]).not.toHaveProperty('blanks');
  });

  test('has the same text for the same seed, and another for another', async () => {
    const [one, same, other] = await Promise.all([5, 5, 6].map((seed) => complete({ prompt: 'Hello', seed, max_tokens: 8 })));
    expect(same!.choices[0]!.text).toBe(one!.choices[0]!.text);
    expect(other!.choices[0]!.text).not.toBe(one!.choices[0]!.text);
  });

  test('has another text each time without a seed', async () => {
    const texts = await Promise.all([1, 2, 3].map(async () => (await complete({ prompt: 'Hello', max_tokens: 8 })).choices[0]!.text));
    expect(new Set(texts).size).toBe(3);
  });

  test('takes negative seeds, as OpenAI does', async () => {
    await complete({ prompt: 'Hello', seed: -7, max_tokens: 1 });
  });

  test('of several prompts has n choices for each, in order, each as it is alone', async () => {
    const both = await complete({ prompt: ['One', 'Two'], n: 2, seed: 3, max_tokens: 6 });
    const second = await complete({ prompt: 'Two', n: 2, seed: 3, max_tokens: 6 });
    expect(both.choices.map(({ index }) => index)).toEqual([0, 1, 2, 3]);
    expect(both.choices.slice(2).map(({ text }) => text)).toEqual(second.choices.map(({ text }) => text));
    expect(both.usage!.completion_tokens).toBeGreaterThan(second.usage!.completion_tokens);
  });

  test('takes token ids, one list or several', async () => {
    const ids = http.service.requireTokenizer().encodePrompt('Hello there');
    const [text, one, several] = await Promise.all(
      ['Hello there', ids, [ids, ids]].map((prompt) => complete({ prompt, seed: 1, max_tokens: 6 })),
    );
    expect(one!.choices[0]!.text).toBe(text!.choices[0]!.text);
    expect(several!.choices.map(({ text }) => text)).toEqual([text!.choices[0]!.text, text!.choices[0]!.text]);
  });

  test('ends before a stop string', async () => {
    const { choices } = await complete({ prompt: 'Hello', seed: 1, max_tokens: 20, ignore_eos: true });
    const stop = choices[0]!.text.slice(10, 13);
    const stopped = await complete({ prompt: 'Hello', seed: 1, max_tokens: 20, ignore_eos: true, stop });
    expect(stopped.choices[0]).toMatchObject({ text: choices[0]!.text.slice(0, choices[0]!.text.indexOf(stop)), finish_reason: 'stop' });
  });

  test('of best_of candidates is the one with the best mean log-probability', async () => {
    const options = { prompt: 'Hello', seed: 1, max_tokens: 6, ignore_eos: true };
    const all = await complete({ ...options, n: 5, logprobs: 0 });
    const best = await complete({ ...options, n: 2, best_of: 5 });
    const mean = ({ logprobs }: Choice): number => logprobs!.token_logprobs.reduce((a: number, b) => a + b!, 0);
    const ranked = [...all.choices].sort((a, b) => mean(b) - mean(a)).map(({ text }) => text);
    expect(best.choices.map(({ text }) => text)).toEqual(ranked.slice(0, 2));
    expect(best.choices.map(({ logprobs, index }) => ({ logprobs, index }))).toEqual([0, 1].map((index) => ({ logprobs: null, index })));
    expect(best.usage!.completion_tokens).toBe(all.usage!.completion_tokens);
  });

  test('has log-probabilities whose offsets point into the text', async () => {
    const { choices } = await complete({ prompt: 'Hello', seed: 1, max_tokens: 12, ignore_eos: true, logprobs: 2 });
    const { text, logprobs } = choices[0]!;
    expect(logprobs!.tokens).toHaveLength(12);
    expect(logprobs!.token_logprobs.every((value) => value! < 0)).toBe(true);
    logprobs!.tokens.forEach((token, i) => {
      expect(logprobs!.top_logprobs[i]).toHaveProperty([token]);
      if (i > 0 && !token.startsWith('token_id:')) expect([...text].slice(logprobs!.text_offset[i]).join('')).toMatch(startOf(token));
    });
  });

  test('echoes its prompt, whose tokens have no log-probabilities', async () => {
    const prompt = 'The quick brown fox';
    const options = { prompt, seed: 1, max_tokens: 4, ignore_eos: true, logprobs: 1 };
    const [plain, echoed] = await Promise.all([complete(options), complete({ ...options, echo: true })]);
    const { text, logprobs } = echoed.choices[0]!;
    expect(text).toBe(prompt + plain.choices[0]!.text);
    const numPrompt = http.service.requireTokenizer().encodePrompt(prompt).length;
    expect(logprobs!.token_logprobs.slice(0, numPrompt).every((value) => value === null)).toBe(true);
    expect(logprobs!.top_logprobs[0]).toBe(null);
    expect(logprobs!.token_logprobs.slice(numPrompt)).toEqual(plain.choices[0]!.logprobs!.token_logprobs);
    expect(logprobs!.text_offset.slice(numPrompt)).toEqual(plain.choices[0]!.logprobs!.text_offset.map((at) => at + prompt.length));
  });

  test('with a suffix fills the blank between', async () => {
    const { choices, usage } = await complete({ prompt: 'The ', suffix: ' fox jumps.', seed: 1, max_tokens: 5 });
    const masked = await complete({ prompt: 'The [MASK] fox jumps.', seed: 1, max_tokens: 5 });
    expect(choices[0]!.text).toBe(masked.choices[0]!.text);
    expect(choices[0]).not.toHaveProperty('blanks');
    expect(usage).toEqual(masked.usage);
  });

  test('of a prompt with masks has its blanks', async () => {
    const { choices } = await complete({ prompt: 'A [MASK] and a [MASK].', seed: 4, max_tokens: 5 });
    const [choice] = choices;
    expect(choice!.blanks!.length).toBeGreaterThanOrEqual(2);
    expect(choice!.text).toBe(choice!.blanks!.map(({ text }) => text).join('\n'));
    const [blank] = choice!.blanks!;
    expect(blank!.mask_position).toBe(http.service.requireTokenizer().encodePrompt('A [MASK]').length - 1);
    expect(['stop', 'length']).toContain(blank!.finish_reason);
    expect(choice!.blanks![0]!.token_ids.length).toBeGreaterThan(0);
  });

  test('of a beam search has the best beams', async () => {
    const { choices } = await complete({ prompt: 'Hello', use_beam_search: true, num_beams: 3, n: 2, max_tokens: 4 });
    expect(choices.map(({ index }) => index)).toEqual([0, 1]);
    expect(new Set(choices.map(({ text }) => text)).size).toBe(2);
  });

  test('tells token ids where it is asked', async () => {
    const { choices } = await complete({ prompt: 'Hello', max_tokens: 4, ignore_eos: true, return_token_ids: true });
    expect(choices[0]!.token_ids).toHaveLength(4);
  });
});

describe('a stream', () => {
  test.each([
    { name: 'of a continuation', body: { prompt: 'Hello', n: 3 } },
    { name: 'of blanks', body: { prompt: 'A [MASK] and a [MASK].', n: 2 } },
    { name: 'with echo and log-probabilities', body: { prompt: 'Hello', echo: true, logprobs: 1 } },
    { name: 'of several prompts', body: { prompt: ['One', 'Two'], n: 2 } },
  ])('$name has the same choices as the whole answer', async ({ body }) => {
    const options = { ...body, seed: 9, max_tokens: 8 };
    const [whole, chunks] = await Promise.all([complete(options), streamed(options)]);
    for (const choice of whole.choices) {
      expect(textOf(chunks, choice.index)).toBe(choice.text);
      const own = chunks.flatMap(({ choices }) => choices).filter(({ index }) => index === choice.index);
      expect(own.map(({ finish_reason }) => finish_reason).filter((reason) => reason !== null)).toEqual([choice.finish_reason]);
      expect(own.at(-1)!.blanks).toEqual(choice.blanks);
      if (choice.logprobs) {
        expect(own.flatMap(({ logprobs }) => logprobs?.text_offset ?? [])).toEqual(choice.logprobs.text_offset);
        expect(own.flatMap(({ logprobs }) => logprobs?.tokens ?? [])).toEqual(choice.logprobs.tokens);
      }
      choice.blanks?.forEach(({ text }, blank) =>
        expect(
          own
            .filter((part) => part.blank === blank)
            .map(({ text }) => text)
            .join(''),
        ).toBe(text),
      );
    }
    const { timings } = chunks.at(-1)!;
    expect(Object.keys(timings!)).toEqual(['queue_ms', 'prefill_ms', 'decode_ms', 'stall_ms']);
    expect(Object.values(timings!).every((ms) => ms >= 0)).toBe(true);
    expect(new Set(chunks.map(({ id }) => id)).size).toBe(1);
  });

  test('has its usage in a last chunk without choices where it is asked for', async () => {
    const chunks = await streamed({ prompt: 'Hello', max_tokens: 4, ignore_eos: true, stream_options: { include_usage: true } });
    expect(chunks.at(-1)).toMatchObject({ choices: [], usage: { completion_tokens: 4 }, timings: {} });
    expect(chunks.slice(0, -1).every(({ usage }) => usage === null)).toBe(true);
  });

  test('64 at once end as each does alone', async () => {
    const options = (i: number) => ({ prompt: `Story ${i}`, seed: i, max_tokens: 12 });
    const alone = await complete(options(63));
    const all = await Promise.all(Array.from({ length: 64 }, (_, i) => streamed(options(i))));
    expect(all.every((chunks) => chunks.length > 1)).toBe(true);
    expect(textOf(all[63]!)).toBe(alone.choices[0]!.text);
    expect(http.loop.snapshot()).toMatchObject({ running: 0, queued: 0, kv: { usedBlocks: 0 } });
  });
});

describe('request ids', () => {
  test('are the client’s, in the body before the header, and come back', async () => {
    const response = await post({ prompt: 'Hi', request_id: 'mine', max_tokens: 1 }, { 'x-request-id': 'header' });
    expect(response.headers['x-request-id']).toBe('mine');
    expect(response.json<Answer>().id).toBe('mine');
    const other = await post({ prompt: 'Hi', max_tokens: 1 }, { 'x-request-id': 'header' });
    expect(other.headers['x-request-id']).toBe('header');
  });
});

describe('what is wrong is told with its field', () => {
  test.each([
    ['an unknown field', { prompt: 'a', temprature: 1 }, 'temprature'],
    ['no prompt', {}, 'prompt'],
    ['an empty list', { prompt: [] }, 'prompt'],
    ['mixed prompts', { prompt: ['a', 1] }, 'prompt'],
    ['half a token', { prompt: [1.5] }, 'prompt'],
    ['too many prompts', { prompt: Array.from({ length: 65 }, () => 'a') }, 'prompt'],
    ['max_tokens 0', { prompt: 'a', max_tokens: 0 }, 'max_tokens'],
    ['a text for a number', { prompt: 'a', temperature: '1' }, 'temperature'],
    ['a temperature out of range', { prompt: 'a', temperature: -1 }, 'temperature'],
    ['a bias out of range', { prompt: 'a', logit_bias: { 5: 101 } }, 'logit_bias'],
    ['biases as a list', { prompt: 'a', logit_bias: [1] }, 'logit_bias'],
    ['a token that is written in two ways', { prompt: 'a', logit_bias: { 5: 1, '05': 2 } }, 'logit_bias'],
    ['a bias of no token', { prompt: 'a', logit_bias: { hello: 1 } }, 'logit_bias'],
    ['too many logprobs', { prompt: 'a', logprobs: 21 }, 'logprobs'],
    ['too many stop strings', { prompt: 'a', stop: Array.from({ length: 5000 }, () => 'x') }, 'stop'],
    ['too many end tokens', { prompt: 'a', stop_token_ids: Array.from({ length: 5000 }, (_, i) => i) }, 'stop_token_ids'],
    ['too many samples', { prompt: 'a', n: 65 }, 'n'],
    ['too many candidates', { prompt: 'a', best_of: 65 }, 'best_of'],
    ['too many beams', { prompt: 'a', num_beams: 65 }, 'num_beams'],
    ['fewer candidates than choices', { prompt: 'a', n: 3, best_of: 2 }, 'best_of'],
    ['candidates beside beams', { prompt: 'a', num_beams: 2, best_of: 2 }, 'best_of'],
    ['a length penalty without beams', { prompt: 'a', length_penalty: 1 }, 'length_penalty'],
    ['n-grams without beams', { prompt: 'a', num_beams: 1, no_repeat_ngram_size: 2 }, 'no_repeat_ngram_size'],
    ['candidates of a stream', { prompt: 'a', best_of: 2, stream: true }, 'best_of'],
    ['stream options without a stream', { prompt: 'a', stream_options: { include_usage: true } }, 'stream_options'],
    ['a suffix of ids', { prompt: [1, 2], suffix: 'a' }, 'suffix'],
    ['echo of blanks', { prompt: 'a [MASK]', echo: true }, 'echo'],
    ['an unknown mode', { prompt: 'a', mode: 'chat' }, 'mode'],
    ['a priority out of range', { prompt: 'a', priority: 101 }, 'priority'],
    ['a request id with spaces', { prompt: 'a', request_id: 'a b' }, 'request_id'],
  ])('%s', async (_name, body, param) => {
    const response = await post(body);
    expect(response.statusCode).toBe(400);
    const { error } = response.json<{ error: { message: string; type: string; param: string; code: string } }>();
    expect(error).toMatchObject({ type: 'invalid_request_error', param, code: 'invalid_request' });
    expect(error.message).toContain(param);
    expect(error.message).not.toContain('\n');
  });

  test('an unknown model', async () => {
    const response = await post({ model: 'gpt-4', prompt: 'a' });
    expect(response.statusCode).toBe(404);
    expect(response.json()).toMatchObject({ error: { type: 'invalid_request_error', code: 'model_not_found', param: 'model' } });
  });

  test('ids that the model does not have', async () => {
    expect((await post({ prompt: [999999] })).statusCode).toBe(400);
    expect((await post({ prompt: 'a', logit_bias: { 999999: 1 } })).statusCode).toBe(400);
    expect((await post({ prompt: 'a', stop_token_ids: [999999] })).json()).toMatchObject({ error: { param: 'stop_token_ids' } });
  });

  test('the id of a request that waits or runs', async () => {
    const body = { prompt: ['a', 'b'], request_id: 'same', max_tokens: 100, ignore_eos: true };
    const [first, second] = await Promise.all([post(body), post(body)]);
    expect(first.statusCode).toBe(200);
    const { error } = second.json<{ error: { param: string; message: string } }>();
    expect(error.param).toBe('request_id');
    expect(error.message).toContain('same-0');
  });

  test('a prompt that is too long', async () => {
    const response = await post({ prompt: 'word '.repeat(2000) });
    expect(response.statusCode).toBe(400);
    expect(response.json()).toMatchObject({ error: { code: 'context_length_exceeded' } });
  });

  test('if one of several prompts can not be taken, none is', async () => {
    const before = http.loop.snapshot();
    expect((await post({ prompt: ['a', 'word '.repeat(2000)] })).statusCode).toBe(400);
    await expect.poll(() => http.loop.snapshot()).toMatchObject({ running: 0, queued: 0, finished: before.finished });
  });

  test('fields that OpenAI’s clients send and that mean nothing here are ignored', async () => {
    await complete({
      prompt: 'a',
      user: 'me',
      metadata: { a: 'b' },
      store: true,
      max_tokens: 1,
      suffix: null,
      stop: null,
      logit_bias: null,
    });
  });
});

function startOf(token: string): RegExp {
  return new RegExp(`^${token.replace(/[.*+?^${}()|[\]\\]/g, '\\$&')}`);
}
