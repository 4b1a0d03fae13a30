/** The gRPC API as clients see it, over a fake engine: what is let in, what is refused and how, and what becomes of bad clients. */
import { connect as connectHttp2, constants, type ClientHttp2Session } from 'node:http2';
import { spawnSync } from 'node:child_process';
import { copyFileSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer as createHttpsServer } from 'node:https';
import { connect as connectSocket, type AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { connect as connectTls } from 'node:tls';
import {
  Client,
  credentials,
  loadPackageDefinition,
  Metadata,
  status,
  type ServiceClientConstructor,
  type ServiceError,
} from '@grpc/grpc-js';
import { loadFileDescriptorSetFromBuffer, loadSync } from '@grpc/proto-loader';
import { protoPath as healthProto } from 'grpc-health-check';
import { pino } from 'pino';
import { afterEach, expect, test, vi } from 'vitest';
import { clientCredentials, type ClientTls } from '../common/address.js';
import { createLogger } from '../common/log.js';
import { Generation, googleRpc, GRPCInferenceService, Ops } from '../common/services.js';
import { createApiKey } from '../coordinator/access/api-keys.js';
import { type Gate, OPEN_GATE, type Role } from '../coordinator/access/caller.js';
import { KeyGate } from '../coordinator/access/gate.js';
import { TlsFiles } from '../coordinator/access/tls.js';
import { startFakeService, type FakeService } from '../coordinator/api/fake-service.js';
import { METHOD_ACCESS } from '../coordinator/api/grpc/method-access.js';
import { createGrpcServer, type GrpcServer } from '../coordinator/api/grpc-server.js';
import { limitsFrom, type LimitName } from '../coordinator/limits.js';
import { listen } from '../coordinator/listen.js';
import type { GenerateRequest } from '../proto/generated/tandem/v1/GenerateRequest.js';
import type { GenerateResponse__Output } from '../proto/generated/tandem/v1/GenerateResponse.js';
import type { Status__Output } from '../proto/generated/tandem/v1/Status.js';

interface Running {
  readonly server: GrpcServer;
  readonly fake: FakeService;
  readonly address: string;
  readonly logged: string[];
  readonly refused: string[];
}

const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  vi.useRealTimers();
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

async function start(
  options: { gate?: Gate; limits?: Partial<Record<LimitName, number>>; stallMs?: number; status?: () => never; kvBlocks?: number } = {},
): Promise<Running> {
  const dir = mkdtempSync(join(tmpdir(), 'tandem-grpc-test-'));
  const limits = limitsFrom(options.limits ?? {});
  const fake = await startFakeService({ limits, ...(options.kvBlocks === undefined ? {} : { kvBlocks: options.kvBlocks }) });
  const logged: string[] = [];
  const refused: string[] = [];
  let beats = 0;
  const server = createGrpcServer({
    service: fake.service,
    gate: options.gate ?? OPEN_GATE,
    log: pino({ level: 'debug' }, { write: (line: string) => void logged.push(line) }),
    status: options.status ?? (() => ({ version: 'test', state: fake.service.health.state, epoch: ++beats })),
    onRefused: (error) => void refused.push(error.code),
    ...(options.stallMs === undefined ? {} : { stallMs: options.stallMs }),
  });
  const address = await listen(server, `unix:${join(dir, 's')}`, {
    maxConnections: limits.maxConnections,
    maxHeaderBytes: limits.maxHeaderBytes,
  });
  cleanups.push(async () => {
    server.forceShutdown();
    await fake.close();
    rmSync(dir, { recursive: true });
  });
  return { server, fake, address, logged, refused };
}

function client<C extends Client>(constructor: new (...args: ConstructorParameters<typeof Client>) => C, address: string): C {
  const made = new constructor(address, credentials.createInsecure(), {});
  cleanups.push(() => made.close());
  return made;
}

function metadata(key?: string): Metadata {
  const made = new Metadata();
  if (key !== undefined) made.set('authorization', `Bearer ${key}`);
  return made;
}

/** Any method, by its path, with bytes: what the generated clients would not send. */
function callRaw(address: string, path: string, bytes: Buffer, headers = new Metadata()): Promise<ServiceError | null> {
  const raw = client(Client, address);
  return new Promise((resolve) => {
    const call = raw.makeServerStreamRequest<Buffer, Buffer>(
      path,
      (value) => value,
      (value) => value,
      bytes,
      headers,
    );
    call.on('data', () => call.cancel()); // an endless stream was let in
    call.on('error', (error: ServiceError) => resolve(error.code === status.CANCELLED ? null : error));
    call.on('end', () => resolve(null));
  });
}

interface Generated {
  readonly messages: readonly GenerateResponse__Output[];
  readonly headers: Metadata;
}

function generate(
  address: string,
  request: GenerateRequest,
  { key, deadline }: { key?: string; deadline?: number } = {},
): Promise<Generated> {
  const call = client(Generation, address).generate(request, metadata(key), deadline === undefined ? {} : { deadline });
  return new Promise((resolve, reject) => {
    const messages: GenerateResponse__Output[] = [];
    let headers = new Metadata();
    call.on('metadata', (received: Metadata) => (headers = received));
    call.on('data', (message: GenerateResponse__Output) => messages.push(message));
    call.on('error', reject);
    call.on('end', () => resolve({ messages, headers }));
  });
}

/** What a promise was rejected with. */
async function refusal(call: Promise<unknown>): Promise<ServiceError> {
  return call.then(
    () => expect.fail('was not refused'),
    (error: unknown) => error as ServiceError,
  );
}

/** The google.rpc details, as any client library would read them. */
function detailsOf(error: ServiceError): Record<string, object> {
  const [bytes] = error.metadata.get('grpc-status-details-bin');
  const decoded = googleRpc.Status.deserialize(bytes as Buffer);
  expect(decoded).toMatchObject({ code: error.code, message: error.details });
  return Object.fromEntries(
    decoded.details.map((detail) => {
      const { type_url: url, value } = detail;
      const name = url.replace('type.googleapis.com/google.rpc.', '') as keyof typeof googleRpc;
      return [name, googleRpc[name].deserialize(value)];
    }),
  );
}

async function until(condition: () => boolean): Promise<void> {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 5));
}

