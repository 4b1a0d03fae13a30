import { constants, type ServerHttp2Stream } from 'node:http2';
import * as grpc from '@grpc/grpc-js';
import { InvalidRequestError, TandemError, TooLargeError } from '../../../common/errors.js';
import type { Logger } from '../../../common/log.js';
import type { Caller, Gate } from '../../access/caller.js';
import type { Limits } from '../../limits.js';
import { ENDLESS_METHODS, METHOD_ACCESS } from './method-access.js';
import { toStatus } from './service-error.js';
import { strictly } from './strict-message.js';

export interface GatedServerOptions {
  readonly gate: Gate;
  readonly limits: Limits;
  readonly log: Logger;
  /** Told of what the server refuses before a handler sees it. */
  readonly onRefused?: ((error: TandemError) => void) | undefined;
  /** How long a client may take nothing of a message that waits for it. */
  readonly stallMs?: number | undefined;
}

const DEFAULT_STALL_MS = 60_000;

type Handler<Request, Response> = Parameters<typeof grpc.Server.prototype.register<Request, Response>>[1];
type EndlessCall = grpc.ServerWritableStream<never, never>;
type EndlessHandler = (call: EndlessCall) => void;

/** A client that is gone without a word is found out after the two together, and its requests end. */
const KEEPALIVE_MS = 30_000;
const KEEPALIVE_TIMEOUT_MS = 20_000;
/** Clients connect again by themselves when they have something to ask. */
const MAX_IDLE_MS = 10 * 60_000;
/** On top of one connection's share of requests: status, health and reflection streams. */
const OTHER_STREAMS = 100;

/**
 * A gRPC server whose every method is behind the gate: whatever is registered, by whomever, goes through {@link register}, which knows only
 * the methods of {@link METHOD_ACCESS}; and every call goes through {@link intercept} before a byte of its message is read.
 */
export class GatedServer extends grpc.Server {
  private readonly endless = new Set<EndlessCall>();
  private readonly paths: string[] = [];

  constructor(private readonly gated: GatedServerOptions) {
    const { limits } = gated;
    super({
      'grpc.max_receive_message_length': limits.maxMessageBytes,
      'grpc.max_concurrent_streams': limits.maxStreamsPerKey + OTHER_STREAMS,
      'grpc.keepalive_time_ms': KEEPALIVE_MS,
      'grpc.keepalive_timeout_ms': KEEPALIVE_TIMEOUT_MS,
      'grpc.max_connection_idle_ms': MAX_IDLE_MS,
      interceptors: [(method, call) => this.intercept(method.path, call)],
    });
  }

  /** `/package.Service/Method` of everything that is served. */
  get methods(): readonly string[] {
    return this.paths;
  }

  get serviceNames(): readonly string[] {
    return [...new Set(this.paths.map((path) => path.split('/')[1]!))];
  }

  /** @throws Error if nobody has said who may call the method */
  override register<Request, Response>(
    path: string,
    handler: Handler<Request, Response>,
    serialize: grpc.serialize<Response>,
    deserialize: grpc.deserialize<Request>,
    type: string,
  ): boolean {
    if (!Object.hasOwn(METHOD_ACCESS, path)) throw new Error(`${path} is not in the table of who may call what (method-access.ts)`);
    const served = ENDLESS_METHODS.has(path) ? (this.endingWithServer(handler as EndlessHandler) as typeof handler) : handler;
    const isNew = super.register(path, served, encodedOr(serialize), strictly(deserialize), type);
    if (isNew) this.paths.push(path);
    return isNew;
  }

  override tryShutdown(callback: (error?: Error) => void): void {
    for (const call of this.endless) call.end();
    super.tryShutdown(callback);
  }

  private endingWithServer(handler: EndlessHandler): EndlessHandler {
    return (call) => {
      this.endless.add(call);
      call.on('cancelled', () => this.endless.delete(call)); // the last that every call hears, however it ended
      handler(call);
    };
  }

