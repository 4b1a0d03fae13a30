/** Many clients with a connection each, of which every second one vanishes in mid-stream. Sends a {@link VanishResult} to its parent. */
import { connectSocket, RawStream } from './raw-stream.js';
import { VANISH_OUTPUT_TOKENS, vanishRequest, type VanishResult } from './vanish-request.js';

const [, , address = '', first = '0', count = '0'] = process.argv;
const clients = Array.from({ length: Number(count) }, (_, i) => Number(first) + i);
const finished: VanishResult['finished'][number][] = [];
const failures: { client: number; error: string }[] = [];
let vanished = 0;
const run = async (client: number): Promise<void> => {
  const socket = await connectSocket(address);
  const leaveAfter = client % 2 === 1 ? 1 + (client % (VANISH_OUTPUT_TOKENS - 2)) : Infinity;
  let hasVanished = false;
  await new Promise<void>((resolve) => {
    const stream = new RawStream(
      socket,
      vanishRequest(client),
      ({ tokens }) => {
        if (tokens.length < leaveAfter || hasVanished) return;
        hasVanished = true;
        vanished += 1;
        stream.vanish();
      },
      (error) => {
        if (!hasVanished && !stream.isFinished) failures.push({ client, error: error ?? 'the connection was closed' });
        if (!hasVanished && stream.isFinished) finished.push({ client, tokens: stream.tokens });
        resolve();
      },
    );
  });
};
await Promise.all(clients.map(run));
process.send!({ vanished, finished, failures } satisfies VanishResult, () => process.disconnect());