const HELLO: GenerateRequest = { text: 'The capital is [MASK].', temperature: 0, maxNewTokens: 8 };

// The gate

function keysFile(...keys: { name: string; roles: Role[] }[]): { path: string; keys: string[]; write: (names: string[]) => void } {
  const dir = mkdtempSync(join(tmpdir(), 'tandem-keys-test-'));
  cleanups.push(() => rmSync(dir, { recursive: true }));
  const made = keys.map((key) => createApiKey(key));
  const path = join(dir, 'keys.json');
  const write = (names: string[]): void =>
    writeFileSync(path, JSON.stringify({ keys: made.map(({ entry }) => entry).filter(({ name }) => names.includes(name)) }), {
      mode: 0o600,
    });
  write(keys.map(({ name }) => name));
  return { path, keys: made.map(({ key }) => key), write };
}

test('every method of every service asks for its role, and nothing else is let in', async () => {
  const roles: Role[] = ['infer', 'observe', 'operate'];
  const { path, keys } = keysFile(...roles.map((role) => ({ name: role, roles: [role] })));
  const { server, address } = await start({ gate: KeyGate.load(path, createLogger('test', 'silent')) });
  expect([...server.methods].sort()).toEqual(Object.keys(METHOD_ACCESS).sort());
  expect(server.methods.length).toBe(19);

  const isLetIn = (error: ServiceError | null): boolean =>
    error === null || (error.code !== status.UNAUTHENTICATED && error.code !== status.PERMISSION_DENIED);
  for (const method of server.methods.filter((name) => name !== '/tandem.v1.Ops/Drain')) {
    const access = METHOD_ACCESS[method];
    const without = await callRaw(address, method, Buffer.alloc(0));
    expect({ method, isLetIn: isLetIn(without) }).toEqual({ method, isLetIn: access === 'public' });
    if (access === 'public') continue;
    expect(without).toMatchObject({ code: status.UNAUTHENTICATED, details: 'no API key: send the header "authorization: Bearer KEY"' });
    const wrong = await callRaw(address, method, Buffer.alloc(0), metadata('tk_wrong'));
    expect(wrong).toMatchObject({ code: status.UNAUTHENTICATED, details: 'this API key is not known here' });
    for (const [i, role] of roles.entries()) {
      const error = await callRaw(address, method, Buffer.alloc(0), metadata(keys[i]));
      expect({ method, role, isLetIn: isLetIn(error) }).toEqual({ method, role, isLetIn: role === access });
      if (role !== access) expect(error).toMatchObject({ details: `the role ${access} is needed, key ${role} has ${role}` });
    }
  }
  const drain = '/tandem.v1.Ops/Drain';
  expect(await callRaw(address, drain, Buffer.alloc(0))).toMatchObject({ code: status.UNAUTHENTICATED });
  expect(await callRaw(address, drain, Buffer.alloc(0), metadata(keys[0]))).toMatchObject({ code: status.PERMISSION_DENIED });
});

test('a method that nobody gave an access cannot be registered', async () => {
  const { server } = await start();
  const service = { Peek: { ...Ops.service.GetStatus, path: '/tandem.v1.Ops/Peek' } };
  expect(() => server.addService(service, {})).toThrow('/tandem.v1.Ops/Peek is not in the table');
});

test('the header may be written in other ways, but not without a key', async () => {
  const { path, keys } = keysFile({ name: 'a', roles: ['observe'] });
  const { address, refused } = await start({ gate: KeyGate.load(path, createLogger('test', 'silent')) });
  const status200 = async (authorization: string): Promise<number | null> => {
    const headers = new Metadata();
    headers.set('authorization', authorization);
    return (await callRaw(address, '/tandem.v1.Ops/GetStatus', Buffer.alloc(0), headers))?.code ?? null;
  };
  expect(await status200(`bearer  ${keys[0]}`)).toBeNull();
  for (const wrong of ['Bearer', `Basic ${keys[0]}`, keys[0]!, `Bearer ${keys[0]} x`, `Bearer ${'x'.repeat(600)}`]) {
    expect(await status200(wrong)).toBe(status.UNAUTHENTICATED);
  }
  expect(refused).toEqual(new Array(5).fill('UNAUTHENTICATED'));
});

test('keys that are read again hold from the next call on, and a wrong file changes nothing', async () => {
  const { path, keys, write } = keysFile({ name: 'old', roles: ['observe'] }, { name: 'new', roles: ['observe'] });
  write(['old']);
  const logged: string[] = [];
  const gate = KeyGate.load(path, pino({}, { write: (line: string) => void logged.push(line) }));
  const { address } = await start({ gate });
  const codes = async (): Promise<(number | undefined)[]> =>
    Promise.all(keys.map(async (key) => (await callRaw(address, '/tandem.v1.Ops/GetStatus', Buffer.alloc(0), metadata(key)))?.code));
  expect(await codes()).toEqual([undefined, status.UNAUTHENTICATED]);
  write(['new']);
  expect(gate.reload()).toBe(true);
  expect(await codes()).toEqual([status.UNAUTHENTICATED, undefined]);
  writeFileSync(path, '{"keys":[{"name":"x"}]}');
  expect(gate.reload()).toBe(false);
  expect(logged.at(-1)).toContain('keys[0] (x).sha256');
  expect(await codes()).toEqual([status.UNAUTHENTICATED, undefined]);
});