  private intercept(path: string, call: grpc.ServerInterceptingCallInterface): grpc.ServerInterceptingCall {
    const { gate, limits, log, onRefused, stallMs = DEFAULT_STALL_MS } = this.gated;
    const refuse = (error: unknown): void => {
      if (error instanceof TandemError) onRefused?.(error);
      call.sendStatus(toStatus(error, log));
    };
    const watched: WatchedCall = new WatchedCall(
      call,
      {
        start: (next) =>
          next({
            onReceiveMetadata: (metadata, pass) => {
              try {
                checkHeaders(metadata, limits);
                callers.set(metadata, gate.authorize(METHOD_ACCESS[path]!, authorization(metadata)));
              } catch (error) {
                refuse(error);
                return;
              }
              pass(metadata);
            },
            onReceiveMessage: (message: unknown, pass) => {
              if (message instanceof InvalidRequestError) refuse(message);
              else pass(message);
            },
            onCancel: () => watched.stop(), // the last that every call hears, however it ended
          }),
      },
      stallMs,
      () => {
        log.info({ method: path, stallMs }, 'closed a stream whose client did not read it');
        resetStream(call);
      },
    );
    return watched;
  }
}

/** A call that notices when its client takes nothing, not even its status: what is not taken would be kept as long as the connection is open. */
class WatchedCall extends grpc.ServerInterceptingCall {
  private isSending = false;
  private timer: NodeJS.Timeout | null = null;

  constructor(
    call: grpc.ServerInterceptingCallInterface,
    responder: grpc.Responder,
    private readonly stallMs: number,
    private readonly onStalled: () => void,
  ) {
    super(call, responder);
  }

  override sendMessage(message: unknown, callback: () => void): void {
    this.isSending = true;
    if (this.timer) this.timer.refresh();
    else this.timer = setTimeout(() => this.expire(), this.stallMs).unref(); // one for the life of the call
    super.sendMessage(message, () => {
      this.isSending = false;
      callback();
    });
  }

  stop(): void {
    if (this.timer) clearTimeout(this.timer);
    this.timer = null;
  }

  private expire(): void {
    this.timer = null;
    if (this.isSending) this.onStalled();
  }
}

/** By the metadata, which is one and the same object from the interceptor to the handler. */
const callers = new WeakMap<grpc.Metadata, Caller>();

/** Who calls, as the gate found out. */
export function callerOf({ metadata }: { readonly metadata: grpc.Metadata }): Caller {
  const caller = callers.get(metadata);
  if (!caller) throw new Error('a call came past the gate');
  return caller;
}

/** grpc-js has no call for it. */
function resetStream(call: grpc.ServerInterceptingCallInterface): void {
  (call as unknown as { readonly stream: ServerHttp2Stream }).stream.close(constants.NGHTTP2_CANCEL);
}

function authorization(metadata: grpc.Metadata): string | undefined {
  const values = metadata.get('authorization');
  return values.length === 0 ? undefined : String(values[0]);
}

/** Bytes as HTTP/2 counts them: 32 on top of each name and value. @throws TooLargeError */
function checkHeaders(metadata: grpc.Metadata, { maxHeaderBytes }: Limits): void {
  let bytes = 0;
  for (const [name, values] of Object.entries(metadata.toHttp2Headers())) {
    for (const value of Array.isArray(values) ? values : [values]) bytes += name.length + String(value).length + 32;
  }
  if (bytes > maxHeaderBytes) throw new TooLargeError(`the headers have ${bytes} bytes, this server takes ${maxHeaderBytes}`);
}

/** Handlers may give bytes that are encoded already, so that what waits for a slow reader is counted as what it is. */
function encodedOr<T>(serialize: grpc.serialize<T>): grpc.serialize<T> {
  return (value) => (Buffer.isBuffer(value) ? value : serialize(value));
}
