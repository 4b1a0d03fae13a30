import type { FastifyInstance } from 'fastify';
import { createLogger } from '../../../common/log.js';
import { OPEN_GATE } from '../../access/caller.js';
import { DEFAULT_LIMITS, type Limits } from '../../limits.js';
import { type FakeService, startFakeService } from '../fake-service.js';
import type { HttpApi } from './http-api.js';
import { createHttpServer } from './http-server.js';
import { listenHttp } from './listen-http.js';

export interface FakeHttp extends FakeService {
  readonly app: FastifyInstance;
  /** Listens, on any free port where no address is given. @returns the address */
  listen(address?: string): Promise<string>;
}

/** For tests: the HTTP server over the fake service. */
export async function startFakeHttp(
  options: { readonly limits?: Partial<Limits>; readonly kvBlocks?: number } & Partial<Omit<HttpApi, 'service'>> = {},
): Promise<FakeHttp> {
  const { limits, kvBlocks, ...api } = options;
  const fake = await startFakeService({ limits: { ...DEFAULT_LIMITS, ...limits }, ...(kvBlocks === undefined ? {} : { kvBlocks }) });
  const app = createHttpServer({
    service: fake.service,
    gate: OPEN_GATE,
    status: () => ({ schema: 'tandem.status/1', state: fake.service.health.state }),
    metrics: async () => ({ contentType: 'text/plain; version=0.0.4; charset=utf-8', text: 'tandem_up 1\n' }),
    log: createLogger('http', 'silent'),
    ...api,
  });
  return {
    ...fake,
    app,
    listen: (address = '127.0.0.1:0') => listenHttp(app, address),
    close: async () => {
      await fake.close();
      await app.close();
    },
  };
}
