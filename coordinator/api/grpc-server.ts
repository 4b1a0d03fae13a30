import * as grpc from '@grpc/grpc-js';
import { CancelledError, NotFoundError, TandemError, WIRE_STATUS } from '../../common/errors.js';
import type { Logger } from '../../common/log.js';
import { Generation, Ops } from '../../common/services.js';
import type { GenerationHandlers } from '../../proto/generated/tandem/v1/Generation.js';
import type { OpsHandlers } from '../../proto/generated/tandem/v1/Ops.js';
import type { Status } from '../../proto/generated/tandem/v1/Status.js';
import type { Ticket } from '../serving-loop.js';
import { encodeDelta, encodeFinish, encodeScore } from './encode.js';
import type { ServingService } from './service.js';
import { LOCAL_CALLER } from '../access/caller.js';
import { toCallContext, toDetokenizeIds, toGenerationRequest, toLogitsRequest, toScoreRequest, toTokenizeText } from './validate.js';

/** Largest request a client may send. */
const MAX_REQUEST_BYTES = 4 * 1024 * 1024;
/** Bytes of one message of a Logits stream, at most (one row at least). */
const LOGITS_MESSAGE_BYTES = 1024 * 1024;

export interface GrpcApi {
  readonly service: ServingService;
  readonly status: () => Status;
  readonly log: Logger;
}

/** A server with the public services; it listens to nothing yet. */
export function createGrpcServer(api: GrpcApi): grpc.Server {
  const server = new grpc.Server({ 'grpc.max_receive_message_length': MAX_REQUEST_BYTES });
  server.addService(Generation.service, generationHandlers(api));
  server.addService(Ops.service, opsHandlers(api));
  return server;
}

function opsHandlers({ status, log }: GrpcApi): OpsHandlers {
  return {
    GetStatus: (_call, callback) => void answer(callback, log, status),
    WatchStatus: (call) => call.end(),
    Drain: (_call, callback) => void answer(callback, log, () => ({ remaining: 0 })),
  };
}

function generationHandlers({ service, log }: GrpcApi): GenerationHandlers {
  return {
    Generate(call) {
      void stream(call, log, async (track) => {
        const request = toGenerationRequest(call.request, service.limits);
        const ticket = track(
          service.generate(request, toCallContext(call.request.options, LOCAL_CALLER), (delta) => call.write(encodeDelta(delta))),
        );
        call.write(encodeFinish(ticket.requestId, await ticket.done));
      });
    },
    Logits(call) {
      void stream(call, log, async (track) => {
        const request = toLogitsRequest(call.request);
        const { value } = await track(service.logits(request, toCallContext(call.request.options, LOCAL_CALLER))).done;
        const { vocabSize } = service.config;
        const rowsAtOnce = Math.max(1, Math.floor(LOGITS_MESSAGE_BYTES / (vocabSize * 4)));
        for (let row = 0; row < request.rows; row += rowsAtOnce) {
          const rows = Math.min(rowsAtOnce, request.rows - row);
          const part = value.subarray(row * vocabSize, (row + rows) * vocabSize);
          call.write({ rows, vocabSize, logits: Buffer.from(part.buffer, part.byteOffset, part.byteLength) });
        }
      });
    },
    Score(call, callback) {
      void answer(callback, log, async () =>
        encodeScore(
          await cancelWith(
            call,
            service.score(toScoreRequest(call.request, service.limits), toCallContext(call.request.options, LOCAL_CALLER)),
          ).done,
        ),
      );
    },
    Abort(_call, callback) {
      void answer(callback, log, () => {
        throw new NotFoundError('no such request');
      });
    },
    Tokenize(call, callback) {
      void answer(callback, log, () => {
        const tokenizer = service.requireTokenizer();
        const text = toTokenizeText(call.request, service.limits);
        if (call.request.asPrompt) return { ids: tokenizer.encodePrompt(text) };
        return { ids: tokenizer.encode(text, { dummyPrefix: !call.request.noDummyPrefix }) };
      });
    },
    Detokenize(call, callback) {
      void answer(callback, log, () => {
        const tokenizer = service.requireTokenizer();
        const ids = toDetokenizeIds(call.request, service.limits);
        return { text: call.request.showSpecial ? tokenizer.detokenize(ids) : tokenizer.decode(ids) };
      });
    },
  };
}

type Call = { readonly cancelled: boolean; on(event: 'cancelled', listener: () => void): unknown };

/** The request ends when its client goes. */
function cancelWith<R>(call: Call, ticket: Ticket<R>): Ticket<R> {
  call.on('cancelled', () => ticket.cancel());
  if (call.cancelled) ticket.cancel();
  return ticket;
}

async function answer<R>(callback: grpc.sendUnaryData<R>, log: Logger, respond: () => R | Promise<R>): Promise<void> {
  try {
    callback(null, await respond());
  } catch (error) {
    callback(toServiceError(error, log));
  }
}

async function stream<Request, Response>(
  call: grpc.ServerWritableStream<Request, Response>,
  log: Logger,
  respond: (track: <R>(ticket: Ticket<R>) => Ticket<R>) => Promise<void>,
): Promise<void> {
  try {
    await respond((ticket) => cancelWith(call, ticket));
    call.end();
  } catch (error) {
    if (!(error instanceof CancelledError)) call.emit('error', toServiceError(error, log));
  }
}

/** What was not foreseen is logged with its cause, and told to the client without it. */
function toServiceError(error: unknown, log: Logger): Partial<grpc.ServiceError> & Error {
  if (error instanceof TandemError)
    return Object.assign(new Error(error.message), { code: WIRE_STATUS[error.code].grpc, details: error.message });
  log.error({ err: error }, 'a request failed by a defect');
  return Object.assign(new Error('internal error'), { code: grpc.status.INTERNAL, details: 'internal error, see the server log' });
}
