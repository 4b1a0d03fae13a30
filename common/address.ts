/** Addresses as users write them, `unix:/path` or `host:port`, and what gRPC makes of them. */
import { credentials, type ChannelCredentials, type ChannelOptions } from '@grpc/grpc-js';
import { ConfigError } from './errors.js';

export type Address =
  { readonly kind: 'unix'; readonly path: string } | { readonly kind: 'tcp'; readonly host: string; readonly port: number };

/** The longest path that fits into a Unix socket's address, the closing zero included. */
const MAX_SOCKET_PATH = 107;

/** @throws ConfigError */
export function parseAddress(text: string): Address {
  if (text.startsWith('unix:')) {
    const path = text.slice('unix:'.length).replace(/^\/\//, '');
    if (path === '') throw new ConfigError(`address "${text}" has no path: write unix:/path/of/socket`);
    if (Buffer.byteLength(path) > MAX_SOCKET_PATH)
      throw new ConfigError(`socket path of ${Buffer.byteLength(path)} bytes, at most ${MAX_SOCKET_PATH} fit: ${path}`);
    return { kind: 'unix', path };
  }
  const match = /^(?<host>\[[0-9a-fA-F:.]+\]|[^:\s]+):(?<port>\d{1,5})$/.exec(text);
  const port = Number(match?.groups?.['port']);
  if (!match || port > 65535) throw new ConfigError(`address "${text}" is neither unix:/path nor host:port`);
  return { kind: 'tcp', host: match.groups!['host']!, port };
}

/** @throws ConfigError */
export function clientAddress(text: string): string {
  const address = parseAddress(text);
  return address.kind === 'unix' ? `unix:${address.path}` : text;
}

export function isLoopback(address: Address): boolean {
  return (
    address.kind === 'unix' ||
    address.host === 'localhost' ||
    address.host === '[::1]' ||
    /^127\.\d{1,3}\.\d{1,3}\.\d{1,3}$/.test(address.host)
  );
}

/** PEM texts: the authority to trust, and what shows who the client is. */
export interface ClientTls {
  /** Null: the authorities that Node knows. */
  readonly ca: Buffer | null;
  readonly identity: { readonly cert: Buffer; readonly key: Buffer } | null;
}

/** @param tls null: none @throws ConfigError */
export function clientCredentials(tls: ClientTls | null = null): ChannelCredentials {
  if (!tls) return credentials.createInsecure();
  try {
    return credentials.createSsl(tls.ca, tls.identity?.key ?? null, tls.identity?.cert ?? null);
  } catch (error) {
    throw new ConfigError(`TLS cannot use the certificates and key given: ${(error as Error).message}`);
  }
}

/** Prompts go to the server itself, whatever proxy the environment names for other things. */
export const CLIENT_CHANNEL_OPTIONS: ChannelOptions = { 'grpc.enable_http_proxy': 0 };

/** The largest message between coordinator and worker: raw logits of many rows. */
export const MAX_LINK_MESSAGE_BYTES = 512 * 1024 * 1024;

export const LINK_CHANNEL_OPTIONS: ChannelOptions = {
  ...CLIENT_CHANNEL_OPTIONS,
  'grpc.max_receive_message_length': MAX_LINK_MESSAGE_BYTES,
  'grpc.max_send_message_length': MAX_LINK_MESSAGE_BYTES,
};
