import { status } from '@grpc/grpc-js';

/**
 * The errors a user can meet. Each says in one line what was seen, what is allowed and what to do; {@link WIRE_STATUS} is
 * the one table from code to gRPC and HTTP status. Anything that is not a TandemError is a defect and is reported as INTERNAL.
 */
export type ErrorCode =
  | 'INVALID_REQUEST'
  | 'PROMPT_TOO_LONG'
  | 'TOO_LARGE'
  | 'UNAUTHENTICATED'
  | 'FORBIDDEN'
  | 'NOT_FOUND'
  | 'QUEUE_FULL'
  | 'RATE_LIMITED'
  | 'SLOW_READER'
  | 'CANCELLED'
  | 'DEADLINE'
  | 'NOT_READY'
  | 'WORKER_LOST'
  | 'ENGINE'
  | 'CONFIG'
  | 'CHECKPOINT';

export abstract class TandemError extends Error {
  abstract readonly code: ErrorCode;
  override get name(): string {
    return this.constructor.name;
  }
}

/** The client has to change the request. */
export class InvalidRequestError extends TandemError {
  readonly code = 'INVALID_REQUEST';
  /** @param field what to change, as the client wrote it ("beam_search.num_beams"); null: the request as a whole */
  constructor(
    message: string,
    readonly field: string | null = null,
  ) {
    super(message);
  }
}
/** The prompt does not fit the model, or leaves no room to generate. */
export class PromptTooLongError extends TandemError {
  readonly code = 'PROMPT_TOO_LONG';
}
/** A body or header of more bytes than the server reads. */
export class TooLargeError extends TandemError {
  readonly code = 'TOO_LARGE';
}
/** No credentials, or wrong ones. */
export class UnauthenticatedError extends TandemError {
  readonly code = 'UNAUTHENTICATED';
}
/** The credentials are right, but their roles do not allow the call. */
export class ForbiddenError extends TandemError {
  readonly code = 'FORBIDDEN';
}
/** A model, route or request that is not there. */
export class NotFoundError extends TandemError {
  readonly code = 'NOT_FOUND';
}

/** The server can not take the request now; the same request may be taken later. */
export abstract class RetryLaterError extends TandemError {
  /** @param retryAfterMs when it is worth trying again, from the backlog; null: unknown */
  constructor(
    message: string,
    readonly retryAfterMs: number | null = null,
  ) {
    super(message);
  }
}
export class QueueFullError extends RetryLaterError {
  readonly code = 'QUEUE_FULL';
}
/** The caller's own share is used up: streams at once, or tokens in a minute. */
export class RateLimitedError extends RetryLaterError {
  readonly code = 'RATE_LIMITED';
}
/** Not yet, or no longer, able to serve: loading, draining, stopping. */
export class NotReadyError extends RetryLaterError {
  readonly code = 'NOT_READY';
}

/** The client does not read its stream; the request was ended. */
export class SlowReaderError extends TandemError {
  readonly code = 'SLOW_READER';
}
export class CancelledError extends TandemError {
  readonly code = 'CANCELLED';
}
/** The request's own deadline has passed. */
export class DeadlineError extends TandemError {
  readonly code = 'DEADLINE';
}
/** A rank was lost and could not be replaced. */
export class WorkerLostError extends TandemError {
  readonly code = 'WORKER_LOST';
}
export class EngineError extends TandemError {
  readonly code = 'ENGINE';
}
/** A flag, a configuration file or the machine does not fit: nothing was started. */
export class ConfigError extends TandemError {
  readonly code = 'CONFIG';
}
/** A file of a model on disk (checkpoint, store, tokenizer) is damaged, incomplete or not what it should be. */
export class CheckpointError extends TandemError {
  readonly code = 'CHECKPOINT';
}

/** The one table from error code to gRPC and HTTP status. 499 is what proxies log for a client that went away; nobody reads it. */
export const WIRE_STATUS: Readonly<Record<ErrorCode, { readonly grpc: status; readonly http: number }>> = {
  INVALID_REQUEST: { grpc: status.INVALID_ARGUMENT, http: 400 },
  PROMPT_TOO_LONG: { grpc: status.INVALID_ARGUMENT, http: 400 },
  TOO_LARGE: { grpc: status.RESOURCE_EXHAUSTED, http: 413 },
  UNAUTHENTICATED: { grpc: status.UNAUTHENTICATED, http: 401 },
  FORBIDDEN: { grpc: status.PERMISSION_DENIED, http: 403 },
  NOT_FOUND: { grpc: status.NOT_FOUND, http: 404 },
  QUEUE_FULL: { grpc: status.RESOURCE_EXHAUSTED, http: 429 },
  RATE_LIMITED: { grpc: status.RESOURCE_EXHAUSTED, http: 429 },
  SLOW_READER: { grpc: status.RESOURCE_EXHAUSTED, http: 408 },
  CANCELLED: { grpc: status.CANCELLED, http: 499 },
  DEADLINE: { grpc: status.DEADLINE_EXCEEDED, http: 504 },
  NOT_READY: { grpc: status.UNAVAILABLE, http: 503 },
  WORKER_LOST: { grpc: status.UNAVAILABLE, http: 503 },
  ENGINE: { grpc: status.INTERNAL, http: 500 },
  CONFIG: { grpc: status.FAILED_PRECONDITION, http: 500 },
  CHECKPOINT: { grpc: status.FAILED_PRECONDITION, http: 500 },
};
