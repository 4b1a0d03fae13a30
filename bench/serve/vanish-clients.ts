/** Many clients with a connection each, of which every second one vanishes in mid-stream. Sends a {@link VanishResult} to its parent. */
import { RawStream } from './raw-stream.js';
import { VANISH_OUTPUT_TOKENS, vanishRequest, type VanishResult } from './vanish-request.js';

/** Connections begun in one turn: the backlog of a listening socket is finite. */
const AT_ONCE = 50;

const [, , address = '', first = '0', count = '0'] = process.argv;
const clients = Array.from({ length: Number(count) }, (_, i) => Number(first) + i);
const results: (() => VanishResult['finished'][number] | null)[] = [];
const failures: { client: number; error: string }[] = [];
let vanished = 0;
const run = (client: number): Promise<void> =>
  new Promise((resolve) => {
    const leaveAfter = client % 2 === 1 ? 1 + (client % (VANISH_OUTPUT_TOKENS - 2)) : Infinity;
    let hasVanished = false;
    const stream = new RawStream(
      address,
      vanishRequest(client),
      ({ tokens }) => {
        if (tokens.length < leaveAfter || hasVanished) return;
        hasVanished = true;
        vanished += 1;
        stream.vanish();
      },
      (error) => {
        if (!hasVanished && !stream.isFinished) failures.push({ client, error: error ?? 'the connection was closed' });
        resolve();
      },
    );
    results.push(() => (stream.isFinished && !hasVanished ? { client, tokens: stream.tokens } : null));
  });
const running: Promise<void>[] = [];
for (let at = 0; at < clients.length; at += AT_ONCE) {
  for (const client of clients.slice(at, at + AT_ONCE)) running.push(run(client));
  await new Promise((resolve) => setTimeout(resolve, 20));
}
await Promise.all(running);
const finished = results.map((result) => result()).filter((result) => result !== null);
process.send!({ vanished, finished, failures } satisfies VanishResult, () => process.disconnect());
