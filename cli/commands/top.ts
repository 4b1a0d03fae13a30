import { setTimeout as delay } from 'node:timers/promises';
import { status as grpcStatus } from '@grpc/grpc-js';
import type { CommandModule } from 'yargs';
import type { Status__Output } from '../../proto/generated/tandem/v1/Status.js';
import { connect, type TandemClient } from '../client.js';
import { type ConnectionArgs, connectionOptions, toCredentials } from '../connection-options.js';
import { isServiceError } from '../describe-error.js';
import { interruptible } from '../interrupt.js';
import { wholeNumber } from '../number-option.js';
import { paint } from '../terminal/line.js';
import { openScreen } from '../terminal/screen.js';
import { topView, type TopView } from '../top-view.js';
import { DEFAULT_ADDRESS } from '../default-address.js';

interface TopArgs extends ConnectionArgs {
  address: string;
  intervalMs: number;
  once: boolean;
  json: boolean;
}

const MIN_INTERVAL_MS = 100;
const MAX_INTERVAL_MS = 60_000;
const RETRY_MS = 1_000;
/** Of output that no terminal shows. */
const PLAIN_COLUMNS = 160;

export const topCommand: CommandModule<unknown, TopArgs> = {
  command: 'top',
  describe: 'Watch what a running server does',
  builder: (yargs) =>
    yargs
      .option('address', { type: 'string', default: DEFAULT_ADDRESS, describe: 'The server: host:port or unix:/path' })
      .option(
        'interval-ms',
        wholeNumber('interval-ms', {
          min: MIN_INTERVAL_MS,
          max: MAX_INTERVAL_MS,
          default: 1000,
          describe: 'Time from one status to the next',
        }),
      )
      .option('once', { type: 'boolean', default: false, describe: 'Print one as text and end, as where the output is no terminal' })
      .option('json', { type: 'boolean', default: false, describe: 'Print each as a line of JSON' })
      .options(connectionOptions()) as never,
  async handler({ address, intervalMs, once, json, ...connection }) {
    const client = await connect(address, toCredentials(connection));
    try {
      await interruptible(async (signal) => {
        const print = (status: Status__Output): void =>
          void process.stdout.write(`${json ? JSON.stringify(status) : plainText(status, address)}\n`);
        if (once || (!json && !process.stdout.isTTY)) print(await client.status());
        else if (json) await follow(client, intervalMs, print, signal);
        else await show(client, address, intervalMs, signal);
      });
    } finally {
      client.close();
    }
  },
};

function plainText(status: Status__Output, address: string): string {
  const columns = process.stdout.columns ?? PLAIN_COLUMNS;
  const { lines } = topView({ status, address, columns, rows: null, scroll: 0, silentMs: null });
  return lines.map((line) => paint(line, columns, false)).join('\n');
}

/** In the whole terminal, until a key or the signal ends it. */
async function show(client: TandemClient, address: string, intervalMs: number, signal: AbortSignal): Promise<void> {
  const quit = new AbortController();
  const ended = AbortSignal.any([signal, quit.signal]);
  const colour = !process.env['NO_COLOR']; // of which an empty one does not count: no-color.org
  let status = await client.status();
  let receivedMs = performance.now();
  let view: TopView = { lines: [], scroll: 0, pageRows: 1 };
  const redraw = (scroll = view.scroll): void => {
    const { columns, rows } = screen;
    const ageMs = performance.now() - receivedMs;
    view = topView({ status, address, columns, rows, scroll, silentMs: ageMs > 2 * intervalMs + 1000 ? ageMs : null });
    screen.draw(view.lines.map((line) => paint(line, columns, colour)));
  };
  const scrolls: Readonly<Record<string, () => number>> = {
    up: () => view.scroll - 1,
    down: () => view.scroll + 1,
    pageup: () => view.scroll - view.pageRows,
    pagedown: () => view.scroll + view.pageRows,
    home: () => 0,
    end: () => status.active.length,
  };
  const screen = openScreen(process.stdin, process.stdout, {
    onKey: ({ name = '', ctrl }) => {
      if (name === 'q' || (ctrl && name === 'c')) quit.abort();
      else if (scrolls[name]) redraw(Math.max(0, scrolls[name]()));
    },
    onResize: () => redraw(),
  });
  const timer = setInterval(redraw, 1000); // a server that says nothing is a thing to show
  try {
    redraw();
    await follow(
      client,
      intervalMs,
      (next) => {
        status = next;
        receivedMs = performance.now();
        redraw();
      },
      ended,
    );
  } finally {
    clearInterval(timer);
    screen.close();
  }
}

/** Statuses as they come, also from a server that went away and is back. */
async function follow(
  client: TandemClient,
  intervalMs: number,
  onStatus: (status: Status__Output) => void,
  signal: AbortSignal,
): Promise<void> {
  while (!signal.aborted) {
    await client.watchStatus(intervalMs, onStatus, signal).catch((error: unknown) => {
      if (!isServiceError(error) || !COMES_BACK.has(error.code)) throw error;
    });
    await delay(RETRY_MS, undefined, { signal }).catch(() => {});
  }
}

/** What a server that stops, starts or is out of reach answers; anything else stays as it is. */
const COMES_BACK: ReadonlySet<number> = new Set([grpcStatus.UNAVAILABLE, grpcStatus.CANCELLED, grpcStatus.INTERNAL, grpcStatus.UNKNOWN]);
