import type { FastifyRequest } from 'fastify';
import { ForbiddenError } from '../../../common/errors.js';
import { shortened } from './parse-body.js';

/**
 * Without credentials, who can reach this server may use it; web pages can reach a server on their reader's machine. So it answers under
 * its own names alone (a page of a name that was pointed here has that name as Host), and no page of another origin.
 *
 * @param hosts names besides the local ones, without port
 * @throws ForbiddenError
 */
export function checkOrigin({ headers, socket }: FastifyRequest, hosts: readonly string[]): void {
  if (socket.remoteAddress === undefined) return; // a Unix socket: no page gets there
  const host = headers.host;
  if (host !== undefined && !isOwnName(host.replace(/:\d*$/, '').toLowerCase(), hosts)) {
    throw new ForbiddenError(
      `the host ${JSON.stringify(shortened(host))} is not this server: without API keys it answers as localhost, 127.0.0.1, [::1]${hosts.map((each) => `, ${each}`).join('')}`,
    );
  }
  const { origin } = headers;
  if (origin !== undefined && (!URL.canParse(origin) || new URL(origin).host !== host?.toLowerCase())) {
    throw new ForbiddenError(`pages of ${JSON.stringify(shortened(origin))} may not call this server: it has no API keys`);
  }
}

function isOwnName(name: string, hosts: readonly string[]): boolean {
  return (
    name === 'localhost' || name === '[::1]' || /^127(?:\.\d{1,3}){3}$/.test(name) || hosts.some((each) => each.toLowerCase() === name)
  );
}
