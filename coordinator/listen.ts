import { existsSync, lstatSync, unlinkSync } from 'node:fs';
import type { Http2Server } from 'node:http2';
import { connect, createServer } from 'node:net';
import { dirname } from 'node:path';
import { ServerCredentials, type Server } from '@grpc/grpc-js';
import { isLoopback, parseAddress } from '../common/address.js';
import { ConfigError } from '../common/errors.js';
import type { Logger } from '../common/log.js';

export interface ListenOptions {
  readonly credentials?: ServerCredentials;
  /** Further ones are closed at once. */
  readonly maxConnections?: number;
  /** Of the headers of one call. The server refuses a call with more in words; a stream with more than twice as many is reset unread, and node's HTTP/2 takes no more than 64 KiB. */
  readonly maxHeaderBytes?: number;
}

/**
 * Binds a gRPC server to `unix:/path` or `host:port` (port 0: any free one).
 *
 * A socket file that a killed server left behind is removed; one that somebody answers on is not.
 *
 * @returns the address as clients write it
 * @throws ConfigError if the address is in use or can not be bound
 */
export async function listen(server: Server, text: string, options: ListenOptions = {}): Promise<string> {
  const address = parseAddress(text);
  if (address.kind === 'unix') await removeStaleSocket(address.path);
  const target = address.kind === 'unix' ? `unix:${address.path}` : text;
  const port = await new Promise<number>((resolve, reject) => {
    server.bindAsync(target, options.credentials ?? ServerCredentials.createInsecure(), (error, bound) => {
      if (error) reject(new ConfigError(`cannot listen on ${text}: ${plainReason(error)}`));
      else resolve(bound);
    });
  });
  limit(server, options);
  return address.kind === 'unix' ? target : `${address.host}:${port}`;
}

/** grpc-js has no options for these; the listeners below it are node's own, and have. */
function limit(server: Server, { maxConnections, maxHeaderBytes }: ListenOptions): void {
  const { http2Servers } = server as unknown as { readonly http2Servers: ReadonlyMap<Http2Server, unknown> };
  for (const listener of http2Servers.keys()) {
    if (maxConnections !== undefined) listener.maxConnections = maxConnections;
    if (maxHeaderBytes !== undefined) listener.updateSettings({ maxHeaderListSize: 2 * maxHeaderBytes });
  }
}

/** What a listener is guarded with. */
export interface Guard {
  readonly hasKeys: boolean;
  readonly hasTls: boolean;
  /** Mutual TLS. */
  readonly hasClientCa: boolean;
}

/**
 * Beyond this machine there is nothing to be served without knowing who asks; encryption alone does not say who.
 * @param flag that gave the address, for the message @throws ConfigError
 */
export function checkGuard(flag: string, text: string, { hasKeys, hasTls, hasClientCa }: Guard, log: Logger): void {
  if (isLoopback(parseAddress(text))) return;
  if (!hasKeys && !hasClientCa) {
    throw new ConfigError(
      `${flag} ${text} is not this machine alone${hasTls ? ', and TLS does not say who calls' : ''}: ` +
        'give --api-keys FILE (made by "tandem key new"), or --tls-cert, --tls-key and --client-ca, or a loopback address or unix:/path',
    );
  }
  if (!hasTls) log.warn({ address: text }, `${flag} is not this machine alone and has no TLS: API keys and prompts travel in the clear`);
}

/**
 * Whether {@link listen} could bind the address now: asked before the minutes that a model takes to load.
 * @throws ConfigError as `listen` does
 */
export async function checkListen(text: string): Promise<void> {
  const address = parseAddress(text);
  if (address.kind === 'unix') await removeStaleSocket(address.path);
  const probe = createServer();
  await new Promise<void>((resolve, reject) => {
    probe.once('error', (error) => reject(new ConfigError(`cannot listen on ${text}: ${plainReason(error)}`)));
    const where = address.kind === 'unix' ? { path: address.path } : { host: address.host.replace(/^\[(.*)\]$/, '$1'), port: address.port };
    probe.listen(where, resolve);
  });
  await new Promise((resolve) => probe.close(resolve));
}

async function removeStaleSocket(path: string): Promise<void> {
  if (!existsSync(dirname(path))) throw new ConfigError(`cannot listen on unix:${path}: there is no folder ${dirname(path)}`);
  const stat = lstatSync(path, { throwIfNoEntry: false });
  if (!stat) return;
  if (!stat.isSocket()) throw new ConfigError(`cannot listen on unix:${path}: a file that is no socket is there, choose another path`);
  if (await isAnswered(path))
    throw new ConfigError(`cannot listen on unix:${path}: another server uses it, choose another path or stop it`);
  unlinkSync(path);
}

/** Whether somebody listens on a Unix socket. */
export function isAnswered(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = connect(path);
    probe.once('connect', () => {
      probe.destroy();
      resolve(true);
    });
    probe.once('error', () => resolve(false));
  });
}

function plainReason(error: Error): string {
  if (/EADDRINUSE/.test(error.message)) return 'the address is in use, choose another or stop the server that has it';
  if (/EACCES/.test(error.message)) return 'permission denied';
  return error.message.split('\n')[0]!;
}
