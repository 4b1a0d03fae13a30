/** From errors to what a client gets: status, one-line message, and google.rpc details in `grpc-status-details-bin`. */
import { Metadata, status, type ServiceError, type StatusObject } from '@grpc/grpc-js';
import { InvalidRequestError, RetryLaterError, TandemError, WIRE_STATUS } from '../../../common/errors.js';
import type { Logger } from '../../../common/log.js';
import { googleRpc } from '../../../common/services.js';
import type { BadRequest } from '../../../proto/generated/google/rpc/BadRequest.js';
import type { ErrorInfo } from '../../../proto/generated/google/rpc/ErrorInfo.js';
import type { QuotaFailure } from '../../../proto/generated/google/rpc/QuotaFailure.js';
import type { RetryInfo } from '../../../proto/generated/google/rpc/RetryInfo.js';

const DOMAIN = 'tandem';

type Detail =
  | ({ '@type': 'type.googleapis.com/google.rpc.ErrorInfo' } & ErrorInfo)
  | ({ '@type': 'type.googleapis.com/google.rpc.BadRequest' } & BadRequest)
  | ({ '@type': 'type.googleapis.com/google.rpc.RetryInfo' } & RetryInfo)
  | ({ '@type': 'type.googleapis.com/google.rpc.QuotaFailure' } & QuotaFailure);

/** What was not foreseen is logged with its cause, and told to the client without it. */
export function toStatus(error: unknown, log: Logger): StatusObject {
  if (error instanceof TandemError) {
    const code = WIRE_STATUS[error.code].grpc;
    const message = error.message.toWellFormed(); // grpc-js cannot send anything else
    const metadata = new Metadata();
    metadata.set('grpc-status-details-bin', googleRpc.Status.serialize({ code, message, details: detailsOf(error, message) }));
    return { code, details: message, metadata };
  }
  log.error({ err: error }, 'a request failed by a defect');
  return { code: status.INTERNAL, details: 'internal error, see the server log', metadata: new Metadata() };
}

export function toServiceError(error: unknown, log: Logger): ServiceError {
  const { details, ...rest } = toStatus(error, log);
  return Object.assign(new Error(details), { details, ...rest });
}

function detailsOf(error: TandemError, description: string): Detail[] {
  const details: Detail[] = [{ '@type': 'type.googleapis.com/google.rpc.ErrorInfo', reason: error.code, domain: DOMAIN }];
  if (error instanceof InvalidRequestError && error.field !== null) {
    const fieldViolations = [{ field: error.field, description }];
    details.push({ '@type': 'type.googleapis.com/google.rpc.BadRequest', fieldViolations });
  }
  if (error instanceof RetryLaterError && error.retryAfterMs !== null) {
    details.push({ '@type': 'type.googleapis.com/google.rpc.RetryInfo', retryDelay: toDuration(error.retryAfterMs) });
  }
  if (error.code === 'RATE_LIMITED' || error.code === 'QUEUE_FULL') {
    const subject = error.code === 'RATE_LIMITED' ? 'api key' : 'server';
    details.push({ '@type': 'type.googleapis.com/google.rpc.QuotaFailure', violations: [{ subject, description }] });
  }
  return details;
}

function toDuration(ms: number): { seconds: string; nanos: number } {
  const whole = Math.max(0, Math.ceil(ms));
  return { seconds: String(Math.floor(whole / 1000)), nanos: (whole % 1000) * 1_000_000 };
}
