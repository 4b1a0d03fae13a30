import * as http from 'node:http';
import * as https from 'node:https';
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
const errorSchema = z.object({ error: z.object({ message: z.string() }) });

/** Longest answer of a refusal that is read. */
const MAX_ERROR_BYTES = 64 * 1024;

export interface HttpTargetOptions {
  /** `http://host:port`; the completions are below /v1. */
  readonly url: string;
  readonly model: string;
  /** Added to every body. */
  readonly extraBody: Readonly<Record<string, unknown>>;
  /** Null: as the machine trusts. */
  readonly tls: ClientTls | null;
  readonly shape: RequestShape;
}

/** A message with text counts as one token; the usage at the end has the true number. */
export function httpTarget({ url, model, extraBody, tls, shape }: HttpTargetOptions): LoadTarget {
  const base = parseUrl(url);
  const endpoint = new URL(`${base.pathname.replace(/\/$/, '')}/v1/completions`, base);
  const { Agent, request: open } = base.protocol === 'https:' ? https : http;
  const agent = new Agent({ keepAlive: true, maxSockets: Infinity, ...(tls?.ca ? { ca: tls.ca } : {}), ...tls?.identity });
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

/** @throws ConfigError */
function parseUrl(text: string): URL {
  const url = URL.canParse(text) ? new URL(text) : null;
  if (url === null || !['http:', 'https:'].includes(url.protocol)) throw new ConfigError(`--http ${text}: write http://host:port`);
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
  let text = '';
  response.setEncoding('utf8').on('data', (more: string) => {
    if (text.length < MAX_ERROR_BYTES) text += more;
  });
  response.on('end', () => {
    const parsed = errorSchema.safeParse(parseJson(text));
    done(parsed.success ? parsed.data.error.message : (response.statusMessage ?? ''));
  });
}

/** Undefined for what is no JSON. */
function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