test('the priority of a request is bounded by its key', async () => {
  const { path, keys } = keysFile({ name: 'a', roles: ['infer'] });
  const { address } = await start({ gate: KeyGate.load(path, createLogger('test', 'silent')) });
  await generate(address, { ...HELLO, options: { priority: -3 } }, { key: keys[0]! });
  const error = await refusal(generate(address, { ...HELLO, options: { priority: 1 } }, { key: keys[0]! }));
  expect(error).toMatchObject({ code: status.PERMISSION_DENIED, details: 'the priority 1 is above what key a allows, which is up to 0' });
});

// TLS

const openssl = spawnSync('openssl', ['version'], { encoding: 'utf8' });
const testTls = openssl.status === 0 ? test : test.skip;
if (openssl.status !== 0) process.stderr.write('the tests of TLS are skipped: there is no openssl to make certificates with\n');

/** An authority, and a server's certificate and a client's by it. */
function makeCertificates(dir: string, name: string) {
  const file = (what: string): string => join(dir, `${name}-${what}.pem`);
  const run = (...args: string[]): void => {
    const { status: code, stderr } = spawnSync('openssl', args, { encoding: 'utf8' });
    if (code !== 0) throw new Error(`openssl ${args.join(' ')}: ${stderr}`);
  };
  const newKey = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2'];
  run('req', '-x509', ...newKey, '-keyout', file('ca-key'), '-out', file('ca'), '-subj', `/CN=${name} authority`);
  for (const who of ['server', 'client']) {
    const by = ['-CA', file('ca'), '-CAkey', file('ca-key'), '-addext', 'subjectAltName=DNS:localhost,IP:127.0.0.1'];
    run('req', '-x509', ...newKey, ...by, '-keyout', file(`${who}-key`), '-out', file(who), '-subj', `/CN=${name} ${who}`);
  }
  const pem = (what: string): Buffer => readFileSync(file(what));
  return { file, pem };
}

interface TlsServer {
  readonly dir: string;
  readonly tls: TlsFiles;
  readonly address: string;
  readonly first: ReturnType<typeof makeCertificates>;
  readonly logged: string[];
}

async function startTls(isMutual: boolean): Promise<TlsServer> {
  const dir = mkdtempSync(join(tmpdir(), 'tandem-tls-test-'));
  cleanups.push(() => rmSync(dir, { recursive: true }));
  const first = makeCertificates(dir, 'first');
  for (const what of ['server', 'server-key', 'ca']) copyFileSync(first.file(what), join(dir, `${what}.pem`));
  const logged: string[] = [];
  const paths = { cert: join(dir, 'server.pem'), key: join(dir, 'server-key.pem'), clientCa: isMutual ? join(dir, 'ca.pem') : null };
  const tls = TlsFiles.load(paths, pino({}, { write: (line: string) => void logged.push(line) }));
  const { server } = await start();
  const address = await listen(server, '127.0.0.1:0', { credentials: tls.grpcCredentials() });
  return { dir, tls, address, first, logged };
}

/** The status over a connection of its own, or why there is none. */
async function statusOver(address: string, tls: ClientTls | null): Promise<string> {
  const ops = new Ops(address, clientCredentials(tls), { 'grpc.use_local_subchannel_pool': 1 });
  try {
    return await new Promise((resolve) =>
      ops.getStatus({}, { deadline: Date.now() + 10_000 }, (error, value) => resolve(error ? error.details : value!.version)),
    );
  } finally {
    ops.close();
  }
}

testTls('TLS shows the certificate, and another after it was read again; a wrong file changes nothing', async () => {
  const { dir, tls, address, first, logged } = await startTls(false);
  const http = createHttpsServer(tls.serverOptions(), (_request, response) => response.end('ok'));
  tls.onReload((options) => http.setSecureContext(options));
  await new Promise<void>((resolve) => http.listen(0, '127.0.0.1', resolve));
  cleanups.push(() => http.close());
  const httpIssuer = (): Promise<string> =>
    new Promise((resolve, reject) => {
      const { port } = http.address() as AddressInfo;
      const socket = connectTls({ host: '127.0.0.1', port, rejectUnauthorized: false }, () => {
        resolve(String(socket.getPeerCertificate().issuer.CN));
        socket.destroy();
      });
      socket.on('error', reject);
    });
  const trust = (ca: Buffer): ClientTls => ({ ca, identity: null });
  expect(await statusOver(address, trust(first.pem('ca')))).toBe('test');
  expect(await statusOver(address, null)).not.toBe('test');
  expect(await httpIssuer()).toBe('first authority');

  const second = makeCertificates(dir, 'second');
  expect(await statusOver(address, trust(second.pem('ca')))).toMatch(/certificate/);
  copyFileSync(second.file('server'), join(dir, 'server.pem'));
  expect(tls.reload()).toBe(false); // the key is the old one's
  expect(logged.at(-1)).toContain('is not the key of the certificate');
  expect(await statusOver(address, trust(first.pem('ca')))).toBe('test');
  copyFileSync(second.file('server-key'), join(dir, 'server-key.pem'));
  expect(tls.reload()).toBe(true);
  expect(await statusOver(address, trust(second.pem('ca')))).toBe('test');
  expect(await statusOver(address, trust(first.pem('ca')))).toMatch(/certificate/);
  expect(await httpIssuer()).toBe('second authority');
});

testTls('mutual TLS lets in who has a certificate of the authority', async () => {
  const { dir, tls, address, first } = await startTls(true);
  const second = makeCertificates(dir, 'second');
  const as = (made: typeof first): ClientTls => ({
    ca: first.pem('ca'),
    identity: { cert: made.pem('client'), key: made.pem('client-key') },
  });
  expect(await statusOver(address, as(first))).toBe('test');
  expect(await statusOver(address, { ca: first.pem('ca'), identity: null })).not.toBe('test');
  expect(await statusOver(address, as(second))).not.toBe('test');
  copyFileSync(second.file('ca'), join(dir, 'ca.pem'));
  expect(tls.reload()).toBe(true);
  expect(await statusOver(address, as(second))).toBe('test');
  expect(await statusOver(address, as(first))).not.toBe('test');
});

