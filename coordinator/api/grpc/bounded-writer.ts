import type { serialize, ServerWritableStream } from '@grpc/grpc-js';
import { SlowReaderError } from '../../../common/errors.js';
import type { Logger } from '../../../common/log.js';
import { toServiceError } from './service-error.js';

/**
 * Writes a stream of responses to a client that may be slow, or never read at all. What it has not taken waits here, encoded and counted.
 * When more than the limit waits, `onSlow` is told (once), what waits is dropped, and the call fails: the client gets the error when it
 * reads on, and is thrown out by the server when it does not.
 *
 * grpc-js hands messages to the HTTP/2 stream one at a time, each when flow control has let the one before it go.
 */
export class BoundedWriter<Response> {
  private readonly waiting: Buffer[] = [];
  private waitingBytes = 0;
  private writing = false;
  private isOver = false;
  private whenIdle: (() => void)[] = [];

  constructor(
    private readonly call: ServerWritableStream<unknown, Response>,
    private readonly encode: serialize<Response>,
    private readonly maxBufferedBytes: number,
    private readonly onSlow: () => void,
    private readonly log: Logger,
  ) {
    call.on('cancelled', () => this.drop()); // the last that every call hears, however it ended
  }

  write(response: Response): void {
    if (!this.isOver) this.writeBytes(this.encode(response));
  }

  /** @param bytes an encoded response */
  writeBytes(bytes: Buffer): void {
    if (this.isOver) return;
    if (this.waitingBytes > this.maxBufferedBytes) {
      this.refuse(
        `the client has left ${this.waitingBytes} bytes of the stream unread, ${this.maxBufferedBytes} are kept for it: ` +
          'read faster, or ask for less at once',
      );
      return;
    }
    this.waiting.push(bytes);
    this.waitingBytes += bytes.length;
    this.pump();
  }

  /** When nothing waits any more: written, or dropped. */
  async idle(): Promise<void> {
    if (!this.writing) return;
    await new Promise<void>((resolve) => this.whenIdle.push(resolve));
  }

  /** Ends the call when all is written. */
  async end(): Promise<void> {
    await this.idle();
    if (!this.isOver) this.call.end();
  }

  /** Ends the call with an error, which a client that does not read may never see. */
  fail(error: Error): void {
    if (this.isOver) return;
    this.drop();
    this.call.emit('error', error);
  }

  private pump(): void {
    const bytes = this.writing || this.isOver ? undefined : this.waiting.shift();
    if (bytes === undefined) return;
    this.writing = true;
    this.call.write(bytes as Response, () => {
      this.writing = false;
      this.waitingBytes -= bytes.length;
      if (this.isOver) return;
      this.pump();
      if (!this.writing) this.becomeIdle();
    });
  }

  private refuse(reason: string): void {
    const error = new SlowReaderError(reason);
    this.onSlow();
    this.fail(toServiceError(error, this.log));
  }

  private drop(): void {
    this.isOver = true;
    this.waiting.length = 0;
    this.becomeIdle();
  }

  private becomeIdle(): void {
    for (const resolve of this.whenIdle.splice(0)) resolve();
  }
}
