import { once } from 'node:events';
import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, writeFileSync } from 'node:fs';
import { request as httpRequest } from 'node:http';
import { connect, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { connect as tlsConnect } from 'node:tls';
import { afterEach, describe, expect, test, vi } from 'vitest';
import {
  EngineError,
  ForbiddenError,
  NotFoundError,
  QueueFullError,
  RateLimitedError,
  UnauthenticatedError,
} from '../../../common/errors.js';
import { packageVersion } from '../../../common/package-root.js';
import { type Gate, LOCAL_CALLER } from '../../access/caller.js';
import { FakeEngine } from '../../group/fake-engine.js';
import { MAX_TIMEOUT_MS } from '../validate.js';
import { type FakeHttp, startFakeHttp } from './fake-http.js';
import { ROUTE_ACCESS } from './route-access.js';

let http: FakeHttp;
afterEach(async () => {
  await http.close();
  vi.restoreAllMocks();
});

/** Knows three keys, each of one role. */
const KEYS: Gate = {
  authorize(access, authorization) {
    if (access === 'public') return { ...LOCAL_CALLER, roles: [] };
    const role = /^Bearer (infer|observe|operate)-key$/.exec(authorization ?? '')?.[1];
    if (role === undefined) throw new UnauthenticatedError('no API key that this server knows');
    if (role !== access) throw new ForbiddenError(`the key has no role ${access}`);
    return { ...LOCAL_CALLER, name: role, roles: [access] };
  },
};

const completion = { model: 'tiny', prompt: 'Hello', max_tokens: 4 };

function post(url: string, payload: object, headers: Record<string, string> = {}) {
  return http.app.inject({ method: 'POST', url, headers, payload });
}

/** What a server answers to bytes, until it closes the connection. */
async function exchange(address: string, bytes: string | Buffer): Promise<string> {
  const socket = open(address);
  socket.on('error', () => {}); // it may close before all is sent
  socket.write(bytes);
  let answer = '';
  socket.on('data', (data) => (answer += String(data)));
  await new Promise((resolve) => socket.once('close', resolve));
  return answer;
}

function open(address: string): Socket {
  if (address.startsWith('unix:')) return connect(address.slice('unix:'.length));
  const [host, port] = address.split(':');
  return connect(Number(port), host);
}

function head(path: string, length: number, more = ''): string {
  return `POST ${path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: ${length}\r\n${more}\r\n`;
}

describe('the gate', () => {
  const routes = Object.entries(ROUTE_ACCESS).map(([route, access]) => {
    const [method, url] = route.split(' ') as ['GET' | 'POST', string];
    return { method, url, access };
  });

  test('is before every route that there is', async () => {
    http = await startFakeHttp({ gate: KEYS });
    await http.app.ready();
    const registered = [...http.app.printRoutes({ commonPrefix: false, includeHooks: false }).matchAll(/(\S+) \(([A-Z, ]+)\)/g)];
    const known = Object.keys(ROUTE_ACCESS);
    const count = registered.reduce((sum, [, , methods]) => sum + methods!.split(', ').filter((method) => method !== 'HEAD').length, 0);
    expect(count).toBe(known.length); // the router has all of the table, and nothing else
    for (const { method, url } of routes) expect(http.app.hasRoute({ method, url })).toBe(true);

    const heads = routes.filter(({ method }) => method === 'GET').map((route) => ({ ...route, method: 'HEAD' as const }));
    for (const { method, url, access } of [...routes, ...heads.filter(({ url }) => url !== '/status/stream')]) {
      const path = url.replace(/:\w+/, 'x');
      for (const authorization of [undefined, 'Bearer wrong', 'Basic aW5mZXI6aW5mZXI=', '']) {
        const headers = authorization === undefined ? {} : { authorization };
        const response = await http.app.inject({ method, url: path, headers });
        if (access === 'public') expect(response.statusCode, `${method} ${url}`).not.toBe(401);
        else {
          expect(response.statusCode, `${method} ${url}`).toBe(401);
          expect(response.headers['www-authenticate']).toMatch(/^Bearer/);
          if (method !== 'HEAD')
            expect(response.json()).toMatchObject({ error: { code: 'invalid_api_key', type: 'authentication_error' } });
        }
      }
      if (access !== 'public') {
        const other = access === 'infer' ? 'observe' : 'infer';
        const response = await http.app.inject({ method, url: path, headers: { authorization: `Bearer ${other}-key` } });
        expect(response.statusCode, `${method} ${url}`).toBe(403);
      }
    }
  });

  test('refuses a route without declared access at its registration', async () => {
    http = await startFakeHttp();
    expect(() => http.app.get('/secret', () => 'x')).toThrow('GET /secret declares no access');
  });

  test('lets the right key in, and comes before the body is read', async () => {
    http = await startFakeHttp({ gate: KEYS });
    const ok = await post('/v1/completions', completion, { authorization: 'Bearer infer-key' });
    expect(ok.statusCode).toBe(200);
    const address = await http.listen();
    const answer = await exchange(address, head('/v1/completions', 100_000_000)); // not a byte of it follows
    expect(answer).toMatch(/^HTTP\/1.1 401 /);
    expect(answer.toLowerCase()).toContain('connection: close');
  });

  test('tells of refusals before the service, with their reasons', async () => {
    const refused: string[] = [];
    http = await startFakeHttp({ gate: KEYS, onRefused: ({ code }) => refused.push(code), limits: { maxMessageBytes: 1024 } });
    const authorization = 'Bearer infer-key';
    await post('/v1/completions', completion);
    await post('/v1/completions', completion, { authorization: 'Bearer observe-key' });
    await post('/v1/completions', { model: 'tiny' }, { authorization });
    await post('/v1/completions', { ...completion, prompt: 'x'.repeat(2000) }, { authorization });
    await post('/drain', {});
    expect(refused).toEqual(['UNAUTHENTICATED', 'FORBIDDEN', 'INVALID_REQUEST', 'TOO_LARGE']);
  });

  test('tells of what the service refuses before it queues a request with the error that the service has counted', async () => {
    const refused: unknown[] = [];
    http = await startFakeHttp({ onRefused: (error) => refused.push(error) });
    const counted = vi.spyOn(http.service, 'refused');
    await post('/v1/completions', { ...completion, prompt: 'word '.repeat(100_000) });
    expect(counted.mock.calls).toEqual([refused]);
    expect(counted.mock.calls[0]![0]).toBe(refused[0]);
  });
});

describe('errors', () => {
  test.each([
    { error: new QueueFullError('full', 1500), status: 429, code: 'queue_full', type: 'rate_limit_error', retryAfter: '2' },
    { error: new RateLimitedError('slow down', 20), status: 429, code: 'rate_limit_exceeded', type: 'rate_limit_error', retryAfter: '1' },
    { error: new RateLimitedError('slow down'), status: 429, code: 'rate_limit_exceeded', type: 'rate_limit_error', retryAfter: undefined },
    { error: new EngineError('it broke'), status: 500, code: 'engine', type: 'server_error', retryAfter: undefined },
  ])('$error.name has its status, shape and time to wait', async ({ error, status, code, type, retryAfter }) => {
    http = await startFakeHttp();
    vi.spyOn(http.service, 'generate').mockImplementation(() => {
      throw error;
    });
    const response = await post('/v1/completions', completion);
    expect(response.statusCode).toBe(status);
    expect(response.headers['retry-after']).toBe(retryAfter);
    expect(response.json()).toEqual({ error: { message: error.message, type, code, param: null } });
  });

  test('of a defect tell nothing of it', async () => {
    http = await startFakeHttp();
    vi.spyOn(http.service, 'generate').mockImplementation(() => {
      throw new Error('secret /home/path');
    });
    const response = await post('/v1/completions', completion);
    expect(response.statusCode).toBe(500);
    expect(response.body).not.toContain('secret');
    expect(response.json()).toMatchObject({ error: { type: 'server_error', code: 'internal' } });
  });

  test('in the middle of a stream are its last event', async () => {
    http = await startFakeHttp();
    const { service } = http;
    const generate = service.generate.bind(service);
    vi.spyOn(service, 'generate').mockImplementation((request, context, onDelta) => {
      const ticket = generate(request, context, onDelta);
      return { ...ticket, done: ticket.done.then(() => Promise.reject(new EngineError('it broke'))) };
    });
    const response = await post('/v1/completions', { ...completion, stream: true });
    expect(response.statusCode).toBe(200);
    const events = response.body.trim().split('\n\n');
    expect(JSON.parse(events.at(-1)!.slice('data: '.length))).toMatchObject({ error: { message: 'it broke', type: 'server_error' } });
    expect(response.body).not.toContain('[DONE]');
  });

  test('before the first event of a stream are answers with a status', async () => {
    http = await startFakeHttp();
    expect((await post('/v1/completions', { ...completion, prompt: 'word '.repeat(2000), stream: true })).statusCode).toBe(400);
  });

  test.each([
    ['GET', '/nothing', 404],
    ['GET', '/v1/completions', 404],
    ['PUT', '/generate', 404],
    ['OPTIONS', '/v1/completions', 404],
    ['GET', '/%zz', 400],
    ['GET', `/v1/models/${'a'.repeat(10_000)}`, 400],
  ] as const)('%s %s is %d', async (method, url, status) => {
    http = await startFakeHttp();
    const response = await http.app.inject({ method, url });
    expect(response.statusCode).toBe(status);
    expect(Object.keys(response.json<{ error: object }>().error)).toEqual(['message', 'type', 'param', 'code']);
    expect(response.body.length).toBeLessThan(500);
    expect(response.headers).not.toHaveProperty('access-control-allow-origin');
  });
});

describe('bodies', () => {
  test.each([
    ['no JSON', '{"model": "tiny", ', 'the body is not JSON'],
    ['NaN', '{"temperature": NaN}', 'the body is not JSON'],
    ['nothing', '', 'the body is missing'],
    ['blanks', '  ', 'the body is empty'],
    ['a list', '[]', 'expected object'],
    ['null', 'null', 'expected object'],
    ['infinity', '{"model":"tiny","prompt":"a","temperature":1e999}', 'temperature'],
    ['a prototype', '{"model":"tiny","prompt":"a","__proto__":{"n":2}}', '__proto__'],
    ['a prototype inside', '{"model":"tiny","prompt":"a","logit_bias":{"__proto__":1}}', '__proto__'],
    ['a constructor', '{"model":"tiny","prompt":"a","constructor":{"prototype":{}}}', 'constructor'],
    ['deep nesting', `{"model":"tiny","prompt":${'['.repeat(100_000)}${']'.repeat(100_000)}}`, 'nests deeper'],
  ])('with %s are refused', async (_name, payload, message) => {
    http = await startFakeHttp();
    const headers = { 'content-type': 'application/json' };
    const response = await http.app.inject({ method: 'POST', url: '/v1/completions', headers, payload });
    expect(response.statusCode).toBe(400);
    expect(response.json<{ error: { message: string } }>().error.message).toContain(message);
    expect((await post('/v1/completions', completion)).statusCode).toBe(200);
  });

  test('with invalid UTF-8 are refused', async () => {
    http = await startFakeHttp();
    const payload = Buffer.from([...Buffer.from('{"model":"tiny","prompt":"'), 0xc3, 0x28, ...Buffer.from('"}')]);
    const headers = { 'content-type': 'application/json; charset=utf-8' };
    const response = await http.app.inject({ method: 'POST', url: '/v1/completions', headers, payload });
    expect(response.json()).toMatchObject({ error: { message: 'the body is not UTF-8', code: 'invalid_request' } });
  });

  test.each(['text/plain', 'application/x-www-form-urlencoded', 'multipart/form-data; boundary=x', 'application/xml'])(
    'of %s are refused',
    async (type) => {
      http = await startFakeHttp();
      const payload = JSON.stringify(completion);
      const response = await http.app.inject({ method: 'POST', url: '/v1/completions', headers: { 'content-type': type }, payload });
      expect(response.statusCode).toBe(415);
      expect(response.json()).toMatchObject({ error: { code: 'unsupported_media_type' } });
    },
  );

  test('of more bytes than the limit are refused, told or not', async () => {
    http = await startFakeHttp({ limits: { maxMessageBytes: 2048 } });
    const address = await http.listen();
    const told = await exchange(address, head('/v1/completions', 100 * 1024 * 1024));
    expect(told).toMatch(/^HTTP\/1.1 413 /);
    expect(told).toContain('2048 bytes');
    const chunk = 'x'.repeat(4096);
    const untold = await exchange(
      address,
      `POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n1000\r\n${chunk}\r\n`,
    );
    expect(untold).toMatch(/^HTTP\/1.1 413 /);
    expect(untold).toContain('"too_large"');
  });
});

describe('connections', () => {
  test('headers over the limit are 431', async () => {
    http = await startFakeHttp({ limits: { maxHeaderBytes: 2048 } });
    const answer = await exchange(await http.listen(), `GET /livez HTTP/1.1\r\nhost: localhost\r\nx-a: ${'a'.repeat(8192)}\r\n\r\n`);
    expect(answer).toMatch(/^HTTP\/1.1 431 /);
    expect(answer).toContain('"error"');
  });

  test('what is no HTTP is 400', async () => {
    http = await startFakeHttp();
    expect(await exchange(await http.listen(), '\x16\x03\x01 hello\r\n\r\n')).toMatch(/^HTTP\/1.1 400 [^]*"error"/);
  });

  test.each([
    { name: 'headers', bytes: 'GET /livez HTTP/1.1\r\nhost: loc' },
    { name: 'a body', bytes: head('/v1/completions', 100) + '{"model"' },
    { name: 'anything', bytes: '' },
  ])('a client that never comes to the end of $name loses its connection', async ({ bytes }) => {
    http = await startFakeHttp({ timeouts: { headersMs: 100, requestMs: 150, checkMs: 20 } });
    const answer = await exchange(await http.listen(), bytes);
    expect(answer).toMatch(/^HTTP\/1.1 408 |^$/);
  });

  test('there are no more than the limit', async () => {
    http = await startFakeHttp({ limits: { maxConnections: 2 } });
    const address = await http.listen();
    const kept = [open(address), open(address)];
    await Promise.all(kept.map((socket) => once(socket, 'connect')));
    await expect.poll(connections).toBe(2);
    expect(await exchange(address, 'GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n')).toBe('');
    for (const socket of kept) socket.destroy();
  });

  test('unix sockets and a stale file of one', async () => {
    http = await startFakeHttp();
    const path = join(mkdtempSync(join(tmpdir(), 'tandem-http-')), 'api.sock');
    const address = await http.listen(`unix:${path}`);
    expect(address).toBe(`unix:${path}`);
    expect(await exchange(address, 'GET /livez HTTP/1.1\r\nhost: any.name\r\nconnection: close\r\n\r\n')).toMatch(/^HTTP\/1.1 200 /);
    await expect(http.listen(`unix:${path}`)).rejects.toThrow('another server uses it');
  });

  test('an address in use is a configuration error', async () => {
    http = await startFakeHttp();
    const address = await http.listen();
    const other = await startFakeHttp();
    await expect(other.listen(address)).rejects.toThrow('in use');
    await other.close();
  });
});

/** Lets the engine's steps wait, so that what happens meanwhile does not depend on how fast they are. */
function holdSteps(): { hold(): void; release(): void } {
  // eslint-disable-next-line @typescript-eslint/unbound-method -- called on its engine below
  const { step } = FakeEngine.prototype;
  let held: Promise<void> | null = null;
  let release = (): void => {};
  const hold = (): void => {
    held = new Promise((resolve) => (release = resolve));
  };
  vi.spyOn(FakeEngine.prototype, 'step').mockImplementation(async function (this: FakeEngine, plan) {
    await held;
    return step.call(this, plan);
  });
  return {
    hold,
    release: () => {
      held = null;
      release();
    },
  };
}

async function tick(ms: number): Promise<string> {
  await new Promise((resolve) => setTimeout(resolve, ms));
  return 'waits';
}

function connections(): Promise<number> {
  return new Promise((resolve) => http.app.server.getConnections((_error, count) => resolve(count)));
}

describe('closing', () => {
  test('waits for the answers under way, and not for connections that ask nothing', async () => {
    const steps = holdSteps();
    steps.hold();
    http = await startFakeHttp();
    const address = await http.listen();
    const silent = open(address);
    const body = JSON.stringify(completion);
    const busy = exchange(address, head('/v1/completions', body.length) + body);
    await expect.poll(() => http.loop.snapshot().running).toBe(1);
    const closed = http.app.close();
    expect(await Promise.race([closed.then(() => 'closed'), once(silent, 'close').then(() => 'dropped'), tick(50)])).toBe('waits');
    steps.release();
    expect(await busy).toMatch(/^HTTP\/1.1 200 [^]*text_completion/);
    await closed;
  });
});

describe('a client that goes', () => {
  const long = JSON.stringify({ model: 'tiny', prompt: 'Hello', max_tokens: 400, ignore_eos: true });
  const idle = { running: 0, queued: 0, kv: { usedBlocks: 0 } };

  test.each([
    { name: 'while it waits for the first token of a stream', body: long.replace('{', '{"stream":true,'), requests: 1 },
    { name: 'while it waits for the whole answer', body: long, requests: 1 },
    { name: 'of several prompts', body: long.replace('"Hello"', '["a","b","c"]'), requests: 3 },
  ])('$name ends its requests', async ({ body, requests }) => {
    const steps = holdSteps();
    steps.hold();
    http = await startFakeHttp();
    const socket = open(await http.listen());
    socket.write(head('/v1/completions', body.length) + body);
    await expect.poll(() => http.loop.snapshot().running).toBe(requests);
    socket.destroy();
    await expect.poll(connections).toBe(0);
    steps.release();
    await expect.poll(() => http.loop.snapshot()).toMatchObject({ ...idle, finished: 0, cancelled: requests });
  });

  test('in the middle of a stream ends its request', async () => {
    const steps = holdSteps();
    http = await startFakeHttp();
    const socket = open(await http.listen());
    socket.write(head('/v1/completions', long.length + 14) + long.replace('{', '{"stream":true,'));
    await once(socket, 'data');
    steps.hold();
    socket.destroy();
    await expect.poll(connections).toBe(0);
    steps.release();
    await expect.poll(() => http.loop.snapshot()).toMatchObject({ ...idle, finished: 0, cancelled: 1 });
  });

  test('while its request waits in the queue ends it there', async () => {
    const steps = holdSteps();
    steps.hold();
    http = await startFakeHttp({ kvBlocks: 32 });
    const address = await http.listen();
    const first = open(address);
    first.write(head('/v1/completions', long.length) + long);
    await expect.poll(() => http.loop.snapshot().running).toBe(1);
    const second = open(address);
    second.write(head('/v1/completions', long.length) + long);
    await expect.poll(() => http.loop.snapshot().queued).toBe(1);
    second.destroy();
    await expect.poll(connections).toBe(1);
    steps.release();
    const answer = await new Promise((resolve) => first.once('data', resolve));
    expect(String(answer)).toMatch(/^HTTP\/1.1 200 /);
    expect(http.loop.snapshot()).toMatchObject({ ...idle, finished: 1, cancelled: 1 });
    first.destroy();
  });

  test('or does not read loses its stream', async () => {
    http = await startFakeHttp({ limits: { maxBufferedBytes: 1024 } });
    const path = join(mkdtempSync(join(tmpdir(), 'tandem-http-')), 'api.sock');
    const socket = open(await http.listen(`unix:${path}`)); // its buffers in the kernel are small, and do not grow
    const body = JSON.stringify({ model: 'tiny', prompt: 'Hello', max_tokens: 400, n: 32, ignore_eos: true, stream: true, logprobs: 1 });
    socket.pause();
    socket.write(head('/v1/completions', body.length) + body);
    await expect.poll(() => http.loop.snapshot(), { timeout: 30_000 }).toMatchObject({ ...idle, cancelled: 1, finished: 0 });
    socket.resume();
    await once(socket, 'close');
  });
});

describe('time limits of a connection', () => {
  test('do not hold for the time that an answer takes', async () => {
    const steps = holdSteps();
    steps.hold();
    http = await startFakeHttp({ timeouts: { headersMs: 50, requestMs: 50, readMs: 50, keepAliveMs: 50, checkMs: 10 } });
    const body = JSON.stringify(completion);
    const answer = exchange(await http.listen(), head('/v1/completions', body.length, 'connection: close\r\n') + body);
    await tick(300);
    steps.release();
    expect(await answer).toMatch(/^HTTP\/1.1 200 [^]*text_completion/);
  });

  test.each([true, false])('hold for a client that does not read an answer (a stream: %s)', async (stream) => {
    http = await startFakeHttp({ timeouts: { readMs: 200 }, limits: { maxBufferedBytes: 1024 ** 3 } });
    const path = join(mkdtempSync(join(tmpdir(), 'tandem-http-')), 'api.sock');
    const socket = open(await http.listen(`unix:${path}`));
    const body = JSON.stringify({ model: 'tiny', prompt: 'Hello', max_tokens: 400, n: 32, ignore_eos: true, logprobs: 1, stream });
    socket.pause();
    socket.write(head('/v1/completions', body.length) + body);
    await expect.poll(() => http.loop.snapshot().finished, { timeout: 60_000 }).toBe(1);
    await expect.poll(connections, { timeout: 10_000 }).toBe(0);
    socket.destroy();
  });
});

describe('TLS', () => {
  const hasOpenssl = spawnSync('openssl', ['version']).status === 0;

  test.skipIf(!hasOpenssl)('serves, and takes new certificates while it does (skipped without openssl)', async () => {
    const dir = mkdtempSync(join(tmpdir(), 'tandem-http-'));
    const [first, second] = [certificate(dir, 'first'), certificate(dir, 'second')];
    http = await startFakeHttp({ tls: first });
    const [host, port] = (await http.listen()).split(':');
    const nameOfServer = (): Promise<string> =>
      new Promise((resolve, reject) => {
        const socket = tlsConnect({ host, port: Number(port), rejectUnauthorized: false }, () => {
          socket.write('GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n');
        });
        let answer = '';
        socket.once('secureConnect', () => (answer = `${String(socket.getPeerCertificate().subject.CN)} `));
        socket.on('data', (data) => (answer += String(data)));
        socket.once('end', () => resolve(answer.split('\r\n')[0]!));
        socket.once('error', reject);
      });
    expect(await nameOfServer()).toBe('first HTTP/1.1 200 OK');
    http.app.setTls(second);
    expect(await nameOfServer()).toBe('second HTTP/1.1 200 OK');
  });
});

function certificate(dir: string, name: string): { key: Buffer; cert: Buffer } {
  const [key, cert] = [join(dir, `${name}.key`), join(dir, `${name}.pem`)];
  const args = ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', '2', '-subj', `/CN=${name}`];
  const { status, stderr } = spawnSync('openssl', [...args, '-keyout', key, '-out', cert]);
  if (status !== 0) throw new Error(String(stderr));
  return { key: readFileSync(key), cert: readFileSync(cert) };
}

describe('pages of other servers', () => {
  test.each([
    { headers: { host: 'localhost:7131' }, status: 200 },
    { headers: { host: '127.0.0.1:7131' }, status: 200 },
    { headers: { host: '[::1]:7131' }, status: 200 },
    { headers: { host: 'glm.example:7131' }, status: 200 },
    { headers: { host: 'localhost:7131', origin: 'http://localhost:7131' }, status: 200 },
    { headers: { host: 'evil.example' }, status: 403 },
    { headers: { host: '127.0.0.1.evil.example' }, status: 403 },
    { headers: { host: 'localhost:7131', origin: 'http://evil.example' }, status: 403 },
    { headers: { host: 'localhost:7131', origin: 'http://localhost:8080' }, status: 403 },
    { headers: { host: 'localhost:7131', origin: 'null' }, status: 403 },
  ])('$headers: $status', async ({ headers, status }) => {
    http = await startFakeHttp({ hosts: ['glm.example'] });
    expect((await http.app.inject({ method: 'GET', url: '/version', headers })).statusCode).toBe(status);
    expect((await http.app.inject({ method: 'POST', url: '/drain', headers })).statusCode).toBe(status);
  });

  test('are no danger to a server with keys, which has any name', async () => {
    http = await startFakeHttp({ hosts: null });
    const response = await http.app.inject({ url: '/version', headers: { host: 'glm.example', origin: 'http://other.example' } });
    expect(response.statusCode).toBe(200);
  });
});

describe('operating', () => {
  test('probes tell whether requests are taken, and why not', async () => {
    http = await startFakeHttp();
    for (const [state, status] of [
      ['ready', 200],
      ['recovering', 200],
      ['loading', 503],
      ['draining', 503],
      ['stopping', 503],
      ['failed', 503],
    ] as const) {
      http.setHealth(state, 'rank 1 was lost');
      for (const url of ['/readyz', '/health']) {
        const response = await http.app.inject(url);
        expect(response.statusCode).toBe(status);
        expect(response.body).toContain('rank 1 was lost');
        expect(response.headers['retry-after']).toBe(status === 503 ? '1' : undefined);
      }
      expect((await http.app.inject('/livez')).statusCode).toBe(200);
    }
  });

  test('status, metrics and version', async () => {
    http = await startFakeHttp();
    expect((await http.app.inject('/status')).json()).toMatchObject({ schema: 'tandem.status/1', state: 'ready' });
    const metrics = await http.app.inject('/metrics');
    expect(metrics.headers['content-type']).toBe('text/plain; version=0.0.4; charset=utf-8');
    expect(metrics.body).toBe('tandem_up 1\n');
    expect((await http.app.inject('/version')).json()).toMatchObject({ version: packageVersion });
    for (const url of ['/status', '/metrics', '/version']) {
      const { headers } = await http.app.inject({ method: 'HEAD', url });
      expect(headers).toMatchObject({ 'cache-control': 'no-store', 'x-content-type-options': 'nosniff' });
    }
  });

  test('the status stream goes on until the client or the server ends it', async () => {
    http = await startFakeHttp();
    const [host, port] = (await http.listen()).split(':');
    const request = httpRequest({ host, port, path: '/status/stream?interval_ms=100' }).end();
    const [response] = (await once(request, 'response')) as [NodeJS.ReadableStream & { headers: Record<string, string> }];
    expect(response.headers['content-type']).toBe('text/event-stream; charset=utf-8');
    let text = '';
    response.on('data', (data) => (text += String(data)));
    await expect.poll(() => text.split('\n\n').length).toBeGreaterThan(2);
    expect(JSON.parse(text.split('\n\n')[1]!.slice('data: '.length))).toMatchObject({ schema: 'tandem.status/1' });
    const ended = once(response, 'end');
    await http.app.close();
    await ended;
  });

  test.each(['0', '99', '60001', 'x', '1e9'])('the status stream takes no interval of %s ms', async (interval) => {
    http = await startFakeHttp();
    const response = await http.app.inject(`/status/stream?interval_ms=${interval}`);
    expect(response.json()).toMatchObject({ error: { param: 'interval_ms' } });
  });

  test('drain takes its timeout and tells what is left', async () => {
    http = await startFakeHttp();
    const drain = vi.spyOn(http.service, 'drain').mockResolvedValue(3);
    expect((await post('/drain', { timeout_ms: 500 })).json()).toEqual({ remaining: 3 });
    expect((await http.app.inject({ method: 'POST', url: '/drain' })).statusCode).toBe(200);
    await post('/drain', { timeout_ms: 0xffff_ffff });
    expect(drain.mock.calls).toEqual([[500], [null], [MAX_TIMEOUT_MS]]); // what is longer, timers take for no time at all
    expect((await post('/drain', { timeout_ms: -1 })).json()).toMatchObject({ error: { param: 'timeout_ms' } });
  });

  test('abort names a request of the caller, or all of a call with several prompts', async () => {
    const steps = holdSteps();
    http = await startFakeHttp({ gate: KEYS });
    const authorization = 'Bearer infer-key';
    const abort = vi.spyOn(http.service, 'abort').mockImplementation((id) => {
      if (id !== 'mine' && id !== 'group-1') throw new NotFoundError(`no request ${id}`);
    });
    const aborted = (id: string) => http.app.inject({ method: 'POST', url: `/v1/requests/${id}/abort`, headers: { authorization } });
    expect((await aborted('mine')).json()).toEqual({ id: 'mine', aborted: true });
    expect(abort.mock.calls[0]![1].name).toBe('infer');
    expect((await aborted('other')).statusCode).toBe(404);
    const body = { ...completion, prompt: ['a', 'b'], request_id: 'group', max_tokens: 300, ignore_eos: true };
    steps.hold();
    const answer = post('/v1/completions', body, { authorization });
    await expect.poll(() => http.loop.snapshot().running).toBe(2);
    expect((await aborted('group')).statusCode).toBe(200);
    steps.release();
    expect((await answer).statusCode).toBe(200);
    expect((await aborted('group')).statusCode).toBe(404);
  });

  test.each([
    { prompts: ['a'], name: 'one context' },
    { prompts: ['a', 'b'], name: 'several' },
  ])('abort of an old client’s call with $name by the id in its header', async ({ prompts }) => {
    const steps = holdSteps();
    steps.hold();
    http = await startFakeHttp();
    const headers = { 'x-request-id': 'old' };
    // Nothing is sent before somebody waits.
    const response = http.app.inject({ method: 'POST', url: '/generate', headers, payload: { prompt: prompts, max_tokens: 300 } }).then();
    await expect.poll(() => http.loop.snapshot().running).toBe(prompts.length);
    expect((await http.app.inject({ method: 'POST', url: '/v1/requests/old/abort' })).statusCode).toBe(200);
    steps.release();
    expect((await response).statusCode).toBe(499);
  });

  test('abort finds a request that has the id of another’s call with several prompts', async () => {
    const steps = holdSteps();
    steps.hold();
    http = await startFakeHttp();
    const body = { ...completion, request_id: 'same', max_tokens: 300, ignore_eos: true };
    const group = post('/v1/completions', { ...body, prompt: ['a', 'b'] });
    await expect.poll(() => http.loop.snapshot().running).toBe(2);
    const single = post('/v1/completions', { ...body, prompt: 'a' });
    await expect.poll(() => http.loop.snapshot().active.length).toBe(3);
    expect((await http.app.inject({ method: 'POST', url: '/v1/requests/same/abort' })).statusCode).toBe(200);
    steps.release();
    expect([(await group).statusCode, (await single).statusCode]).toEqual([499, 499]);
  });

  test('models', async () => {
    http = await startFakeHttp();
    const { data } = (await http.app.inject('/v1/models')).json<{ data: { id: string }[] }>();
    expect(data.map(({ id }) => id)).toEqual(['tiny']);
    expect((await http.app.inject('/v1/models/tiny')).json()).toMatchObject({ id: 'tiny', object: 'model', max_model_len: 512 });
    expect((await http.app.inject('/v1/models/gpt')).json()).toMatchObject({ error: { code: 'model_not_found' } });
  });

  test('the tokenizer goes there and back', async () => {
    http = await startFakeHttp();
    const prompt = 'Hello, 世界! [MASK] ok';
    const { tokens, count, max_model_len } = (await post('/tokenize', { model: 'tiny', prompt })).json<{
      tokens: number[];
      count: number;
      max_model_len: number;
    }>();
    expect({ count, max_model_len }).toEqual({ count: tokens.length, max_model_len: 512 });
    const { mask } = http.service.config.specialTokens;
    expect(tokens).toContain(mask);
    const plain = (await post('/tokenize', { prompt, add_special_tokens: false })).json<{ tokens: number[] }>();
    expect(plain.tokens).not.toContain(mask);
    expect((await post('/detokenize', { tokens: plain.tokens })).json()).toEqual({ prompt });
    expect((await post('/detokenize', { tokens: [1.5] })).json()).toMatchObject({ error: { param: 'tokens' } });
    expect((await post('/tokenize', { prompt: 1 })).json()).toMatchObject({ error: { param: 'prompt' } });
    expect((await post('/tokenize', { prompt: 'x'.repeat(2 * 1024 * 1024) })).json()).toMatchObject({ error: { param: 'prompt' } });
  });
});

describe('the dashboard', () => {
  test('is a page that runs nothing but what is written in it', async () => {
    const dashboardDir = join(mkdtempSync(join(tmpdir(), 'tandem-http-')), 'dashboard');
    mkdirSync(dashboardDir);
    writeFileSync(join(dashboardDir, 'index.html'), '<style>a{}</style><script type="module">\nrun()\n</script>');
    http = await startFakeHttp({ dashboardDir });
    const { headers, body } = await http.app.inject('/');
    expect(body).toContain('run()');
    expect(headers['content-type']).toBe('text/html; charset=utf-8');
    const policy = String(headers['content-security-policy']);
    expect(policy).toContain("default-src 'none'");
    // echo -ne '\nrun()\n' | openssl dgst -sha256 -binary | base64
    expect(policy).toContain("script-src 'sha256-X8AAKgaI44zC2JgsZRJ4adpbl777tdE6qoD0mpUQwV4='");
    expect(policy).not.toContain('unsafe');
  });

  test('that is not there is 404', async () => {
    http = await startFakeHttp({ dashboardDir: '/nonexistent' });
    expect((await http.app.inject('/')).statusCode).toBe(404);
  });
});
