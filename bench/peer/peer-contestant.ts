import { fork } from 'node:child_process';
import { join } from 'node:path';
import { ConfigError } from '../../common/errors.js';
import { packageRoot } from '../../common/package-root.js';
import type { Contestant, Entrant } from '../contestant.js';
import type { PeerMessage, PeerOptions, PeerRequest } from './peer-messages.js';

export const PEER_NAME = 'peer';

/** llama.cpp with a model of the same matrix shapes (llama-model.ts). @param fileBytes of its model */
export function peerEntrant(options: PeerOptions, fileBytes: number, bytesPerToken: number): Entrant {
  // The file in the page cache, its repacked copy, the cache of all sequences
  return { name: PEER_NAME, memoryBytes: fileBytes * 2 + 2e9, start: () => start(options, bytesPerToken) };
}

async function start(options: PeerOptions, bytesPerToken: number): Promise<Contestant> {
  const child = fork(join(packageRoot, 'dist', 'bench', 'peer', 'peer-process.js'), [JSON.stringify(options)], {
    execArgv: [],
    stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
  });
  const receive = (): Promise<PeerMessage> =>
    new Promise((resolve, reject) => {
      const settle = (): void => void child.off('message', onMessage).off('exit', onExit).off('error', reject);
      const onMessage = (message: unknown): void => {
        settle();
        const received = message as PeerMessage;
        if (received.kind === 'error') reject(new ConfigError(`the peer failed: ${received.message}`));
        else resolve(received);
      };
      const onExit = (code: number | null, signal: string | null): void => {
        settle();
        reject(new ConfigError(`the peer ended with ${signal ?? `status ${code}`}`));
      };
      child.once('message', onMessage).once('exit', onExit).once('error', reject);
    });
  const close = async (): Promise<void> => {
    if (child.exitCode !== null || child.signalCode !== null) return;
    const exited = new Promise((resolve) => child.once('exit', resolve));
    if (child.connected) child.disconnect();
    await exited;
  };
  try {
    const ready = await receive();
    if (ready.kind !== 'ready') throw new Error(`the peer begins with ${ready.kind}`);
    return {
      bytesPerToken,
      description: ready.description,
      run: async (phase, seed) => {
        const result = receive();
        child.send({ phase, seed } satisfies PeerRequest);
        const received = await result;
        if (received.kind !== 'result') throw new Error(`the peer answers with ${received.kind}`);
        return { tokensPerSecond: received.tokensPerSecond, stepMs: null };
      },
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}
