import { createHash } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { FastifyInstance } from 'fastify';
import { NotFoundError } from '../../../common/errors.js';
import { packageRoot } from '../../../common/package-root.js';
import type { HttpApi } from './http-api.js';

/** The page is one file. It is read once, and nothing runs in it but what is written in it. */
export function addDashboardRoute(app: FastifyInstance, { dashboardDir = join(packageRoot, 'dashboard') }: HttpApi): void {
  const path = join(dashboardDir, 'index.html');
  const page = existsSync(path) ? readFileSync(path, 'utf8') : null;
  const policy = page === null ? '' : contentSecurityPolicy(page);
  app.get('/', (_request, reply) => {
    if (page === null) throw new NotFoundError('this server was installed without its dashboard');
    return reply.type('text/html; charset=utf-8').header('content-security-policy', policy).send(page);
  });
}

/** Inline scripts and styles of the page by their hashes; requests to the page's own server; no other resource, frame or form. */
export function contentSecurityPolicy(page: string): string {
  const hashes = (element: string): string =>
    Array.from(
      page.matchAll(new RegExp(`<${element}(?:\\s[^>]*)?>([\\s\\S]*?)</${element}\\s*>`, 'gi')),
      ([, text]) =>
        // Browsers normalise line ends before they hash.
        `'sha256-${createHash('sha256').update(text!.replace(/\r\n?/g, '\n')).digest('base64')}'`,
    ).join(' ') || "'none'";
  return [
    "default-src 'none'",
    `script-src ${hashes('script')}`,
    `style-src ${hashes('style')}`,
    "connect-src 'self'",
    'img-src data:',
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
  ].join('; ');
}
