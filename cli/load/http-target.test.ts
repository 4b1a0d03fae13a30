import { once } from 'node:events';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { afterEach, expect, test } from 'vitest';
import { firstModel, httpTarget, type HttpTargetOptions } from './http-target.js';
import type { Ending } from './target.js';
import type { PlannedRequest } from './workload.js';

const shape = { mode: 'gmask', temperature: 0, seed: 1, beams: 0, priority: 0, timeoutMs: 0, stopsAtEnd: false } as const;
const planned: PlannedRequest = { index: 0, prompt: { ids: [5, 6] }, outputTokens: 3, isCut: false, cancelAfter: null, key: 'secret' };
const servers: Server[] = [];

afterEach(() => {
  for (const server of servers.splice(0)) {
    server.closeAllConnections();
    server.close();
  }
});

interface Seen {
  body: Record<string, unknown>;
  authorization: string | undefined;
  path: string | undefined;
}

/** A server that answers in the form of OpenAI's streams. */
async function serve(answer: (response: ServerResponse, request: IncomingMessage) => void): Promise<{ url: string; seen: Seen[] }> {
  const seen: Seen[] = [];
  const server = createServer((request, response) => {
    let text = '';
    request.setEncoding('utf8').on('data', (more: string) => (text += more));
    request.on('end', () => {
      seen.push({
        body: text === '' ? {} : (JSON.parse(text) as Seen['body']),
        authorization: request.headers.authorization,
        path: request.url,
      });
      answer(response, request);
    });
  });
  servers.push(server);
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, seen };
}

function sse(response: ServerResponse, ...events: unknown[]): void {
  response.writeHead(200, { 'content-type': 'text/event-stream' });
  for (const event of events) response.write(`data: ${typeof event === 'string' ? event : JSON.stringify(event)}\n\n`);
}

const text = (piece: string) => ({ id: 'x', object: 'text_completion', choices: [{ index: 0, text: piece, finish_reason: null }] });

async function send(url: string, options: Partial<HttpTargetOptions> = {}, onTokens: (count: number) => void = () => {}): Promise<Ending> {
  const target = httpTarget({ url, model: 'glm', extraBody: {}, tls: null, shape, ...options });
  try {
    return await target.send(planned, onTokens).ended;
  } finally {
    target.close();
  }
}

test('a stream is followed to [DONE], with the usage that it reports', async () => {
  const { url, seen } = await serve((response) => {
    const usage = { prompt_tokens: 4, completion_tokens: 3, prompt_tokens_details: { cached_tokens: 2 } };
    sse(response, text('a'), text('é'), text(''), { choices: [], usage }, '[DONE]');
    response.end();
  });
  let messages = 0;
  const ending = await send(url, { extraBody: { top_p: 0.5 } }, () => messages++);
  expect(ending).toEqual({ kind: 'finished', promptTokens: 4, outputTokens: 3, cachedPromptTokens: 2, serverQueueMs: null });
  expect(messages).toBe(2);
  expect(seen[0]).toMatchObject({ path: '/v1/completions', authorization: 'Bearer secret' });
  expect(seen[0]!.body).toMatchObject({ model: 'glm', prompt: [5, 6], max_tokens: 3, stream: true, temperature: 0, top_p: 0.5 });
});

test('events that arrive in pieces, split inside a character, are put together', async () => {
  const { url } = await serve((response) => {
    response.writeHead(200);
    const bytes = Buffer.from(`data: ${JSON.stringify(text('日本'))}\r\n\r\n: comment\n\ndata: [DONE]\n\n`);
    for (const byte of bytes) response.write(Buffer.of(byte));
    response.end();
  });
  expect(await send(url)).toMatchObject({ kind: 'finished', outputTokens: 1 });
});

test.each([
  {
    name: 'a refusal',
    answer: (response: ServerResponse) => response.writeHead(429).end(JSON.stringify({ error: { message: 'the queue is\nfull' } })),
    failure: { code: 'HTTP_429', message: 'the queue is; full' },
  },
  {
    name: 'a refusal without JSON',
    answer: (response: ServerResponse) => response.writeHead(502).end('<html>'),
    failure: { code: 'HTTP_502', message: 'Bad Gateway' },
  },
  {
    name: 'an error in the stream',
    answer: (response: ServerResponse) => sse(response, text('a'), { error: { message: 'lost', code: 'worker_lost' } }),
    failure: { code: 'worker_lost', message: 'lost' },
  },
  {
    name: 'a stream that breaks off',
    answer: (response: ServerResponse) => {
      sse(response, text('a'));
      response.end();
    },
    failure: { code: 'NO_DONE', message: 'the stream ended without [DONE]' },
  },
  {
    name: 'an event that is no chunk',
    answer: (response: ServerResponse) => sse(response, '{"choices":3}'),
    failure: { code: 'BAD_EVENT', message: 'an event that is no completion chunk' },
  },
])('$name is a failure with its code', async ({ answer, failure }) => {
  const { url } = await serve((response) => void answer(response));
  expect(await send(url)).toEqual({ kind: 'failed', ...failure });
});

test('nobody listening is a failure, not an exception', async () => {
  expect(await send('http://127.0.0.1:1')).toMatchObject({ kind: 'failed', code: 'ECONNREFUSED' });
});

test('a client that leaves closes its connection', async () => {
  let gone!: () => void;
  const left = new Promise<void>((resolve) => (gone = resolve));
  const { url } = await serve((response) => {
    response.on('close', gone);
    sse(response, text('a'));
  });
  const target = httpTarget({ url, model: 'glm', extraBody: {}, tls: null, shape });
  const sent = target.send(planned, () => sent.cancel());
  expect(await sent.ended).toEqual({ kind: 'cancelled' });
  await left;
  target.close();
});

test('a request that takes too long fails by its timeout', async () => {
  const { url } = await serve((response) => sse(response, text('a')));
  expect(await send(url, { shape: { ...shape, timeoutMs: 20 } })).toMatchObject({ kind: 'failed', code: 'TIMEOUT' });
});

test.each(['nonsense', 'ftp://host', ''])('the address "%s" is refused', (url) => {
  expect(() => httpTarget({ url, model: 'glm', extraBody: {}, tls: null, shape })).toThrow(/^--http /);
});

test('the model is the first that the server names', async () => {
  const { url, seen } = await serve((response) => response.end(JSON.stringify({ object: 'list', data: [{ id: 'one' }, { id: 'two' }] })));
  expect(await firstModel({ url, tls: null }, 'secret')).toBe('one');
  expect(seen[0]).toMatchObject({ path: '/v1/models', authorization: 'Bearer secret' });
});

test.each([
  { answer: { error: { message: 'no key' } }, status: 401, reason: /401, no key: give --http-model/ },
  { answer: { data: [] }, status: 200, reason: /200, no model: give --http-model/ },
])('a server that names no model is refused with its answer ($status)', async ({ answer, status, reason }) => {
  const { url } = await serve((response) => response.writeHead(status).end(JSON.stringify(answer)));
  await expect(firstModel({ url, tls: null }, null)).rejects.toThrow(reason);
});