testTls('files that cannot serve are refused by name', () => {
  const dir = mkdtempSync(join(tmpdir(), 'tandem-tls-test-'));
  cleanups.push(() => rmSync(dir, { recursive: true }));
  const { file } = makeCertificates(dir, 'a');
  const log = createLogger('test', 'silent');
  const load =
    (cert: string, key: string, clientCa: string | null = null) =>
    () =>
      TlsFiles.load({ cert, key, clientCa }, log);
  expect(load(file('server'), file('server-key'), file('ca'))).not.toThrow();
  expect(load(join(dir, 'none'), file('server-key'))).toThrow(/--tls-cert .*none cannot be read \(ENOENT\)/);
  expect(load(dir, file('server-key'))).toThrow('is not a regular file');
  expect(load(file('server-key'), file('server-key'))).toThrow('has no certificate in PEM form');
  expect(load(file('server'), file('server'))).toThrow(/--tls-key .* is no private key in PEM form/);
  expect(load(file('server'), file('client-key'))).toThrow('is not the key of the certificate');
  expect(load(file('server'), file('server-key'), file('ca-key'))).toThrow(/--client-ca .* has no certificate/);
  const day = 24 * 3600 * 1000;
  for (const [days, message] of [
    [3, /--tls-cert .*: the certificate of CN=a server expired on .*, renew it/],
    [-1, /--tls-cert .*: the certificate of CN=a server is valid from .* on, check the clock/],
  ] as const) {
    vi.useFakeTimers({ now: Date.now() + days * day, toFake: ['Date'] });
    expect(load(file('server'), file('server-key'))).toThrow(message);
    vi.useRealTimers();
  }
});

// Generation

test('a request streams its text, and its id is in the first header and in the end', async () => {
  const { address, logged } = await start();
  const { messages, headers } = await generate(address, { ...HELLO, options: { requestId: 'mine-1' } });
  expect(headers.get('x-request-id')).toEqual(['mine-1']);
  const finish = messages.at(-1)!.finish!;
  expect(finish).toMatchObject({ requestId: 'mine-1', usage: { promptTokens: expect.any(Number) as number } });
  const tokens = messages.flatMap(({ delta }) => delta?.tokens ?? []);
  expect(tokens.length).toBe(finish.usage!.generatedTokens);
  const other = await generate(address, HELLO);
  expect(other.headers.get('x-request-id')).toEqual([other.messages.at(-1)!.finish!.requestId]);
  expect(logged.join('')).not.toContain('capital');
});

test('scores, logits and the tokenizer', async () => {
  const { address, fake } = await start();
  const generation = client(Generation, address);
  const scored = await new Promise<object | undefined>((resolve, reject) =>
    generation.score({ text: 'a [MASK]', choices: [{ text: 'b' }, { ids: { ids: [5, 6] } }] }, (error, value) =>
      error ? reject(error) : resolve(value),
    ),
  );
  expect(scored).toMatchObject({ choices: [{ tokens: expect.any(Array) as number[] }, { tokens: [5, 6] }] });
  const rows = await new Promise<number>((resolve, reject) => {
    let bytes = 0;
    const call = generation.logits({ ids: [4, 5, 6, 7], rows: 3 });
    call.on('data', ({ logits }: { logits: Buffer }) => (bytes += logits.length));
    call.on('error', reject);
    call.on('end', () => resolve(bytes / 4 / fake.service.config.vocabSize));
  });
  expect(rows).toBe(3);
});

test('control words in the text of a user stay text, but for the masks', async () => {
  const { address, fake } = await start();
  const generation = client(Generation, address);
  const ids = await new Promise<number[]>((resolve, reject) =>
    generation.tokenize({ text: '<sop> </s> <eop> <|endoftext|> sop eos [MASK]', asPrompt: true }, (error, value) =>
      error ? reject(error) : resolve(value!.ids),
    ),
  );
  const { sop, eop, eos, mask } = fake.service.config.specialTokens;
  for (const control of [sop, eop, eos]) expect(ids).not.toContain(control);
  expect(ids.filter((id) => id === mask)).toHaveLength(1);
});

test('closing the stream ends the request', async () => {
  const { address, fake } = await start();
  const call = client(Generation, address).generate({ text: 'a', maxNewTokens: 100, endTokens: { ids: [] } });
  call.on('error', () => {});
  await new Promise((resolve) => call.once('data', resolve));
  call.cancel();
  await until(() => fake.loop.snapshot().cancelled === 1);
  expect(fake.loop.snapshot().kv.usedBlocks).toBe(0);
});

test('the deadline of the call ends the request', async () => {
  const { address, fake } = await start();
  const long: GenerateRequest = { text: 'a', n: 8, maxNewTokens: 240, endTokens: { ids: [] } };
  const error = await refusal(generate(address, long, { deadline: Date.now() + 30 }));
  expect(error.code).toBe(status.DEADLINE_EXCEEDED);
  await until(() => fake.loop.snapshot().running === 0);
  expect(fake.loop.snapshot().kv.usedBlocks).toBe(0);
});

test('abort of a request that is not there', async () => {
  const { address } = await start();
  expect(await callRaw(address, '/tandem.v1.Generation/Abort', Buffer.alloc(0))).toMatchObject({
    code: status.INVALID_ARGUMENT,
    details: 'request_id is missing: give that of the request to end',
  });
});

// Errors

