import { WorkerLink } from '../common/services.js';
import { ConfigError, WorkerLostError } from '../common/errors.js';
import type { Device } from '../common/device.js';
import { createLogger, type LogLevel } from '../common/log.js';
import { clientAddress, clientCredentials, LINK_CHANNEL_OPTIONS } from '../common/address.js';
import { serveLink } from './link.js';

export interface WorkerOptions {
  /** Where the coordinator's worker link listens: `unix:/path` or `host:port`. */
  readonly coordinator: string;
  readonly rank: number;
  readonly token: string;
  readonly device: Device;
  /** Where the engine's threads run; empty: anywhere. */
  readonly cpus: readonly number[];
  readonly logLevel: LogLevel;
  /** How long to try to reach the coordinator. */
  readonly connectTimeoutMs: number;
}

/**
 * One rank, until the coordinator ends it: by a shutdown, or because the epoch is over and the rank has to be started again.
 * Rejects where something is wrong.
 */
export async function runWorker(options: WorkerOptions): Promise<'shutdown' | 'dismissed'> {
  if (!Number.isInteger(options.rank) || options.rank < 0) throw new ConfigError(`--rank ${options.rank}: ranks count from 0`);
  const log = createLogger('worker', options.logLevel).child({ rank: options.rank });
  const client = new WorkerLink(clientAddress(options.coordinator), clientCredentials(), LINK_CHANNEL_OPTIONS);
  try {
    await new Promise<void>((resolve, reject) => {
      client.waitForReady(Date.now() + options.connectTimeoutMs, (error) => {
        if (error) reject(new ConfigError(`no coordinator at ${options.coordinator} within ${options.connectTimeoutMs} ms`));
        else resolve();
      });
    });
    const end = await serveLink(client.attach(), {
      rank: options.rank,
      token: options.token,
      device: options.device,
      cpus: options.cpus,
      log,
    });
    if (end.kind === 'broken') throw new WorkerLostError(`link to ${options.coordinator} ended: ${end.reason}`);
    log.info(`ended by the coordinator: ${end.kind}`);
    return end.kind;
  } finally {
    client.close();
  }
}
