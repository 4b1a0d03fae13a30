import type { SpanExporter } from '@opentelemetry/sdk-trace';
import { ConfigError } from '../../common/errors.js';
import type { Logger } from '../../common/log.js';
import { packageVersion } from '../../common/package-root.js';
import { NO_OBSERVER, type LoopObserver, type RequestStats } from './observer.js';

export interface Traces {
  readonly observer: LoopObserver;
  /** Sends what is left, for {@link FLUSH_TIMEOUT_MS} at most. */
  close(): Promise<void>;
}

export interface TraceOptions {
  /** Of an OpenTelemetry collector: `http://host:4318`, or with the path where it is not `/v1/traces`. */
  readonly otlpEndpoint: string;
  readonly modelName: string;
  readonly log: Logger;
}

const FLUSH_TIMEOUT_MS = 3_000;
const EXPORT_TIMEOUT_MS = 10_000;
const BATCH_DELAY_MS = 2_000;
/** Spans that wait to be sent; more are dropped. A request has four. */
const MOST_WAITING_SPANS = 16_384;
const WARN_INTERVAL_MS = 60_000;

/**
 * One span for each request that ends, with children for queue, prefill and decode. The libraries are loaded here and not before:
 * a server without traces has nothing of them. Headers for the collector come from OTEL_EXPORTER_OTLP_HEADERS, which the exporter reads.
 * @throws ConfigError if the endpoint is no http(s) URL
 */
export async function startTraces({ otlpEndpoint, modelName, log }: TraceOptions): Promise<Traces> {
  const url = tracesUrl(otlpEndpoint);
  const [api, { BatchSpanProcessor, TracerProvider }, { OTLPTraceExporter }, { resourceFromAttributes }] = await Promise.all([
    import('@opentelemetry/api'),
    import('@opentelemetry/sdk-trace'),
    import('@opentelemetry/exporter-trace-otlp-http'),
    import('@opentelemetry/resources'),
  ]);
  const provider = new TracerProvider({
    resource: resourceFromAttributes({ 'service.name': 'tandem', 'service.version': packageVersion }),
    spanProcessors: [
      new BatchSpanProcessor({
        exporter: loggingFailures(new OTLPTraceExporter({ url, timeoutMillis: EXPORT_TIMEOUT_MS }), url, log),
        maxQueueSize: MOST_WAITING_SPANS,
        scheduledDelayMillis: BATCH_DELAY_MS,
      }),
    ],
  });
  const tracer = provider.getTracer('tandem', packageVersion);

  const ended = (request: RequestStats): void => {
    const { queueMs, prefillMs, decodeMs, stallMs } = request.timings;
    const arrivalMs = Date.now() - (performance.now() - request.arrivalMs);
    const firstStepMs = arrivalMs + queueMs;
    const firstTokenMs = firstStepMs + prefillMs;
    const endMs = firstTokenMs + decodeMs;
    const span = tracer.startSpan(
      `text_completion ${modelName}`,
      {
        kind: api.SpanKind.SERVER,
        startTime: arrivalMs,
        attributes: {
          'gen_ai.operation.name': 'text_completion',
          'gen_ai.provider.name': 'tandem',
          'gen_ai.request.model': modelName,
          'gen_ai.response.id': request.requestId,
          'gen_ai.usage.input_tokens': request.promptTokens,
          'gen_ai.usage.output_tokens': request.generatedTokens,
          'gen_ai.usage.cache_read.input_tokens': request.cachedPromptTokens,
          'tandem.key': request.key,
          'tandem.outcome': request.outcome,
          'tandem.preemptions': request.preemptions,
          'tandem.stall_seconds': stallMs / 1000,
          ...(request.errorCode === null ? {} : { 'error.type': request.errorCode }),
        },
      },
      parentOf(request.traceParent, api),
    );
    if (request.outcome === 'failed' || request.outcome === 'expired') span.setStatus({ code: api.SpanStatusCode.ERROR });
    const inSpan = api.trace.setSpan(api.ROOT_CONTEXT, span);
    const phases = [
      ['queue', arrivalMs, firstStepMs],
      ['prefill', firstStepMs, firstTokenMs],
      ['decode', firstTokenMs, endMs],
    ] as const;
    for (const [name, startTime, endTime] of phases) {
      if (endTime > startTime) tracer.startSpan(name, { startTime }, inSpan).end(endTime); // some end before they come so far
    }
    span.end(endMs);
  };

  return {
    observer: { ...NO_OBSERVER, ended },
    async close() {
      let timer: NodeJS.Timeout | undefined;
      const timeout = new Promise<void>((resolve) => (timer = setTimeout(resolve, FLUSH_TIMEOUT_MS)));
      await Promise.race([provider.shutdown().catch(() => {}), timeout]); // failures are logged already
      clearTimeout(timer);
    },
  };
}

/** @throws ConfigError */
function tracesUrl(endpoint: string): string {
  const url = URL.canParse(endpoint) ? new URL(endpoint) : null;
  if (!url || !/^https?:$/.test(url.protocol)) {
    throw new ConfigError(`--otlp-endpoint ${endpoint} is no http URL: write http://host:4318`);
  }
  if (url.pathname === '/') url.pathname = '/v1/traces';
  return url.href;
}

type Api = typeof import('@opentelemetry/api');

/** The context of a W3C `traceparent` header; a malformed one begins a trace of its own, as the standard asks. */
function parentOf(header: string | null | undefined, api: Api) {
  const match = /^(?!ff)[\da-f]{2}-(?<traceId>[\da-f]{32})-(?<spanId>[\da-f]{16})-(?<flags>[\da-f]{2})(-|$)/.exec(header ?? '');
  const { traceId = '', spanId = '', flags = '' } = match?.groups ?? {};
  const parent = { traceId, spanId, traceFlags: parseInt(flags, 16), isRemote: true };
  return api.isSpanContextValid(parent) ? api.trace.setSpanContext(api.ROOT_CONTEXT, parent) : api.ROOT_CONTEXT;
}

/** The batch processor keeps quiet about what the exporter can not send. */
function loggingFailures(exporter: SpanExporter, url: string, log: Logger): SpanExporter {
  let lastMs = -Infinity;
  let lost = 0;
  return {
    export(spans, done) {
      exporter.export(spans, (result) => {
        if (result.error) {
          lost += spans.length;
          if (performance.now() - lastMs >= WARN_INTERVAL_MS) {
            lastMs = performance.now();
            log.warn({ url, lost, reason: result.error.message }, 'traces could not be sent');
            lost = 0;
          }
        }
        done(result);
      });
    },
    shutdown: () => exporter.shutdown(),
  };
}