test.each([
  { name: 'no prompt', request: {}, field: 'prompt' },
  { name: 'NaN', request: { temperature: NaN }, field: 'temperature' },
  { name: 'infinity', request: { beamSearch: { numBeams: 2, lengthPenalty: Infinity } }, field: 'beam_search.length_penalty' },
  { name: 'a mode from the future', request: { mode: 77 as never }, field: 'mode' },
  { name: 'samples', request: { n: 65 }, field: 'n' },
  { name: 'thousands of stop strings', request: { stop: new Array<string>(5000).fill('x') }, field: 'stop' },
  { name: 'an empty stop string', request: { stop: ['ab', ''] }, field: 'stop[1]' },
  { name: 'a bias', request: { logitBias: [{ token: 4, bias: 101 }] }, field: 'logit_bias[0].bias' },
  { name: 'a penalty', request: { repetitionPenalty: 0 }, field: 'repetition_penalty' },
  { name: 'a request id', request: { options: { requestId: 'a b' } }, field: 'options.request_id' },
  { name: 'a long text', request: { text: 'x'.repeat(1024 * 1024 + 1) }, field: 'prompt.text' },
])('the details of an error name the field: $name', async ({ request, field }) => {
  const { address, refused } = await start();
  const error = await refusal(generate(address, field === 'prompt' ? request : { text: 'a', ...request }));
  expect(error.code).toBe(status.INVALID_ARGUMENT);
  expect(error.details).not.toContain('\n');
  expect(detailsOf(error)).toMatchObject({
    ErrorInfo: { reason: 'INVALID_REQUEST', domain: 'tandem' },
    BadRequest: { fieldViolations: [{ field, description: error.details }] },
  });
  expect(refused).toEqual(['INVALID_REQUEST']);
});

test('a queue that is full says when to come again', async () => {
  const { address, fake } = await start();
  const { QueueFullError } = await import('../common/errors.js');
  fake.service.generate = () => {
    throw new QueueFullError('9 requests are waiting, the queue takes 9', 2500);
  };
  const error = await refusal(generate(address, HELLO));
  expect(error.code).toBe(status.RESOURCE_EXHAUSTED);
  expect(detailsOf(error)).toMatchObject({
    ErrorInfo: { reason: 'QUEUE_FULL' },
    RetryInfo: { retryDelay: { seconds: '2', nanos: 500_000_000 } },
    QuotaFailure: { violations: [{ subject: 'server', description: error.details }] },
  });
});

test('a defect is told without its cause, which is in the log', async () => {
  const { address, logged } = await start({
    status: () => {
      throw new Error('the secret cause');
    },
  });
  const error = await callRaw(address, '/tandem.v1.Ops/GetStatus', Buffer.alloc(0));
  expect(error).toMatchObject({ code: status.INTERNAL, details: 'internal error, see the server log' });
  expect(error!.metadata.get('grpc-status-details-bin')).toEqual([]);
  expect(logged.join('')).toContain('the secret cause');
  const watch = await callRaw(address, '/tandem.v1.Ops/WatchStatus', Buffer.alloc(0));
  expect(watch).toMatchObject({ code: status.INTERNAL });
});

// What is no request at all

test('bytes that are no message are the fault of the client', async () => {
  const { address, refused } = await start();
  const whole = Generation.service.Generate.requestSerialize(HELLO);
  const garbage = [
    '0affffffff0f41',
    '07',
    '0f',
    '00',
    '0d0000',
    '09',
    'ff'.repeat(20),
    '08',
    '1dffffffff',
    whole.toString('hex').slice(0, -2),
  ];
  for (const hex of garbage) {
    const error = await callRaw(address, '/tandem.v1.Generation/Generate', Buffer.from(hex, 'hex'));
    expect(error).toMatchObject({ code: status.INVALID_ARGUMENT });
    expect(detailsOf(error!)).toMatchObject({ ErrorInfo: { reason: 'INVALID_REQUEST' } });
  }
  expect(refused).toEqual(garbage.map(() => 'INVALID_REQUEST'));
  expect(await callRaw(address, '/tandem.v1.Generation/Generate', Buffer.from(garbage[0]!, 'hex'))).toMatchObject({
    details: 'the 7 bytes of the request are not a message of this method',
  });
});

test('text that is not UTF-8 is refused by its field, and a replacement character that was sent is not', async () => {
  const { address } = await start();
  const encode = Generation.service.Generate.requestSerialize;
  const bad = encode({ text: 'ab?cd', stop: [] });
  bad[bad.indexOf('?')] = 0xff;
  expect(await callRaw(address, '/tandem.v1.Generation/Generate', bad)).toMatchObject({
    code: status.INVALID_ARGUMENT,
    details: 'text is not valid UTF-8',
  });
  const badStop = encode({ text: 'a', stop: ['b', 'c?'] });
  badStop[badStop.indexOf('?')] = 0xc0;
  expect(await callRaw(address, '/tandem.v1.Generation/Generate', badStop)).toMatchObject({ details: 'stop[1] is not valid UTF-8' });
  await generate(address, { ...HELLO, text: 'a \ufffd [MASK]' });
});

test('fields that this version does not know are ignored', async () => {
  const { address } = await start();
  const known = Generation.service.Tokenize.requestSerialize({ text: 'a' });
  const unknown = Buffer.from([0xf8, 0x7f, 0x01]); // field 2047, a varint
  expect(await callRaw(address, '/tandem.v1.Generation/Tokenize', Buffer.concat([known, unknown]))).toBeNull();
});

