import type { FastifyInstance } from 'fastify';
import { z } from 'zod';
import { NotReadyError } from '../../../common/errors.js';
import { packageVersion } from '../../../common/package-root.js';
import { EventStream } from './event-stream.js';
import type { HttpApi } from './http-api.js';
import { parseBody } from './parse-body.js';

const NOT_READY_RETRY_MS = 1000;

const streamQuery = z.object({ interval_ms: z.coerce.number().int().min(100).max(60_000).default(1000) });

/** Probes, status, metrics, version. */
export function addStatusRoutes(app: FastifyInstance, { service, status, metrics, log }: HttpApi): void {
  const ready = () => {
    const { state, reason } = service.health;
    if (state === 'ready' || state === 'recovering') return { state, reason }; // what comes while recovering waits, and is answered
    throw new NotReadyError(`the server is ${state}${reason === '' ? '' : `: ${reason}`}`, NOT_READY_RETRY_MS);
  };
  app.get('/livez', () => ({ state: 'alive' }));
  app.get('/readyz', ready);
  app.get('/health', ready);
  app.get('/version', () => ({ version: packageVersion, apis: ['openai.completions/v1', 'tandem.status/1'] }));
  app.get('/status', () => status());
  app.get('/metrics', async (_request, reply) => {
    const { contentType, text } = await metrics();
    return reply.type(contentType).send(text);
  });

  const stops = new Set<() => void>();
  app.addHook('preClose', async () => {
    for (const stop of stops) stop();
  });
  app.get('/status/stream', { exposeHeadRoute: false }, (request, reply) => {
    const { interval_ms } = parseBody(streamQuery, request.query);
    const events = new EventStream(reply, service.limits.maxBufferedBytes, log);
    const timer = setInterval(() => {
      if (!events.isBehind) events.send(status()); // a slow reader misses some, and gets the newest
    }, interval_ms);
    const stop = (): void => void reply.raw.end();
    stops.add(stop);
    reply.raw.once('close', () => {
      clearInterval(timer);
      stops.delete(stop);
    });
    events.send(status());
  });
}
