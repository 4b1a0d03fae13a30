import { status } from '@grpc/grpc-js';

/**
 * The errors a user can meet. Each says in one line what was seen, what is allowed and what to do; {@link GRPC_STATUS} is
 * the one table from class to wire status. Anything that is not a TandemError is a defect and is reported as INTERNAL.
 */
export type ErrorCode =
  'INVALID_REQUEST' | 'PROMPT_TOO_LONG' | 'QUEUE_FULL' | 'CANCELLED' | 'NOT_READY' | 'WORKER_LOST' | 'ENGINE' | 'CONFIG' | 'CHECKPOINT';

export abstract class TandemError extends Error {
  abstract readonly code: ErrorCode;
  override get name(): string {
    return this.constructor.name;
  }
}

/** The client has to change the request. */
export class InvalidRequestError extends TandemError {
  readonly code = 'INVALID_REQUEST';
}
/** The prompt does not fit the model, or leaves no room to generate. */
export class PromptTooLongError extends TandemError {
  readonly code = 'PROMPT_TOO_LONG';
}
export class QueueFullError extends TandemError {
  readonly code = 'QUEUE_FULL';
}
export class CancelledError extends TandemError {
  readonly code = 'CANCELLED';
}
export class NotReadyError extends TandemError {
  readonly code = 'NOT_READY';
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

/** The one table from error code to gRPC status. */
export const GRPC_STATUS: Readonly<Record<ErrorCode, status>> = {
  INVALID_REQUEST: status.INVALID_ARGUMENT,
  PROMPT_TOO_LONG: status.INVALID_ARGUMENT,
  QUEUE_FULL: status.RESOURCE_EXHAUSTED,
  CANCELLED: status.CANCELLED,
  NOT_READY: status.UNAVAILABLE,
  WORKER_LOST: status.UNAVAILABLE,
  ENGINE: status.INTERNAL,
  CONFIG: status.FAILED_PRECONDITION,
  CHECKPOINT: status.FAILED_PRECONDITION,
};
