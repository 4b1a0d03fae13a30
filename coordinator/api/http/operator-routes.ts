import type { FastifyInstance } from 'fastify';
import { z } from 'zod';
import { NotFoundError } from '../../../common/errors.js';
import { toDrainTimeout } from '../validate.js';
import type { HttpApi } from './http-api.js';
import { optional, parseBody } from './parse-body.js';
import type { RequestGroups } from './request-groups.js';

const drainBody = z.strictObject({ timeout_ms: optional(z.int()) });

/** Abort of a request and drain of the server; neither needs a body. */
export function addOperatorRoutes(app: FastifyInstance, { service }: HttpApi, groups: RequestGroups): void {
  app.post<{ Params: { id: string } }>('/v1/requests/:id/abort', ({ params, caller }) => {
    const failures: NotFoundError[] = [];
    const ids = groups.idsOf(params.id);
    for (const id of ids) {
      try {
        service.abort(id, caller);
      } catch (error) {
        if (!(error instanceof NotFoundError)) throw error;
        failures.push(error); // of several prompts, some may have ended
      }
    }
    if (failures.length === ids.length) throw failures[0]!;
    return { id: params.id, aborted: true };
  });
  app.post('/drain', async ({ body }) => {
    const { timeout_ms } = parseBody(drainBody, body ?? {});
    return { remaining: await service.drain(toDrainTimeout({ timeoutMs: timeout_ms ?? 0 })) };
  });
}
