import { ForbiddenError, UnauthenticatedError } from '../../common/errors.js';
import type { Logger } from '../../common/log.js';
import { type ApiKey, findApiKey, readApiKeys } from './api-keys.js';
import type { Access, Caller, Gate } from './caller.js';

/** Nobody in particular: for what is public on a server with keys. */
const ANYBODY: Caller = { name: '', roles: [], weight: 1, maxPriority: 0, maxStreams: null, maxTokensPerMinute: null };

/** The gate of a server with API keys. */
export class KeyGate implements Gate {
  private constructor(
    private readonly path: string,
    private readonly log: Logger,
    private keys: readonly ApiKey[],
  ) {}

  /** @param path of the keys file @throws ConfigError */
  static load(path: string, log: Logger): KeyGate {
    const gate = new KeyGate(path, log, []);
    gate.readKeys();
    return gate;
  }

  authorize(access: Access, authorization: string | undefined): Caller {
    if (access === 'public') return ANYBODY;
    if (authorization === undefined) throw new UnauthenticatedError('no API key: send the header "authorization: Bearer KEY"');
    const presented = /^Bearer +(?<key>[\x21-\x7e]{1,512}) *$/i.exec(authorization)?.groups?.['key'];
    if (presented === undefined) throw new UnauthenticatedError('the header authorization has no key: send "authorization: Bearer KEY"');
    const key = findApiKey(this.keys, presented);
    if (!key) throw new UnauthenticatedError('this API key is not known here');
    const { name, roles } = key.caller;
    if (!roles.includes(access)) throw new ForbiddenError(`the role ${access} is needed, key ${name} has ${roles.join(', ')}`);
    return key.caller;
  }

  /** Reads the file again; calls from then on need its keys. A file that is wrong changes nothing. @returns whether it was taken */
  reload(): boolean {
    try {
      this.readKeys();
      return true;
    } catch (error) {
      this.log.error({ reason: (error as Error).message }, 'the API keys were not read again: the old ones stay');
      return false;
    }
  }

  private readKeys(): void {
    const { keys, isWorldReadable } = readApiKeys(this.path);
    this.keys = keys;
    if (isWorldReadable) this.log.warn({ path: this.path }, 'everybody on this machine can read the file of API keys: chmod 600 it');
    if (keys.length === 0) this.log.warn({ path: this.path }, 'there are no API keys: nobody can call anything but probes');
    this.log.info({ path: this.path, keys: keys.length }, 'read the API keys');
  }
}
