/** The flags of every command that connects to a server, and what they say. */
import { readFileSync } from 'node:fs';
import type { Options } from 'yargs';
import { ConfigError } from '../common/errors.js';
import type { Credentials } from './client.js';

export interface ConnectionArgs {
  apiKey: string | undefined;
  ca: string | undefined;
  clientCert: string | undefined;
  clientKey: string | undefined;
}

const API_KEY_VARIABLE = 'TANDEM_API_KEY';

/** @param group the heading in the help, where there is one */
export function connectionOptions(group?: string) {
  const option = (describe: string) =>
    ({ ...(group === undefined ? {} : { group }), type: 'string', requiresArg: true, describe }) as const satisfies Options;
  return {
    'api-key': option(`API key; better in ${API_KEY_VARIABLE}, as everybody on the machine can see the flags of a command`),
    ca: option('Use TLS, and trust the authorities in this PEM file'),
    'client-cert': option('Certificate to show, PEM: for servers with --client-ca'),
    'client-key': option('Its private key, PEM'),
  };
}

/** @throws ConfigError */
export function toCredentials({ apiKey, ca, clientCert, clientKey }: ConnectionArgs, env: NodeJS.ProcessEnv = process.env): Credentials {
  if ((clientCert === undefined) !== (clientKey === undefined)) {
    throw new ConfigError('--client-cert and --client-key go together: give both');
  }
  const key = (apiKey ?? env[API_KEY_VARIABLE] ?? '').trim();
  if (!/^[\x21-\x7e]*$/.test(key)) {
    throw new ConfigError(`the API key in ${apiKey === undefined ? API_KEY_VARIABLE : '--api-key'} has characters that no key has`);
  }
  const isTls = ca !== undefined || clientCert !== undefined;
  return {
    apiKey: key === '' ? null : key,
    tls: isTls
      ? {
          ca: ca === undefined ? null : readPem('--ca', ca),
          identity:
            clientCert === undefined ? null : { cert: readPem('--client-cert', clientCert), key: readPem('--client-key', clientKey!) },
        }
      : null,
  };
}

function readPem(flag: string, path: string): Buffer {
  try {
    return readFileSync(path);
  } catch (error) {
    throw new ConfigError(`${flag} ${path} cannot be read (${(error as NodeJS.ErrnoException).code})`);
  }
}
