import { STATUS_CODES } from 'node:http';
import type { Socket } from 'node:net';
import {
  type ErrorCode,
  InvalidRequestError,
  NotFoundError,
  RetryLaterError,
  TandemError,
  TooLargeError,
  WIRE_STATUS,
} from '../../../common/errors.js';
import type { Limits } from '../../limits.js';

/** An error as OpenAI's API writes it. */
export interface ErrorBody {
  readonly error: { readonly message: string; readonly type: string; readonly param: string | null; readonly code: string };
}

export interface HttpError {
  readonly status: number;
  readonly headers: Readonly<Record<string, string>>;
  readonly body: ErrorBody;
  /** Not foreseen: to be logged with its cause, which the client is not told. */
  readonly isDefect: boolean;
  /** What the metrics count; null: a defect, or nobody to answer. */
  readonly refusal: TandemError | null;
}

/** Of the parts of a path that are a name or an id. */
export const MAX_PARAM_LENGTH = 256;

export class ModelNotFoundError extends NotFoundError {}

/** OpenAI's names where it has one; the others are the server's own. */
const CODES: Partial<Record<ErrorCode, string>> = {
  PROMPT_TOO_LONG: 'context_length_exceeded',
  UNAUTHENTICATED: 'invalid_api_key',
  RATE_LIMITED: 'rate_limit_exceeded',
};

export function toHttpError(error: unknown, limits: Limits): HttpError {
  const known = fromFastify(error, limits);
  if (known instanceof TandemError) {
    const status = WIRE_STATUS[known.code].http;
    const isModel = known instanceof ModelNotFoundError;
    return {
      status,
      headers: { ...retryAfter(known), ...(status === 401 ? { 'www-authenticate': 'Bearer realm="tandem"' } : {}) },
      body: errorBody(status, known.message, {
        param: isModel ? 'model' : known instanceof InvalidRequestError ? known.field : null,
        code: isModel ? 'model_not_found' : (CODES[known.code] ?? known.code.toLowerCase()),
      }),
      isDefect: false,
      refusal: known,
    };
  }
  const status = known.status ?? 500;
  return {
    status,
    headers: {},
    body: errorBody(status, known.message, { param: null, code: known.code }),
    isDefect: known.status === null,
    refusal: status === 415 ? new InvalidRequestError(known.message) : null,
  };
}

interface Untyped {
  /** Null: a defect. */
  readonly status: number | null;
  readonly message: string;
  readonly code: string;
}

/** What fastify refuses by itself; its messages name its options instead of ours. */
function fromFastify(error: unknown, limits: Limits): TandemError | Untyped {
  if (error instanceof TandemError) return error;
  const { code, statusCode, message } = (error ?? {}) as { code?: string; statusCode?: number; message?: string };
  if (code === 'FST_ERR_CTP_BODY_TOO_LARGE') {
    return new TooLargeError(`the body has more than the ${limits.maxMessageBytes} bytes that are read: send less at once`);
  }
  if (code === 'FST_ERR_CTP_INVALID_MEDIA_TYPE') {
    return { status: 415, message: 'content-type is not application/json: send JSON', code: 'unsupported_media_type' };
  }
  if (code === 'FST_ERR_BAD_URL' || code === 'FST_ERR_MAX_PARAM_LENGTH') {
    return new InvalidRequestError(`the path is no valid URL, or has a part of more than ${MAX_PARAM_LENGTH} characters`);
  }
  if (code?.startsWith('FST_ERR_') && statusCode !== undefined && statusCode >= 400 && statusCode < 500) {
    return new InvalidRequestError(oneLine(message ?? 'the request can not be read'));
  }
  if (code === 'ECONNRESET') return { status: 499, message: 'the client went away', code: 'cancelled' };
  return { status: null, message: 'internal error, see the server log', code: 'internal' };
}

function errorBody(status: number, message: string, { param, code }: { param: string | null; code: string }): ErrorBody {
  return { error: { message, type: typeOf(status), param, code } };
}

function typeOf(status: number): string {
  if (status === 401) return 'authentication_error';
  if (status === 403) return 'permission_error';
  if (status === 429) return 'rate_limit_error';
  return status >= 500 && status !== 504 ? 'server_error' : status === 504 ? 'timeout_error' : 'invalid_request_error';
}

/** Whole seconds, and never "at once". */
function retryAfter(error: TandemError): Record<string, string> {
  if (!(error instanceof RetryLaterError) || error.retryAfterMs === null) return {};
  return { 'retry-after': String(Math.max(1, Math.ceil(error.retryAfterMs / 1000))) };
}

/** Bytes that are no HTTP, headers over the limit, a request that does not come to its end: there is no request to answer yet. */
export function answerClientError(error: Error & { code?: string }, socket: Socket, limits: Limits): void {
  if (error.code === 'ECONNRESET' || socket.destroyed || !socket.writable) {
    socket.destroy();
    return;
  }
  const [status, code, message] =
    error.code === 'HPE_HEADER_OVERFLOW'
      ? [431, 'too_large', `the headers have more than the ${limits.maxHeaderBytes} bytes that are read`]
      : error.code === 'ERR_HTTP_REQUEST_TIMEOUT'
        ? [408, 'timeout', 'the request did not come to its end in time']
        : [400, 'invalid_request', 'the request is not HTTP'];
  const body = JSON.stringify(errorBody(status, message, { param: null, code }));
  socket.end(
    `HTTP/1.1 ${status} ${STATUS_CODES[status]}\r\ncontent-type: application/json; charset=utf-8\r\n` +
      `content-length: ${Buffer.byteLength(body)}\r\nconnection: close\r\n\r\n${body}`,
    () => socket.destroy(),
  );
}

function oneLine(text: string): string {
  return text.split('\n')[0]!;
}
