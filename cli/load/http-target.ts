import { once } from 'node:events';
import * as http from 'node:http';
import * as https from 'node:https';
import { text } from 'node:stream/consumers';
import { StringDecoder } from 'node:string_decoder';
import { z } from 'zod';
import type { ClientTls } from '../../common/address.js';
import { ConfigError } from '../../common/errors.js';
import { oneLine } from '../describe-error.js';
import type { Ending, LoadTarget, RequestShape } from './target.js';

/** What of OpenAI's stream of completions is looked at. */
const chunkSchema = z.object({
  choices: z.array(z.object({ text: z.string() })).optional(),
  usage: z
    .object({
      prompt_tokens: z.int(),
      completion_tokens: z.int(),
      prompt_tokens_details: z.object({ cached_tokens: z.int().optional() }).nullish(),
    })
    .nullish(),
  error: z.object({ message: z.string(), code: z.union([z.string(), z.number()]).nullish() }).nullish(),
});
const modelsSchema = z.object({ data: z.array(z.object({ id: z.string() })) });
const errorSchema = z.object({ error: z.object({ message: z.string() }) });

/** Longest answer of a refusal that is read. */
const MAX_ERROR_BYTES = 64 * 1024;

export interface HttpEndpoint {
  /** `http://host:port`; everything is below /v1. */
  readonly url: string;
  /** Null: as the machine trusts. */
  readonly tls: ClientTls | null;
}

export interface HttpTargetOptions extends HttpEndpoint {
  readonly model: string;
  /** Added to every body. */
  readonly extraBody: Readonly<Record<string, unknown>>;
  readonly shape: RequestShape;
}

/** A message with text counts as one token; the usage at the end has the true number. */
export function httpTarget({ url, model, extraBody, tls, shape }: HttpTargetOptions): LoadTarget {
  const { endpoint, open, agent } = prepare('completions', { url, tls });
  return {
    send({ prompt, outputTokens, key }, onTokens) {
      const body = JSON.stringify({
        model,
        prompt: 'text' in prompt ? prompt.text : prompt.ids,
        max_tokens: outputTokens,
        temperature: shape.temperature,
        seed: shape.seed,
        stream: true,
        stream_options: { include_usage: true },
        ...extraBody,
      });
      const headers: Record<string, string> = {
        'content-type': 'application/json',
        'content-length': String(Buffer.byteLength(body)),
        accept: 'text/event-stream',
      };
      if (key !== null) headers['authorization'] = `Bearer ${key}`;
      const call = open(endpoint, { agent, method: 'POST', headers });
      let isCancelled = false;
      const ended = new Promise<Ending>((resolve) => {
        const fail = (code: string, message: string): void =>
          resolve(isCancelled ? { kind: 'cancelled' } : { kind: 'failed', code, message: oneLine(message) });
        call.on('error', (error: NodeJS.ErrnoException) => fail(error.code ?? 'CONNECTION', error.message));
        call.on('response', (response) => {
          response.on('error', (error: NodeJS.ErrnoException) => fail(error.code ?? 'CONNECTION', error.message));
          response.on('close', () => fail('NO_DONE', 'the stream ended without [DONE]')); // no effect after an end
          if (response.statusCode !== 200) readRefusal(response, (message) => fail(`HTTP_${response.statusCode}`, message));
          else readEvents(response, onTokens, resolve, fail);
        });
        if (shape.timeoutMs > 0) {
          const timer = setTimeout(() => {
            fail('TIMEOUT', `no end within ${shape.timeoutMs} ms`);
            call.destroy();
          }, shape.timeoutMs);
          call.on('close', () => clearTimeout(timer));
        }
      });
      call.end(body);
      const cancel = (): void => {
        isCancelled = true;
        call.destroy();
      };
      return { ended, cancel };
    },
    close: () => agent.destroy(),
  };
}

/** The first model that the server has. @throws ConfigError where it does not tell */
export async function firstModel(server: HttpEndpoint, key: string | null): Promise<string> {
  const { endpoint, open, agent } = prepare('models', server);
  const call = open(endpoint, { agent, headers: key === null ? {} : { authorization: `Bearer ${key}` } });
  try {
    call.end();
    const [response] = (await once(call, 'response')) as [http.IncomingMessage];
    const body = parseJson(await text(response));
    const [model] = modelsSchema.safeParse(body).data?.data ?? [];
    if (model) return model.id;
    throw new ConfigError(
      `--http ${server.url}: GET /v1/models answers ${response.statusCode}, ${refusalOf(body) ?? 'no model'}: give --http-model`,
    );
  } catch (error) {
    if (error instanceof ConfigError) throw error;
    throw new ConfigError(`--http ${server.url}: ${oneLine((error as Error).message)}`);
  } finally {
    agent.destroy();
  }
}

/** @throws ConfigError */
function prepare(what: string, { url, tls }: HttpEndpoint) {
  const base = parseUrl(url);
  const { Agent, request: open } = base.protocol === 'https:' ? https : http;
  return {
    endpoint: new URL(`${base.pathname.replace(/\/$/, '')}/v1/${what}`, base),
    open,
    agent: new Agent({ keepAlive: true, maxSockets: Infinity, ...(tls?.ca ? { ca: tls.ca } : {}), ...tls?.identity }),
  };
}

/** @throws ConfigError */
function parseUrl(given: string): URL {
  const url = URL.canParse(given) ? new URL(given) : null;
  if (url === null || !['http:', 'https:'].includes(url.protocol)) throw new ConfigError(`--http ${given}: write http://host:port`);
  return url;
}

function readEvents(
  response: http.IncomingMessage,
  onTokens: (count: number, ids: readonly number[]) => void,
  resolve: (ending: Ending) => void,
  fail: (code: string, message: string) => void,
): void {
  let chunks = 0;
  let usage: z.infer<typeof chunkSchema>['usage'] = null;
  const onData = (data: string): void => {
    if (data === '[DONE]') {
      resolve({
        kind: 'finished',
        promptTokens: usage?.prompt_tokens ?? 0,
        outputTokens: usage?.completion_tokens ?? chunks,
        cachedPromptTokens: usage?.prompt_tokens_details?.cached_tokens ?? 0,
        serverQueueMs: null,
      });
      return;
    }
    const parsed = chunkSchema.safeParse(parseJson(data));
    if (!parsed.success) return fail('BAD_EVENT', 'an event that is no completion chunk');
    const { choices = [], error } = parsed.data;
    if (error) return fail(String(error.code ?? 'ERROR'), error.message);
    usage = parsed.data.usage ?? usage;
    if (choices.every(({ text }) => text === '')) return;
    chunks += 1;
    onTokens(1, []);
  };
  const decoder = new StringDecoder('utf8');
  let rest = '';
  response.on('data', (bytes: Buffer) => {
    const lines = (rest + decoder.write(bytes)).split('\n');
    rest = lines.pop()!;
    for (const line of lines) if (line.startsWith('data:')) onData(line.slice('data:'.length).trim());
  });
}

function readRefusal(response: http.IncomingMessage, done: (message: string) => void): void {
  let body = '';
  response.setEncoding('utf8').on('data', (more: string) => {
    if (body.length < MAX_ERROR_BYTES) body += more;
  });
  response.on('end', () => {
    done(refusalOf(parseJson(body)) ?? response.statusMessage ?? '');
  });
}

function refusalOf(body: unknown): string | null {
  return errorSchema.safeParse(body).data?.error.message ?? null;
}

/** Undefined for what is no JSON. */
function parseJson(json: string): unknown {
  try {
    return JSON.parse(json);
  } catch {
    return undefined;
  }
}
