import { once } from 'node:events';
import { connect as connectHttp2, type ClientHttp2Session, type IncomingHttpHeaders } from 'node:http2';
import { connect, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseAddress } from '../../common/address.js';
import { Generation } from '../../common/services.js';
import type { GenerateRequest } from '../../proto/generated/tandem/v1/GenerateRequest.js';

const { path, requestSerialize, responseDeserialize } = Generation.service.Generate;
/** Of a gRPC message: a flag, and its length. */
const PREFIX_BYTES = 5;

/** Tries again while the backlog of the listener is full: a Unix socket says so (EAGAIN), where TCP waits by itself. */
export async function connectSocket(address: string): Promise<Socket> {
  const where = parseAddress(address);
  for (;;) {
    const socket = where.kind === 'unix' ? connect(where.path) : connect(where.port, where.host);
    try {
      await once(socket, 'connect');
      return socket;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EAGAIN') throw error;
      await sleep(BACKLOG_MS);
    }
  }
}

const BACKLOG_MS = 20;

/**
 * One Generate call over a connection of its own, so that a client can vanish as a machine does that loses its network: the socket is
 * destroyed, and nothing is said on any level above.
 */
export class RawStream {
  readonly tokens: number[] = [];
  /** True once a Finish message has come. */
  isFinished = false;
  private readonly session: ClientHttp2Session;
  private rest = Buffer.alloc(0);
  private isClosed = false;

  /** @param onTokens after each message with tokens */
  constructor(
    private readonly socket: Socket,
    request: GenerateRequest,
    onTokens: (stream: RawStream) => void,
    private readonly onClose: (error: string | null) => void,
  ) {
    socket.on('error', (error) => this.end(error.message));
    this.session = connectHttp2('http://localhost', { createConnection: () => socket });
    this.session.on('error', (error: Error) => this.end(error.message));
    this.session.on('close', () => this.end(null));
    const call = this.session.request({ ':method': 'POST', ':path': path, 'content-type': 'application/grpc', te: 'trailers' });
    call.on('error', (error: Error) => this.end(error.message));
    call.on('response', (headers) => this.checkStatus(headers)); // a refusal has no trailers
    call.on('trailers', (trailers: IncomingHttpHeaders) => this.checkStatus(trailers));
    call.on('data', (bytes: Buffer) => {
      if (this.read(bytes)) onTokens(this);
    });
    call.on('close', () => this.session.close());
    call.end(frame(requestSerialize(request)));
  }

  vanish(): void {
    this.socket.destroy();
  }

  private checkStatus({ 'grpc-status': status = '0', 'grpc-message': message = '' }: IncomingHttpHeaders): void {
    if (String(status) !== '0') this.end(`gRPC status ${String(status)}: ${decodeURIComponent(String(message))}`);
  }

  private end(error: string | null): void {
    if (this.isClosed) return;
    this.isClosed = true;
    this.onClose(error);
  }

  /** @returns whether tokens came */
  private read(bytes: Buffer): boolean {
    const before = this.tokens.length;
    this.rest = Buffer.concat([this.rest, bytes]);
    while (this.rest.length >= PREFIX_BYTES) {
      const length = this.rest.readUInt32BE(1);
      if (this.rest.length < PREFIX_BYTES + length) break;
      const { delta, finish } = responseDeserialize(this.rest.subarray(PREFIX_BYTES, PREFIX_BYTES + length));
      if (delta) this.tokens.push(...delta.tokens);
      if (finish) this.isFinished = true;
      this.rest = this.rest.subarray(PREFIX_BYTES + length);
    }
    return this.tokens.length > before;
  }
}

function frame(message: Buffer): Buffer {
  const prefix = Buffer.alloc(PREFIX_BYTES);
  prefix.writeUInt32BE(message.length, 1);
  return Buffer.concat([prefix, message]);
}