test('a message that is too large is refused before it is read', async () => {
  const { address } = await start({ limits: { maxMessageBytes: 1024 * 1024 } });
  const error = await callRaw(address, '/tandem.v1.Generation/Generate', Buffer.alloc(100 * 1024 * 1024, 0x20));
  expect(error).toMatchObject({ code: status.RESOURCE_EXHAUSTED });
  expect(error!.details).toMatch(/larger than max \(104857600 vs/);
  await generate(address, HELLO);
});

test('headers beyond the limit are refused', async () => {
  const { address, refused } = await start({ limits: { maxHeaderBytes: 2048 } });
  const fat = (bytes: number): Metadata => {
    const made = new Metadata();
    made.set('x-fat', 'y'.repeat(bytes));
    return made;
  };
  expect(await callRaw(address, '/tandem.v1.Ops/GetStatus', Buffer.alloc(0), fat(1000))).toBeNull();
  const error = await callRaw(address, '/tandem.v1.Ops/GetStatus', Buffer.alloc(0), fat(2100));
  expect(error!.code).toBe(status.RESOURCE_EXHAUSTED);
  expect(error!.details).toMatch(/^the headers have \d+ bytes, this server takes 2048$/);
  expect(refused).toEqual(['TOO_LARGE']);
  const large = await start({ limits: { maxHeaderBytes: 60 * 1024 } });
  const many = new Metadata();
  for (let i = 0; i < 5; i++) many.set(`x-fat-${i}`, 'y'.repeat(10_000));
  expect(await callRaw(large.address, '/tandem.v1.Ops/GetStatus', Buffer.alloc(0), many)).toBeNull();
  const flood = await callRaw(address, '/tandem.v1.Ops/GetStatus', Buffer.alloc(0), fat(60_000));
  expect(flood!.code).toBe(status.RESOURCE_EXHAUSTED);
  expect(flood!.details).not.toContain('this server takes');
  await generate(address, HELLO);
});

test('connections beyond the limit are closed', async () => {
  const { address } = await start({ limits: { maxConnections: 2 } });
  const path = address.replace('unix:', '');
  const open = (): Promise<'open' | 'closed'> =>
    new Promise((resolve) => {
      const socket = connectSocket(path);
      cleanups.push(() => socket.destroy());
      socket.once('data', () => resolve('open')); // the server's settings
      socket.once('close', () => resolve('closed'));
      socket.once('error', () => resolve('closed'));
      socket.write('PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n');
      socket.write(Buffer.from([0, 0, 0, 4, 0, 0, 0, 0, 0]));
    });
  expect(await open()).toBe('open');
  expect(await open()).toBe('open');
  expect(await open()).toBe('closed');
});

test('what speaks HTTP/2 but no gRPC, or no HTTP/2 at all, does no harm', async () => {
  const { address } = await start();
  const path = address.replace('unix:', '');
  const session = connectHttp2('http://tandem', { createConnection: () => connectSocket(path) });
  session.on('error', () => {});
  cleanups.push(() => session.destroy());
  const answers = await Promise.all([
    request(session, { ':path': '/tandem.v1.Ops/GetStatus', ':method': 'GET' }),
    request(session, { ':path': '/nothing/Here', ':method': 'POST', 'content-type': 'application/grpc' }),
    request(session, { ':path': '/%ff\u00e9?x', ':method': 'POST', 'content-type': 'application/grpc' }),
    request(session, {
      ':path': '/tandem.v1.Ops/GetStatus',
      ':method': 'POST',
      'content-type': 'application/grpc',
      'grpc-timeout': 'soon',
    }),
    request(session, { ':path': '/tandem.v1.Ops/GetStatus', ':method': 'POST', 'content-type': 'application/grpc' }, Buffer.from('\0\0\0')),
  ]);
  expect(answers[0]).toMatchObject({ ':status': 415 });
  expect(answers[1]).toMatchObject({ 'grpc-status': String(status.UNIMPLEMENTED) });
  const socket = connectSocket(path);
  socket.on('error', () => {});
  socket.resume();
  socket.end('GET / HTTP/1.1\r\n\r\n');
  await new Promise((resolve) => socket.once('close', resolve));
  await generate(address, HELLO);
});

function request(session: ClientHttp2Session, headers: Record<string, string>, body = Buffer.alloc(0)): Promise<object> {
  return new Promise((resolve) => {
    let stream;
    try {
      stream = session.request(headers);
    } catch (error) {
      resolve({ error });
      return;
    }
    stream.on('response', (response: object) => resolve({ ...response }));
    stream.on('error', (error: Error) => resolve({ error }));
    stream.on('close', () => resolve({ closed: true }));
    if (headers[':method'] !== 'GET') stream.end(body);
  });
}

// Slow readers

/** A call whose client takes the headers, and then nothing: its flow-control window stays shut. */
function startUnread(address: string, path: string, message: Buffer) {
  const session = connectHttp2('http://tandem', {
    createConnection: () => connectSocket(address.replace('unix:', '')),
    settings: { initialWindowSize: 0 },
  });
  cleanups.push(() => session.destroy());
  session.on('error', () => {});
  const stream = session.request({ ':path': path, ':method': 'POST', 'content-type': 'application/grpc', te: 'trailers' });
  const frame = Buffer.alloc(5);
  frame.writeUInt32BE(message.length, 1);
  stream.end(Buffer.concat([frame, message]));
  stream.on('error', () => {});
  const trailers = new Promise<object>((resolve) => {
    stream.on('trailers', resolve);
    stream.on('close', () => resolve({ rstCode: stream.rstCode }));
  });
  return { session, stream, trailers };
}

function generateUnread(address: string, request: GenerateRequest) {
  return startUnread(address, '/tandem.v1.Generation/Generate', Generation.service.Generate.requestSerialize(request));
}

const TALKATIVE: GenerateRequest = { text: 'a', n: 16, maxNewTokens: 200, endTokens: { ids: [] }, logprobs: 20 };

test('a client that does not read is cancelled when the buffer is full, and is told when it reads on', async () => {
  const { address, fake } = await start({ limits: { maxBufferedBytes: 16 * 1024 } });
  const { session, stream, trailers } = generateUnread(address, TALKATIVE);
  await until(() => fake.loop.snapshot().cancelled === 1);
  expect(fake.loop.snapshot().kv.usedBlocks).toBe(0);
  session.settings({ initialWindowSize: 65_535 });
  stream.resume();
  expect(await trailers).toMatchObject({
    'grpc-status': String(status.RESOURCE_EXHAUSTED),
    'grpc-message': expect.stringMatching(/^the%20client%20has%20left%20\d+%20bytes/) as string,
    'grpc-status-details-bin': expect.any(String) as string,
  });
});

test('a client that never reads is thrown out', async () => {
  const { address, fake } = await start({ stallMs: 50 });
  const { trailers } = generateUnread(address, { ...TALKATIVE, n: 1, logprobs: 0 });
  expect(await trailers).toEqual({ rstCode: constants.NGHTTP2_CANCEL });
  await until(() => fake.loop.snapshot().running === 0);
  expect(fake.loop.snapshot().kv.usedBlocks).toBe(0);
});

test('what a hundred clients leave unread stays within the bound', async () => {
  const maxBufferedBytes = 8 * 1024;
  const { address, fake } = await start({ limits: { maxBufferedBytes } });
  const unread = Array.from({ length: 100 }, () => generateUnread(address, { ...TALKATIVE, n: 2 }));
  await until(() => fake.loop.snapshot().cancelled === unread.length);
  expect(fake.loop.snapshot()).toMatchObject({ running: 0, queued: 0, kv: { usedBlocks: 0 } });
  await generate(address, HELLO);
});

// Operations

test('the status, and its stream', async () => {
  const { address, fake, server } = await start();
  const ops = client(Ops, address);
  const once = await new Promise<Status__Output>((resolve, reject) =>
    ops.getStatus({}, (error, value) => (error ? reject(error) : resolve(value!))),
  );
  expect(once).toMatchObject({ version: 'test', state: 'ready' });
  const states: string[] = [];
  const watch = ops.watchStatus({ intervalMs: 100 });
  watch.on('error', () => {});
  watch.on('data', ({ state }: Status__Output) => states.push(state));
  const ended = new Promise((resolve) => watch.once('end', resolve));
  await until(() => states.length >= 2);
  fake.setHealth('draining', 'test');
  await until(() => states.includes('draining'));
  await new Promise<void>((resolve) => server.tryShutdown(() => resolve()));
  await ended;
});

test('a watcher that goes, and one that does not read, cost nothing', async () => {
  const { address } = await start();
  const ops = client(Ops, address);
  const watch = ops.watchStatus({ intervalMs: 100 });
  watch.on('error', () => {});
  const first = await new Promise<Status__Output>((resolve) => watch.once('data', resolve));
  watch.cancel();
  const { stream } = startUnread(address, '/tandem.v1.Ops/WatchStatus', Ops.service.WatchStatus.requestSerialize({ intervalMs: 100 }));
  await new Promise((resolve) => stream.once('response', resolve));
  const later = await new Promise<Status__Output>((resolve, reject) =>
    setTimeout(() => ops.getStatus({}, (error, value) => (error ? reject(error) : resolve(value!))), 500),
  );
  expect(stream.closed).toBe(false);
  // Each status that is made counts: the unread one, this one, and perhaps one before the first watcher's end was heard of.
  expect(later.epoch - first.epoch).toBeLessThanOrEqual(3);
});

test.each([{ intervalMs: 99 }, { intervalMs: 60_001 }])('an interval of $intervalMs ms is refused', async (request) => {
  const { address } = await start();
  const watch = client(Ops, address).watchStatus(request);
  const error = await new Promise<ServiceError>((resolve) => watch.on('error', resolve));
  expect(error).toMatchObject({ code: status.INVALID_ARGUMENT, details: `interval_ms is ${request.intervalMs}, allowed are 100 to 60000` });
  expect(detailsOf(error)).toMatchObject({ BadRequest: { fieldViolations: [{ field: 'interval_ms' }] } });
});

test('draining says how many requests are left', async () => {
  const { address, fake } = await start();
  const asked: (number | null)[] = [];
  fake.service.drain = (timeoutMs) => {
    asked.push(timeoutMs);
    fake.setHealth('draining', 'an operator asked');
    return Promise.resolve(3);
  };
  const ops = client(Ops, address);
  const drain = (timeoutMs: number): Promise<number> =>
    new Promise((resolve, reject) => ops.drain({ timeoutMs }, (error, value) => (error ? reject(error) : resolve(value!.remaining))));
  expect(await drain(0)).toBe(3);
  expect(await drain(4_000_000_000)).toBe(3);
  expect(asked).toEqual([null, 2 ** 31 - 1]);
});

// The standard services

interface HealthClient extends Client {
  check(request: object, callback: (error: ServiceError | null, value: { status: string }) => void): void;
  list(request: object, callback: (error: ServiceError | null, value: { statuses: Record<string, { status: string }> }) => void): void;
  watch(request: object): NodeJS.EventEmitter & { cancel(): void };
}

function healthClient(address: string): HealthClient {
  const loaded = loadPackageDefinition(loadSync(healthProto, { enums: String, defaults: true, keepCase: true }));
  const constructor = (loaded as unknown as { grpc: { health: { v1: { Health: ServiceClientConstructor } } } }).grpc.health.v1.Health;
  return client(constructor as unknown as new (...args: ConstructorParameters<typeof Client>) => HealthClient, address);
}

test('health follows the state of the server, for all services and for each', async () => {
  const { address, fake, server } = await start();
  const health = healthClient(address);
  const check = (service: string): Promise<string | number> =>
    new Promise((resolve) => health.check({ service }, (error, value) => resolve(error ? error.code : value.status)));
  const names = ['', 'tandem.v1.Generation', 'tandem.v1.Ops', 'inference.GRPCInferenceService', 'grpc.health.v1.Health'];
  for (const name of names) expect(await check(name)).toBe('SERVING');
  expect(await check('nothing.here')).toBe(status.NOT_FOUND);

  const seen: string[] = [];
  const watch = health.watch({ service: 'tandem.v1.Generation' });
  watch.on('data', ({ status: state }: { status: string }) => seen.push(state));
  watch.on('error', () => {});
  const unknown: string[] = [];
  const watchUnknown = health.watch({ service: 'nothing.here' });
  watchUnknown.on('data', ({ status: state }: { status: string }) => unknown.push(state));
  watchUnknown.on('error', () => {});
  await until(() => seen.length === 1 && unknown.length === 1);
  expect(unknown).toEqual(['SERVICE_UNKNOWN']);
  fake.setHealth('recovering', 'a rank is replaced');
  server.updateHealth();
  fake.setHealth('draining', 'an operator asked');
  server.updateHealth();
  expect(await check('')).toBe('NOT_SERVING');
  await until(() => seen.length === 2);
  fake.setHealth('ready', '');
  await until(() => seen.length === 3); // without being told
  expect(seen).toEqual(['SERVING', 'NOT_SERVING', 'SERVING']);

  const statuses = await new Promise<Record<string, { status: string }>>((resolve, reject) =>
    health.list({}, (error, value) => (error ? reject(error) : resolve(value.statuses))),
  );
  expect(Object.keys(statuses)).toEqual(expect.arrayContaining(names));
  for (const { status: state } of Object.values(statuses)) expect(state).toBe('SERVING');

  fake.setHealth('stopping', 'SIGTERM');
  server.updateHealth();
  const ended = new Promise((resolve) => watch.once('end', resolve));
  await new Promise<void>((resolve) => server.tryShutdown(() => resolve()));
  await ended;
  expect(seen.at(-1)).toBe('NOT_SERVING');
});

test.each(['v1', 'v1alpha'])('a client can be made of what reflection %s says', async (version) => {
  const { address } = await start();
  const reflect = async (question: object): Promise<Record<string, unknown>> => {
    const path = join('node_modules', '@grpc', 'reflection', 'build', 'proto', 'grpc', 'reflection', version, 'reflection.proto');
    const loaded = loadPackageDefinition(loadSync(path, { keepCase: true, oneofs: true })) as unknown as {
      grpc: { reflection: Record<string, { ServerReflection: ServiceClientConstructor }> };
    };
    const made = client(loaded.grpc.reflection[version]!.ServerReflection, address) as unknown as {
      ServerReflectionInfo(): NodeJS.EventEmitter & { write(message: object): void; end(): void };
    };
    const call = made.ServerReflectionInfo();
    call.write(question);
    const answer = await new Promise<Record<string, unknown>>((resolve, reject) => {
      call.on('data', resolve);
      call.on('error', reject);
    });
    call.end();
    return answer;
  };
  const listed = await reflect({ list_services: '*' });
  const names = (listed['list_services_response'] as { service: { name: string }[] }).service.map(({ name }) => name);
  expect(names.sort()).toEqual(['grpc.health.v1.Health', 'inference.GRPCInferenceService', 'tandem.v1.Generation', 'tandem.v1.Ops']);
  expect(await reflect({ file_containing_symbol: 'tandem.v1.WorkerLink' })).toHaveProperty('error_response');

  const files = await reflect({ file_containing_symbol: 'tandem.v1.Generation' });
  const descriptors = (files['file_descriptor_response'] as { file_descriptor_proto: Buffer[] }).file_descriptor_proto;
  // A FileDescriptorSet is its files as field 1.
  const set = Buffer.concat(descriptors.flatMap((file) => [Buffer.from([0x0a]), varint(file.length), file]));
  const Reflected = (
    loadPackageDefinition(loadFileDescriptorSetFromBuffer(set, { keepCase: true })) as unknown as {
      tandem: { v1: { Generation: ServiceClientConstructor } };
    }
  ).tandem.v1.Generation;
  const reflected = client(Reflected, address) as unknown as {
    tokenize(request: object, callback: (error: ServiceError | null, value: { ids: number[] }) => void): void;
  };
  const tokenize = (request: object): Promise<number[]> =>
    new Promise((resolve, reject) => reflected.tokenize(request, (error, value) => (error ? reject(error) : resolve(value.ids))));
  expect(await tokenize({ text: 'a b', no_dummy_prefix: true })).not.toEqual(await tokenize({ text: 'a b' }));
});

function varint(value: number): Buffer {
  const bytes = [];
  for (; value > 0x7f; value >>>= 7) bytes.push((value & 0x7f) | 0x80);
  return Buffer.from([...bytes, value]);
}

test('KServe clients find the server and its model', async () => {
  const { address, fake } = await start();
  const kserve = client(GRPCInferenceService, address);
  const ask = <R>(call: (callback: (error: ServiceError | null, value?: R) => void) => void): Promise<R> =>
    new Promise((resolve, reject) => call((error, value) => (error ? reject(error) : resolve(value!))));
  expect(await ask((done) => kserve.serverLive({}, done))).toEqual({ live: true });
  expect(await ask((done) => kserve.serverReady({}, done))).toEqual({ ready: true });
  expect(await ask((done) => kserve.modelReady({ name: 'tiny' }, done))).toEqual({ ready: true });
  expect(await ask((done) => kserve.modelReady({ name: 'other' }, done))).toEqual({ ready: false });
  expect(await ask((done) => kserve.modelReady({ name: 'tiny', version: '2' }, done))).toEqual({ ready: false });
  expect(await ask((done) => kserve.serverMetadata({}, done))).toMatchObject({ name: 'tandem' });
  expect(await ask((done) => kserve.modelMetadata({ name: 'tiny' }, done))).toMatchObject({ name: 'tiny', platform: 'tandem_glm' });
  const error = await refusal(ask((done) => kserve.modelMetadata({ name: 'other' }, done)));
  expect(error.code).toBe(status.NOT_FOUND);
  expect(detailsOf(error)).toMatchObject({ ErrorInfo: { reason: 'NOT_FOUND' } });
  fake.setHealth('draining', 'test');
  expect(await ask((done) => kserve.serverReady({}, done))).toEqual({ ready: false });
  expect(await ask((done) => kserve.modelReady({ name: 'tiny' }, done))).toEqual({ ready: false });
  expect(await ask((done) => kserve.serverLive({}, done))).toEqual({ live: true });
});
