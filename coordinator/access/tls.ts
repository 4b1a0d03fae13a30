import { createPrivateKey, X509Certificate, type KeyObject } from 'node:crypto';
import { readFileSync, statSync } from 'node:fs';
import { createSecureContext, type SecureContextOptions } from 'node:tls';
import { ServerCredentials } from '@grpc/grpc-js';
import { ConfigError } from '../../common/errors.js';
import type { Logger } from '../../common/log.js';

export interface TlsPaths {
  /** The server's certificate, followed by those between it and its authority. */
  readonly cert: string;
  readonly key: string;
  /** Authorities of client certificates: given, clients need one (mutual TLS). */
  readonly clientCa: string | null;
}

const MAX_PEM_BYTES = 1024 * 1024;
const WARN_BEFORE_EXPIRY_MS = 14 * 24 * 3600 * 1000;

/** Certificate and key of both listeners: checked whenever they are read, and the old ones stay where new ones are wrong. */
export class TlsFiles {
  private readonly listeners: ((options: SecureContextOptions) => void)[] = [];

  private constructor(
    private readonly paths: TlsPaths,
    private readonly log: Logger,
    private options: SecureContextOptions,
  ) {}

  /** @throws ConfigError naming the file: not readable, no PEM, expired, or certificate and key are no pair */
  static load(paths: TlsPaths, log: Logger): TlsFiles {
    return new TlsFiles(paths, log, readAndCheck(paths, log));
  }

  get requiresClientCertificate(): boolean {
    return this.paths.clientCa !== null;
  }

  /** For `tls.createServer` and what is built on it, with {@link onReload} and its `setSecureContext` for what comes later. */
  serverOptions(): SecureContextOptions & { readonly requestCert: boolean; readonly rejectUnauthorized: boolean } {
    return { ...this.options, requestCert: this.requiresClientCertificate, rejectUnauthorized: this.requiresClientCertificate };
  }

  /** For a gRPC server; they follow {@link reload}. */
  grpcCredentials(): ServerCredentials {
    const credentials = new ReloadableCredentials(this.requiresClientCertificate, this.options);
    this.onReload((options) => credentials.update(options));
    return credentials;
  }

  /** Connections that are there already keep what they began with. */
  onReload(listener: (options: SecureContextOptions) => void): void {
    this.listeners.push(listener);
  }

  /** Reads the files again. Where one is wrong nothing changes. @returns whether they were taken */
  reload(): boolean {
    try {
      this.options = readAndCheck(this.paths, this.log);
    } catch (error) {
      this.log.error({ reason: (error as Error).message }, 'the TLS files were not read again: the old ones stay');
      return false;
    }
    for (const listener of this.listeners) listener(this.options);
    return true;
  }
}

class ReloadableCredentials extends ServerCredentials {
  constructor(requestCert: boolean, options: SecureContextOptions) {
    super({ requestCert, rejectUnauthorized: requestCert }, options);
  }

  update(options: SecureContextOptions): void {
    this.updateSecureContextOptions(options);
  }

  override _equals(other: ServerCredentials): boolean {
    return other === this;
  }
}

function readAndCheck({ cert, key, clientCa }: TlsPaths, log: Logger): SecureContextOptions {
  const certPem = readPem('--tls-cert', cert);
  const keyPem = readPem('--tls-key', key);
  const [certificate, ...chain] = parseCertificates('--tls-cert', cert, certPem) as [X509Certificate, ...X509Certificate[]];
  for (const part of [certificate, ...chain]) checkDates('--tls-cert', cert, part);
  if (!certificate.checkPrivateKey(parseKey(key, keyPem))) {
    throw new ConfigError(`--tls-key ${key} is not the key of the certificate in ${cert}: give the two that were made together`);
  }
  const expiresMs = Date.parse(certificate.validTo);
  if (expiresMs - Date.now() < WARN_BEFORE_EXPIRY_MS) log.warn({ cert, validTo: certificate.validTo }, 'the TLS certificate expires soon');
  const caPem = clientCa === null ? null : readPem('--client-ca', clientCa);
  for (const ca of caPem === null ? [] : parseCertificates('--client-ca', clientCa!, caPem)) checkDates('--client-ca', clientCa!, ca);
  const options = { cert: certPem, key: keyPem, ...(caPem === null ? {} : { ca: caPem }) };
  try {
    createSecureContext(options);
  } catch (error) {
    throw new ConfigError(`TLS cannot use ${cert} and ${key}: ${(error as Error).message}`);
  }
  log.info({ cert, subject: certificate.subject, validTo: certificate.validTo, clientCa }, 'read the TLS files');
  return options;
}

function readPem(flag: string, path: string): Buffer {
  try {
    const stat = statSync(path);
    if (!stat.isFile()) throw new ConfigError(`${flag} ${path} is not a regular file`);
    if (stat.size > MAX_PEM_BYTES) throw new ConfigError(`${flag} ${path} has ${stat.size} bytes, at most ${MAX_PEM_BYTES} are read`);
    return readFileSync(path);
  } catch (error) {
    if (error instanceof ConfigError) throw error;
    throw new ConfigError(`${flag} ${path} cannot be read (${(error as NodeJS.ErrnoException).code})`);
  }
}

/** In the order of the file, one at least. */
function parseCertificates(flag: string, path: string, pem: Buffer): X509Certificate[] {
  const blocks = pem.toString('latin1').match(/-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g) ?? [];
  if (blocks.length === 0) throw new ConfigError(`${flag} ${path} has no certificate in PEM form`);
  return blocks.map((block) => {
    try {
      return new X509Certificate(block);
    } catch (error) {
      throw new ConfigError(`${flag} ${path} has a certificate that cannot be read: ${(error as Error).message}`);
    }
  });
}

function checkDates(flag: string, path: string, { subject, validFrom, validTo }: X509Certificate): void {
  const name = subject.replaceAll('\n', ', ');
  if (Date.parse(validTo) < Date.now())
    throw new ConfigError(`${flag} ${path}: the certificate of ${name} expired on ${validTo}, renew it`);
  if (Date.parse(validFrom) > Date.now()) {
    throw new ConfigError(`${flag} ${path}: the certificate of ${name} is valid from ${validFrom} on, check the clock`);
  }
}

function parseKey(path: string, pem: Buffer): KeyObject {
  try {
    return createPrivateKey(pem);
  } catch (error) {
    throw new ConfigError(`--tls-key ${path} is no private key in PEM form, or has a passphrase: ${(error as Error).message}`);
  }
}
