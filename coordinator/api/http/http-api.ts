import type { TlsOptions } from 'node:tls';
import type { TandemError } from '../../../common/errors.js';
import type { Logger } from '../../../common/log.js';
import type { Status } from '../../../proto/generated/tandem/v1/Status.js';
import type { Caller, Access, Gate } from '../../access/caller.js';
import type { ServingService } from '../service.js';

/** What the HTTP server needs of the rest. */
export interface HttpApi {
  readonly service: ServingService;
  readonly gate: Gate;
  readonly status: () => Status;
  readonly metrics: () => Promise<{ readonly contentType: string; readonly text: string }>;
  readonly log: Logger;
  /** Folder of the dashboard's index.html, read once; absent: `dashboard/` of the package. */
  readonly dashboardDir?: string;
  /** Certificate and key, for mutual TLS also `ca`, `requestCert` and `rejectUnauthorized`; absent: plain HTTP. */
  readonly tls?: TlsOptions;
  /**
   * Against web pages that call a server on their reader's machine (DNS rebinding, forms): requests are answered only under the names
   * localhost, 127.x.x.x, [::1] and these, and only from pages of the same origin. Null: under any name, for a server whose gate asks for credentials.
   */
  readonly hosts?: readonly string[] | null;
  /** Told why a call of the role `infer` is refused; the service may have said so itself, and knows the error. */
  readonly onRefused?: (error: TandemError) => void;
  readonly timeouts?: Partial<HttpTimeouts>;
}

export interface HttpTimeouts {
  /** From the connection (or the last answer's end) to the last byte of the headers. */
  readonly headersMs: number;
  /** The same to the last byte of the body. */
  readonly requestMs: number;
  /** How long a client may read nothing of an answer that has ended; what has not ended is bounded by `maxBufferedBytes`. */
  readonly readMs: number;
  /** How long a connection may stay open without a request. */
  readonly keepAliveMs: number;
  /** How often the first two are checked. */
  readonly checkMs: number;
}

declare module 'fastify' {
  interface FastifyContextConfig {
    access?: Access;
  }
  interface FastifyRequest {
    caller: Caller;
    /** The service has it, and counts how it ends. */
    isSubmitted: boolean;
  }
  interface FastifyInstance {
    /** New certificates for connections from here on. */
    setTls(tls: TlsOptions): void;
  }
}
