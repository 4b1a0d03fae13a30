import { execFileSync } from 'node:child_process';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { afterEach, expect, test, vi } from 'vitest';
import { ConfigError } from '../../common/errors.js';
import { createLogger, type Logger } from '../../common/log.js';
import { packageRoot } from '../../common/package-root.js';
import { REQUEST } from './fixtures.js';
import { startTraces, type Traces } from './traces.js';

interface ReceivedSpan {
  readonly name: string;
  readonly traceId: string;
  readonly spanId: string;
  readonly parentSpanId?: string;
  readonly kind: number;
  readonly startTimeUnixNano: string;
  readonly endTimeUnixNano: string;
  readonly attributes: readonly { readonly key: string; readonly value: Record<string, unknown> }[];
  readonly status: { readonly code: number };
}

interface Receiver {
  readonly url: string;
  readonly paths: string[];
  readonly bodies: string[];
}

const servers: Server[] = [];
afterEach(() => servers.splice(0).forEach((server) => server.close().closeAllConnections()));

/** A collector that keeps what it gets. Null as status: it never answers. */
async function startReceiver(status: number | null = 200): Promise<Receiver> {
  const receiver = { url: '', paths: [] as string[], bodies: [] as string[] };
  const server = createServer((request, response) => {
    let body = '';
    request.setEncoding('utf8').on('data', (text: string) => (body += text));
    request.on('end', () => {
      receiver.paths.push(request.url!);
      receiver.bodies.push(body);
      if (status !== null) response.writeHead(status, { 'content-type': 'application/json' }).end('{}');
    });
  });
  servers.push(server);
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return Object.assign(receiver, { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}` });
}

function spansOf({ bodies }: Receiver): ReceivedSpan[] {
  type Body = { resourceSpans: { scopeSpans: { spans: ReceivedSpan[] }[] }[] };
  return bodies.flatMap((body) =>
    (JSON.parse(body) as Body).resourceSpans.flatMap(({ scopeSpans }) => scopeSpans.flatMap(({ spans }) => spans)),
  );
}

const start = (otlpEndpoint: string, log: Logger = createLogger('test', 'silent')): Promise<Traces> =>
  startTraces({ otlpEndpoint, modelName: 'glm', log });

test('a request is a span with its phases as children, sent when the server closes', async () => {
  const receiver = await startReceiver();
  const traces = await start(receiver.url);
  traces.observer.ended({ ...REQUEST, arrivalMs: performance.now() - 2000 });
  await traces.close();
  expect(receiver.paths).toEqual(['/v1/traces']);
  const spans = spansOf(receiver);
  const request = spans.find(({ name }) => name === 'text_completion glm')!;
  const ms = (span: ReceivedSpan): number => Number((BigInt(span.endTimeUnixNano) - BigInt(span.startTimeUnixNano)) / 1000n) / 1000;
  expect(ms(request)).toBeCloseTo(2000, 0);
  expect(Number(BigInt(request.endTimeUnixNano) / 1_000_000n)).toBeLessThanOrEqual(Date.now() + 1);
  expect(Number(BigInt(request.endTimeUnixNano) / 1_000_000n)).toBeGreaterThan(Date.now() - 60_000);
  expect(request.parentSpanId ?? '').toBe('');
  const phases = spans.filter(({ parentSpanId }) => parentSpanId === request.spanId);
  expect(phases.map((span) => [span.name, Math.round(ms(span)), span.traceId === request.traceId])).toEqual([
    ['queue', 100, true],
    ['prefill', 400, true],
    ['decode', 1500, true],
  ]);
  const attributes = Object.fromEntries(request.attributes.map(({ key, value }) => [key, Object.values(value)[0]]));
  expect(attributes).toEqual({
    'gen_ai.operation.name': 'text_completion',
    'gen_ai.provider.name': 'tandem',
    'gen_ai.request.model': 'glm',
    'gen_ai.response.id': 'r-1',
    'gen_ai.usage.input_tokens': 70,
    'gen_ai.usage.output_tokens': 20,
    'gen_ai.usage.cache_read.input_tokens': 10,
    'tandem.key': 'team',
    'tandem.outcome': 'finished',
    'tandem.preemptions': 1,
    'tandem.stall_seconds': 0.05,
  });
  expect(request.status.code).toBe(0);
});

test('a failed request has its error code; phases that it did not come to are left out', async () => {
  const receiver = await startReceiver();
  const traces = await start(`${receiver.url}/collector/traces`);
  const timings = { queueMs: 30, prefillMs: 0, decodeMs: 0, stallMs: 0 };
  traces.observer.ended({ ...REQUEST, outcome: 'expired', errorCode: 'DEADLINE', timings });
  await traces.close();
  expect(receiver.paths).toEqual(['/collector/traces']);
  const spans = spansOf(receiver);
  expect(spans.map(({ name }) => name).sort()).toEqual(['queue', 'text_completion glm']);
  const request = spans.find(({ name }) => name !== 'queue')!;
  expect(request.status.code).toBe(2);
  expect(request.attributes).toContainEqual({ key: 'error.type', value: { stringValue: 'DEADLINE' } });
});

const traceId = '4bf92f3577b34da6a3ce929d0e0e4736';

test("a caller's trace goes on, unless it is not sampled", async () => {
  const receiver = await startReceiver();
  const traces = await start(receiver.url);
  traces.observer.ended({ ...REQUEST, traceParent: `00-${traceId}-00f067aa0ba902b7-01` });
  traces.observer.ended({ ...REQUEST, traceParent: `00-${traceId}-00f067aa0ba902b8-00` });
  await traces.close();
  const roots = spansOf(receiver).filter(({ name }) => name === 'text_completion glm');
  expect(roots.map((span) => [span.traceId, span.parentSpanId])).toEqual([[traceId, '00f067aa0ba902b7']]);
});

test.each([
  '',
  'nonsense',
  `ff-${traceId}-00f067aa0ba902b7-01`,
  `00-${'0'.repeat(32)}-00f067aa0ba902b7-01`,
  `00-${traceId}-${'0'.repeat(16)}-01`,
  `00-${traceId.toUpperCase()}-00f067aa0ba902b7-01`,
])('the traceparent "%s" begins a trace of its own', async (traceParent) => {
  const receiver = await startReceiver();
  const traces = await start(receiver.url);
  traces.observer.ended({ ...REQUEST, traceParent });
  await traces.close();
  const [root] = spansOf(receiver).filter(({ name }) => name === 'text_completion glm');
  expect(root!.parentSpanId ?? '').toBe('');
  expect(root!.traceId).not.toBe(traceId);
});

test('a collector that refuses is logged once, and nobody else notices', async () => {
  const receiver = await startReceiver(400);
  const log = createLogger('test', 'silent');
  const warn = vi.spyOn(log, 'warn');
  const traces = await start(receiver.url, log);
  for (let i = 0; i < 1000; i++) traces.observer.ended(REQUEST); // several batches
  await traces.close();
  expect(receiver.bodies.length).toBeGreaterThan(1);
  expect(warn.mock.calls).toHaveLength(1);
  expect(warn.mock.calls[0]![1]).toBe('traces could not be sent');
});

test('a collector that never answers does not keep the server from closing', async () => {
  const traces = await start((await startReceiver(null)).url);
  traces.observer.ended(REQUEST);
  await traces.close();
});

test.each(['', 'localhost:4318', 'grpc://localhost:4317', 'http://', 'file:///tmp/traces'])('"%s" is no endpoint', async (endpoint) => {
  await expect(start(endpoint)).rejects.toThrow(ConfigError);
});

test('without traces nothing of OpenTelemetry is loaded but its interface, which prom-client brings', () => {
  const script = `import 'file://${join(packageRoot, 'dist/coordinator/main.js')}'; import 'file://${join(packageRoot, 'dist/coordinator/status/traces.js')}';
    import { createRequire } from 'node:module';
    console.log(Object.keys(createRequire('${packageRoot}/').cache).filter((path) => /@opentelemetry.(?!api.)/.test(path)).length);`;
  expect(execFileSync(process.execPath, ['--input-type=module', '-e', script], { encoding: 'utf8' }).trim()).toBe('0');
});
