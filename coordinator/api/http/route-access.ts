import type { Access } from '../../access/caller.js';

/** The one table of routes: what a caller has to be allowed. A route that is not in it can not be registered. */
export const ROUTE_ACCESS = {
  'POST /v1/completions': 'infer',
  'GET /v1/models': 'infer',
  'GET /v1/models/:model': 'infer',
  'POST /v1/requests/:id/abort': 'infer',
  'POST /tokenize': 'infer',
  'POST /detokenize': 'infer',
  'POST /generate': 'infer',
  'GET /status': 'observe',
  'GET /status/stream': 'observe',
  'GET /metrics': 'observe',
  'POST /drain': 'operate',
  'GET /livez': 'public',
  'GET /readyz': 'public',
  'GET /health': 'public',
  'GET /version': 'public',
  'GET /': 'public',
} as const satisfies Readonly<Record<string, Access>>;

/** @throws Error for a route that declares no access: a defect */
export function accessOf(method: string, url: string): Access {
  const route = `${method === 'HEAD' ? 'GET' : method} ${url}`; // HEAD is its GET without the body
  if (!Object.hasOwn(ROUTE_ACCESS, route)) throw new Error(`route ${route} declares no access`);
  return ROUTE_ACCESS[route as keyof typeof ROUTE_ACCESS];
}
