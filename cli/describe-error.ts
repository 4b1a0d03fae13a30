import { status, type ServiceError } from '@grpc/grpc-js';
import { TandemError } from '../common/errors.js';

/** One line for whatever went wrong; a stack only for what is a defect of this program. */
export function describeError(error: unknown): string {
  if (error instanceof TandemError) return oneLine(error.message);
  if (isServiceError(error)) return oneLine(`${status[error.code]}: ${error.details || error.message}`);
  if (error instanceof Error && 'code' in error && typeof error.code === 'string') return oneLine(error.message); // of the operating system
  return error instanceof Error ? (error.stack ?? error.message) : String(error);
}

export function oneLine(message: string): string {
  return message.trim().replaceAll(/\s*\n\s*/g, '; ');
}

export function isServiceError(error: unknown): error is ServiceError {
  return error instanceof Error && 'details' in error && typeof (error as Partial<ServiceError>).code === 'number';
}
