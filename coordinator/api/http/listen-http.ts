import type { FastifyInstance } from 'fastify';
import { parseAddress } from '../../../common/address.js';
import { ConfigError } from '../../../common/errors.js';
import { checkListen } from '../../listen.js';

/**
 * Lets the server listen to `unix:/path` or `host:port` (port 0: any free one).
 *
 * @returns the address as clients write it
 * @throws ConfigError if the address is in use or can not be bound
 */
export async function listenHttp(app: FastifyInstance, text: string): Promise<string> {
  const address = parseAddress(text);
  await checkListen(text); // removes a socket file that nobody answers on
  try {
    await app.listen(
      address.kind === 'unix' ? { path: address.path } : { host: address.host.replace(/^\[(.*)\]$/, '$1'), port: address.port },
    );
  } catch (error) {
    throw new ConfigError(`cannot listen on ${text}: ${(error as Error).message.split('\n')[0]}`);
  }
  const bound = app.server.address();
  if (address.kind === 'unix' || bound === null || typeof bound === 'string') return text;
  return `${address.host}:${bound.port}`;
}
