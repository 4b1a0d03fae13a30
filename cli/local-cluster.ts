import { fork } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ConfigError } from '../common/errors.js';
import { packageRoot } from '../common/package-root.js';
import { connect, type TandemClient } from './client.js';
import type { ReadyMessage } from './commands/serve.js';
import type { EngineFlags } from './engine-options.js';

export interface LocalClusterOptions {
  /** Null: the tiny model. */
  readonly model: string | null;
  readonly worldSize?: number;
  readonly threads?: number;
  readonly kvBlocks?: number;
  readonly engine?: Partial<EngineFlags>;
  readonly logLevel?: string;
  readonly stepTimeoutMs?: number;
  /** Serve HTTP, too. */
  readonly http?: boolean;
  /** Further flags of `tandem serve`. */
  readonly flags?: readonly string[];
  /** Aborting ends the server, whether it is ready or not. */
  readonly signal?: AbortSignal;
}

export interface LocalCluster {
  readonly client: TandemClient;
  readonly address: string;
  /** Null without HTTP. */
  readonly httpAddress: string | null;
  /** The coordinator's process. */
  readonly pid: number;
  /** When the server has ended, by whatever. */
  readonly exited: Promise<void>;
  close(): Promise<void>;
}

/** A server of one's own, on a private socket: the same `tandem serve`, ended with its parent. @throws ConfigError with its last line */
export async function startLocalCluster(options: LocalClusterOptions): Promise<LocalCluster> {
  const dir = mkdtempSync(join(tmpdir(), 'tandem-cli-'));
  const { model, worldSize = 1, threads = 1, engine = {}, logLevel = 'error' } = options;
  const args = [
    ...['serve', '--listen', `unix:${join(dir, 'api.sock')}`, '--world-size', String(worldSize), '--threads', String(threads)],
    ...['--log-level', logLevel],
    ...Object.entries(engine).flatMap(([name, value]) => [`--${name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`, value]),
    ...(model === null ? [] : ['--model', model]),
    ...(options.kvBlocks === undefined ? [] : ['--kv-blocks', String(options.kvBlocks)]),
    ...['--http-listen', options.http ? '127.0.0.1:0' : 'off'],
    ...(options.flags ?? []),
    ...(options.stepTimeoutMs === undefined ? [] : ['--step-timeout-ms', String(options.stepTimeoutMs)]),
  ];
  const child = fork(join(packageRoot, 'dist', 'cli', 'main.js'), args, {
    stdio: ['ignore', 'ignore', 'pipe', 'ipc'],
    execArgv: [],
    detached: true, // a terminal's Ctrl-C is for this process, which ends the server when it has no more use for it
  });
  const disconnect = (): void => {
    if (child.connected) child.disconnect();
  };
  const removeDir = (): void => rmSync(dir, { recursive: true, force: true });
  process.once('exit', removeDir);
  options.signal?.addEventListener('abort', disconnect);
  let isReady = false;
  let log = ''; // of the start; where that fails the last line says why
  child.stderr!.setEncoding('utf8').on('data', (text: string) => {
    if (!isReady) log += text;
    else if (logLevel !== 'silent') process.stderr.write(text);
  });
  const exited = new Promise<void>((resolve) => child.once('exit', () => resolve()));
  const close = async (): Promise<void> => {
    options.signal?.removeEventListener('abort', disconnect);
    disconnect();
    await exited;
    removeDir();
    process.off('exit', removeDir);
  };
  try {
    const { address, httpAddress } = await new Promise<ReadyMessage>((resolve, reject) => {
      child.once('message', (message) => resolve(message as ReadyMessage));
      child.once('error', reject);
      child.once('close', () => {
        const lastLine = log
          .trim()
          .split('\n')
          .at(-1)!
          .replace(/^tandem: /, '');
        reject(new ConfigError(lastLine || 'the server ended before it was ready'));
      });
    });
    isReady = true;
    if (logLevel !== 'silent') process.stderr.write(log);
    const client = await connect(address);
    return {
      client,
      address,
      httpAddress,
      pid: child.pid!,
      exited,
      close: async () => {
        client.close();
        await close();
      },
    };
  } catch (error) {
    await close();
    throw error;
  }
}
