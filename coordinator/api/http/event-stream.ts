import type { FastifyReply } from 'fastify';
import { SlowReaderError } from '../../../common/errors.js';
import type { Logger } from '../../../common/log.js';

/**
 * Server-sent events as an answer. The head is sent with the first event: what fails before can still be an answer with a status.
 * A reader that leaves more than `maxBufferedBytes` unread loses its connection; whoever waits for `close` of the response ends the request.
 */
export class EventStream {
  constructor(
    private readonly reply: FastifyReply,
    private readonly maxBufferedBytes: number,
    private readonly log: Logger,
  ) {}

  get isStarted(): boolean {
    return this.reply.raw.headersSent;
  }

  /** Bytes that the reader has not taken yet are waiting. */
  get isBehind(): boolean {
    return this.reply.raw.writableNeedDrain;
  }

  send(data: unknown): void {
    this.write(JSON.stringify(data));
  }

  /** @param last one more event, as it is */
  end(last?: string): void {
    if (last !== undefined) this.write(last);
    this.reply.raw.end();
  }

  private write(data: string): void {
    const { raw } = this.reply;
    if (raw.destroyed) return;
    if (!raw.headersSent) this.start();
    raw.write(`data: ${data}\n\n`);
    if (raw.writableLength <= this.maxBufferedBytes) return;
    const error = new SlowReaderError(`more than ${this.maxBufferedBytes} bytes are unread`);
    this.log.info({ requestId: this.reply.request.id, reason: error.message }, 'a stream was ended: its client does not read');
    raw.destroy();
  }

  private start(): void {
    this.reply.hijack();
    this.reply.raw.writeHead(200, {
      ...(this.reply.getHeaders() as Record<string, string>),
      'content-type': 'text/event-stream; charset=utf-8',
      'x-accel-buffering': 'no', // nginx would collect events
    });
  }
}
