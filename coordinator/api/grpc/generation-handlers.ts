import { Metadata, type Deadline, type ServerUnaryCall, type ServerWritableStream } from '@grpc/grpc-js';
import { CancelledError, DeadlineError, TandemError } from '../../../common/errors.js';
import { Generation } from '../../../common/services.js';
import type { GenerationHandlers } from '../../../proto/generated/tandem/v1/Generation.js';
import type { RequestOptions__Output } from '../../../proto/generated/tandem/v1/RequestOptions.js';
import type { Ticket } from '../../job.js';
import { encodeDelta } from '../encode-delta.js';
import { encodeFinish, encodeScore } from '../encode.js';
import type { CallContext } from '../service.js';
import {
  MAX_TIMEOUT_MS,
  toAbortId,
  toCallContext,
  toDetokenizeIds,
  toGenerationRequest,
  toLogitsRequest,
  toScoreRequest,
  toTokenizeText,
} from '../validate.js';
import { answer, type GrpcApi } from './api.js';
import { BoundedWriter } from './bounded-writer.js';
import { callerOf } from './gated-server.js';
import { toServiceError } from './service-error.js';

/** Bytes of one message of a Logits stream, at most (one row at least). */
const LOGITS_MESSAGE_BYTES = 1024 * 1024;

export function generationHandlers(api: GrpcApi): GenerationHandlers {
  const { service, log } = api;
  const { limits } = service;
  return {
    Generate: (call) =>
      void stream(call, api, Generation.service.Generate.responseSerialize, async (writer, started) => {
        const { request, context } = checked(api, () => ({
          request: toGenerationRequest(call.request, limits),
          context: contextOf(call),
        }));
        const prepared = await service.prepare(request, endOf(call), context);
        const ticket = started(service.generate(prepared, context, (delta) => writer.writeBytes(encodeDelta(delta))));
        writer.write(encodeFinish(ticket.requestId, await ticket.done));
      }),
    Logits: (call) =>
      void stream(call, api, Generation.service.Logits.responseSerialize, async (writer, started) => {
        const { request, context } = checked(api, () => ({ request: toLogitsRequest(call.request), context: contextOf(call) }));
        const { value } = await started(service.logits(request, context)).done;
        const { vocabSize } = service.config;
        const rowsAtOnce = Math.max(1, Math.floor(LOGITS_MESSAGE_BYTES / (vocabSize * 4)));
        for (let row = 0; row < request.rows; row += rowsAtOnce) {
          const rows = Math.min(rowsAtOnce, request.rows - row);
          const part = value.subarray(row * vocabSize, (row + rows) * vocabSize);
          writer.write({ rows, vocabSize, logits: Buffer.from(part.buffer, part.byteOffset, part.byteLength) });
          await writer.idle();
        }
      }),
    Score: (call, callback) =>
      void answer(callback, log, async () => {
        const { request, context } = checked(api, () => ({ request: toScoreRequest(call.request, limits), context: contextOf(call) }));
        const ticket = cancelWith(call, service.score(await service.prepareScore(request, endOf(call), context), context));
        call.sendMetadata(requestIdMetadata(ticket));
        return encodeScore(await ticket.done);
      }),
    Abort: (call, callback) =>
      void answer(callback, log, () => {
        service.abort(
          checked(api, () => toAbortId(call.request)),
          callerOf(call),
        );
        return {};
      }),
    Tokenize: (call, callback) =>
      void answer(callback, log, async () => {
        const text = checked(api, () => toTokenizeText(call.request, limits));
        const { asPrompt, noDummyPrefix } = call.request;
        return { ids: await service.tokenize(text, { asPrompt, dummyPrefix: !noDummyPrefix }, endOf(call)) };
      }),
    Detokenize: (call, callback) =>
      void answer(callback, log, () => {
        const tokenizer = service.requireTokenizer();
        const ids = checked(api, () => toDetokenizeIds(call.request, limits));
        return { text: call.request.showSpecial ? tokenizer.detokenize(ids) : tokenizer.decode(ids) };
      }),
  };
}

type OptionsCall = Pick<
  ServerUnaryCall<{ readonly options: RequestOptions__Output | null }, unknown>,
  'request' | 'metadata' | 'getDeadline'
>;

/** @throws InvalidRequestError, ForbiddenError, DeadlineError */
function contextOf(call: OptionsCall): CallContext {
  const [traceParent] = call.metadata.get('traceparent');
  const context = { ...toCallContext(call.request.options, callerOf(call)), traceParent: traceParent?.toString() ?? null };
  const leftMs = untilMs(call.getDeadline());
  if (leftMs === null) return context;
  if (leftMs <= 0) throw new DeadlineError('the deadline of the call has passed');
  return { ...context, timeoutMs: Math.min(leftMs, context.timeoutMs ?? MAX_TIMEOUT_MS) };
}

/** Null: no deadline. */
function untilMs(deadline: Deadline): number | null {
  const atMs = Number(deadline);
  return Number.isFinite(atMs) ? Math.ceil(atMs - Date.now()) : null;
}

/** What is refused here never reaches the service, which counts the rest. */
function checked<T>(api: GrpcApi, check: () => T): T {
  try {
    return check();
  } catch (error) {
    if (error instanceof TandemError) api.onRefused?.(error);
    throw error;
  }
}

/** Aborted when the client goes. */
function endOf(call: Cancellable): AbortSignal {
  const controller = new AbortController();
  call.on('cancelled', () => controller.abort());
  if (call.cancelled) controller.abort();
  return controller.signal;
}

type Cancellable = { readonly cancelled: boolean; on(event: 'cancelled', listener: () => void): unknown };

/** The request ends when its client goes. */
function cancelWith<R>(call: Cancellable, ticket: Ticket<R>) {
  call.on('cancelled', () => ticket.cancel());
  if (call.cancelled) ticket.cancel();
  return ticket;
}

function requestIdMetadata({ requestId }: Ticket<unknown>): Metadata {
  const metadata = new Metadata();
  metadata.set('x-request-id', requestId);
  return metadata;
}

/** @param respond gets the writer, and a function that ties a request to the call: it says that it was accepted, and ends with its client */
async function stream<Request, Response>(
  call: ServerWritableStream<Request, Response>,
  { service, log }: GrpcApi,
  encode: (response: Response) => Buffer,
  respond: (writer: BoundedWriter<Response>, started: <R>(ticket: Ticket<R>) => Ticket<R>) => Promise<void>,
): Promise<void> {
  let cancel = (): void => {};
  const writer = new BoundedWriter(call, encode, service.limits.maxBufferedBytes, () => cancel(), log);
  try {
    await respond(writer, (ticket) => {
      cancel = () => ticket.cancel();
      call.sendMetadata(requestIdMetadata(ticket));
      return cancelWith(call, ticket);
    });
    await writer.end();
  } catch (error) {
    if (error instanceof CancelledError && call.cancelled) return; // nobody listens
    await writer.idle(); // what was final before the error is the client's
    writer.fail(toServiceError(error, log));
  }
}
