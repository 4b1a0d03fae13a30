import { randomUUID } from 'node:crypto';
import { createServer, type IncomingMessage, type RequestListener, type Server, type ServerResponse } from 'node:http';
import { createServer as createTlsServer, type Server as TlsServer } from 'node:https';
import { type FastifyInstance, type FastifyReply, fastify } from 'fastify';
import { InvalidRequestError, NotFoundError } from '../../../common/errors.js';
import type { Tokenizer } from '../../../model/tokenizer/tokenizer.js';
import { LOCAL_CALLER } from '../../access/caller.js';
import type { ServingService } from '../service.js';
import { checkOrigin } from './check-origin.js';
import { closeWhenQuiet } from './close-when-quiet.js';
import { addCompletionRoute } from './completions.js';
import { addDashboardRoute } from './dashboard.js';
import { addFasterTransformerRoute } from './faster-transformer.js';
import type { HttpApi, HttpTimeouts } from './http-api.js';
import { answerClientError, MAX_PARAM_LENGTH, toHttpError } from './http-error.js';
import { addModelRoutes } from './models.js';
import { addOperatorRoutes } from './operator-routes.js';
import { parseJson, shortened } from './parse-body.js';
import { RequestGroups } from './request-groups.js';
import { accessOf } from './route-access.js';
import { addStatusRoutes } from './status-routes.js';
import { addTokenizerRoutes } from './tokenizer-routes.js';

const TIMEOUTS: HttpTimeouts = { headersMs: 10_000, requestMs: 60_000, readMs: 60_000, keepAliveMs: 65_000, checkMs: 2_000 };

/**
 * The HTTP server with all its routes; it listens to nothing yet: {@link listenHttp}. Whoever closes it ends the serving loop first, so
 * that generations end by themselves; status streams are ended here.
 */
export function createHttpServer(api: HttpApi): FastifyInstance {
  const { service, log } = api;
  const { limits } = service;
  const hosts = api.hosts === undefined ? [] : api.hosts;
  const servers: (Server | TlsServer)[] = []; // `localhost` can be two
  const closings: (() => void)[] = [];
  const timeouts = { ...TIMEOUTS, ...api.timeouts };
  const app: FastifyInstance = fastify({
    serverFactory: (handler) => {
      const server = createNodeServer(api, timeouts, handler);
      servers.push(server);
      closings.push(closeWhenQuiet(server));
      server.on('request', (_request, response: ServerResponse) => {
        // Node takes the time limit off again when the answer is read.
        response.once('prefinish', () => response.setTimeout(timeouts.readMs, () => response.destroy()));
      });
      return server;
    },
    bodyLimit: limits.maxMessageBytes,
    routerOptions: { maxParamLength: MAX_PARAM_LENGTH },
    genReqId: requestIdOf,
    clientErrorHandler: (error, socket) => answerClientError(error, socket, limits),
    frameworkErrors: (error, _request, reply) => {
      const { status, body } = toHttpError(error, limits);
      void (reply as FastifyReply).code(status).send(body);
    },
  });
  app.decorate('setTls', (tls) => {
    for (const server of servers) if ('setSecureContext' in server) server.setSecureContext(tls);
  });
  app.addHook('preClose', async () => closings.forEach((close) => close()));
  app.decorateRequest('caller');
  app.decorateRequest('isSubmitted', false);

  app.removeAllContentTypeParsers();
  app.addContentTypeParser('application/json', { parseAs: 'buffer' }, (_request, bytes, done) => {
    try {
      // Fetch sends the content type of an empty body, too; routes that need one say so.
      done(null, bytes.length === 0 ? undefined : parseJson(bytes as Buffer));
    } catch (error) {
      done(error as Error);
    }
  });

  app.addHook('onRoute', (route) => {
    const [access] = [route.method].flat().map((method) => accessOf(method, route.url));
    route.config = { ...route.config, access: access! };
  });
  app.addHook('onRequest', async (request, reply) => {
    void reply.headers({ 'x-request-id': request.id, 'cache-control': 'no-store', 'x-content-type-options': 'nosniff' });
    if (hosts !== null) checkOrigin(request, hosts);
    // What is not there needs no key; what is has its access from the table.
    request.caller = request.is404 ? LOCAL_CALLER : api.gate.authorize(request.routeOptions.config.access!, request.headers.authorization);
  });
  app.setNotFoundHandler(({ method, url }) => {
    throw new NotFoundError(`there is no ${method} ${shortened(url.split('?')[0]!)}`);
  });
  app.setErrorHandler((error, request, reply) => {
    const { status, headers, body, isDefect, refusal } = toHttpError(error, limits);
    if (isDefect) log.error({ err: error, requestId: request.id }, 'a request failed by a defect');
    if (refusal && request.routeOptions.config?.access === 'infer' && !request.isSubmitted) api.onRefused?.(refusal);
    if (!request.raw.complete) void reply.header('connection', 'close'); // the rest of its body is not read
    return reply.code(status).headers(headers).send(body);
  });

  const groups = new RequestGroups();
  addCompletionRoute(app, api, groups, tokenizerOf(service));
  addModelRoutes(app, api);
  addTokenizerRoutes(app, api);
  addFasterTransformerRoute(app, api, groups);
  addStatusRoutes(app, api);
  addOperatorRoutes(app, api, groups);
  addDashboardRoute(app, api);
  return app;
}

function createNodeServer({ service, tls }: HttpApi, timeouts: HttpTimeouts, handler: RequestListener): Server | TlsServer {
  const { headersMs, requestMs, keepAliveMs, checkMs } = timeouts;
  const options = {
    maxHeaderSize: service.limits.maxHeaderBytes,
    headersTimeout: headersMs,
    requestTimeout: requestMs,
    keepAliveTimeout: keepAliveMs,
    connectionsCheckingInterval: checkMs,
  };
  const server = tls ? createTlsServer({ ...options, ...tls }, handler) : createServer(options, handler);
  server.maxConnections = service.limits.maxConnections;
  return server;
}

/** The client's own, where it is one that the service takes. */
function requestIdOf({ headers }: IncomingMessage): string {
  const given = headers['x-request-id'];
  return typeof given === 'string' && /^[A-Za-z0-9._:-]{1,120}$/.test(given) ? given : `cmpl-${randomUUID()}`;
}

function tokenizerOf(service: ServingService): Tokenizer | null {
  try {
    return service.requireTokenizer();
  } catch (error) {
    if (error instanceof InvalidRequestError) return null;
    throw error;
  }
}
