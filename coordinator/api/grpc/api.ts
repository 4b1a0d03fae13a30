import type { sendUnaryData } from '@grpc/grpc-js';
import type { TandemError } from '../../../common/errors.js';
import type { Logger } from '../../../common/log.js';
import type { Status } from '../../../proto/generated/tandem/v1/Status.js';
import type { Gate } from '../../access/caller.js';
import type { ServerState, ServingService } from '../service.js';
import { toServiceError } from './service-error.js';

/** What the gRPC API is made of. */
export interface GrpcApi {
  readonly service: ServingService;
  readonly gate: Gate;
  readonly status: () => Status;
  readonly log: Logger;
  /** Told of what is refused before the service is asked: no or wrong credentials, what is no message, fields out of their bounds. */
  readonly onRefused?: (error: TandemError) => void;
  /** How long a client may take nothing of a message that waits for it before its stream is closed. */
  readonly stallMs?: number;
}

export function isServing(state: ServerState): boolean {
  return state === 'ready' || state === 'recovering';
}

/** Answers a call of one response. */
export async function answer<R>(callback: sendUnaryData<R>, log: Logger, respond: () => R | Promise<R>): Promise<void> {
  try {
    callback(null, await respond());
  } catch (error) {
    callback(toServiceError(error, log));
  }
}
