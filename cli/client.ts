import { promisify } from 'node:util';
import { type ChannelOptions, InterceptingCall, type Interceptor, Metadata } from '@grpc/grpc-js';
import { CLIENT_CHANNEL_OPTIONS, clientAddress, clientCredentials, type ClientTls } from '../common/address.js';
import { ConfigError } from '../common/errors.js';
import { Generation, Ops } from '../common/services.js';
import type { Delta__Output } from '../proto/generated/tandem/v1/Delta.js';
import type { Finish__Output } from '../proto/generated/tandem/v1/Finish.js';
import type { GenerateRequest } from '../proto/generated/tandem/v1/GenerateRequest.js';
import type { GenerateResponse__Output } from '../proto/generated/tandem/v1/GenerateResponse.js';
import type { LogitsResponse__Output } from '../proto/generated/tandem/v1/LogitsResponse.js';
import type { LogitsRequest } from '../proto/generated/tandem/v1/LogitsRequest.js';
import type { ScoreRequest } from '../proto/generated/tandem/v1/ScoreRequest.js';
import type { ScoreResponse__Output } from '../proto/generated/tandem/v1/ScoreResponse.js';
import type { Status__Output } from '../proto/generated/tandem/v1/Status.js';

/** A server's public API as plain functions; failures are gRPC ServiceErrors. */
export interface TandemClient {
  /** Aborting the signal cancels the request. */
  generate(request: GenerateRequest, onDelta?: (delta: Delta__Output) => void, signal?: AbortSignal): Promise<Finish__Output>;
  score(request: ScoreRequest): Promise<ScoreResponse__Output>;
  /** One array of vocabulary size for each reported row. */
  logits(request: LogitsRequest): Promise<Float32Array[]>;
  tokenize(text: string, asPrompt?: boolean): Promise<number[]>;
  status(): Promise<Status__Output>;
  /** Until the signal is aborted or the server ends the stream. A server that is not there is waited for. */
  watchStatus(intervalMs: number, onStatus: (status: Status__Output) => void, signal: AbortSignal): Promise<void>;
  close(): void;
}

/** How a client shows who it is, and makes sure of whom it talks to. */
export interface Credentials {
  readonly apiKey: string | null;
  /** Null: no TLS. */
  readonly tls: ClientTls | null;
}

const NO_CREDENTIALS: Credentials = { apiKey: null, tls: null };

const CONNECT_TIMEOUT_MS = 5_000;

/** A status that is watched goes on soon after a server that was lost is back. */
const OPS_CHANNEL_OPTIONS: ChannelOptions = {
  ...CLIENT_CHANNEL_OPTIONS,
  'grpc.keepalive_time_ms': 10_000,
  'grpc.keepalive_timeout_ms': 5_000,
  'grpc.max_reconnect_backoff_ms': 2_000,
};

/** @throws ConfigError if nobody answers at the address */
export async function connect(address: string, { apiKey, tls }: Credentials = NO_CREDENTIALS): Promise<TandemClient> {
  const target = clientAddress(address);
  const gated = apiKey === null ? {} : { interceptors: [withApiKey(apiKey)] };
  const generation = new Generation(target, clientCredentials(tls), { ...CLIENT_CHANNEL_OPTIONS, ...gated });
  const ops = new Ops(target, clientCredentials(tls), { ...OPS_CHANNEL_OPTIONS, ...gated });
  await new Promise<void>((resolve, reject) => {
    generation.waitForReady(Date.now() + CONNECT_TIMEOUT_MS, (error) => {
      if (!error) return resolve();
      generation.close();
      ops.close();
      const advice = tls ? ', or check --ca, --client-cert and --client-key' : ', or give --ca if it has TLS';
      reject(new ConfigError(`no server at ${address}: start one with "tandem serve", or name it with --address${advice}`));
    });
  });
  return {
    generate: (request, onDelta = () => {}, signal) =>
      new Promise((resolve, reject) => {
        const call = generation.generate(request);
        const cancel = (): void => call.cancel();
        if (signal?.aborted) cancel();
        signal?.addEventListener('abort', cancel);
        call.on('status', () => signal?.removeEventListener('abort', cancel)); // the last event of every call
        let finish: Finish__Output | null = null;
        call.on('data', (message: GenerateResponse__Output) => {
          if (message.delta) onDelta(message.delta);
          else if (message.finish) finish = message.finish;
        });
        call.on('error', reject);
        call.on('end', () => {
          if (finish) resolve(finish);
          else reject(new Error('the server closed the stream without a finish message'));
        });
      }),
    score: async (request) =>
      must(await promisify<ScoreRequest, ScoreResponse__Output | undefined>(generation.score.bind(generation))(request)),
    logits: (request) =>
      new Promise((resolve, reject) => {
        const rows: Float32Array[] = [];
        const call = generation.logits(request);
        call.on('data', ({ rows: count, vocabSize, logits }: LogitsResponse__Output) => {
          const floats = new Float32Array(Uint8Array.from(logits).buffer);
          for (let row = 0; row < count; row++) rows.push(floats.subarray(row * vocabSize, (row + 1) * vocabSize));
        });
        call.on('error', reject);
        call.on('end', () => resolve(rows));
      }),
    tokenize: (text, asPrompt = false) =>
      new Promise((resolve, reject) => {
        generation.tokenize({ text, asPrompt }, (error, response) => (error ? reject(error) : resolve(must(response).ids)));
      }),
    status: () =>
      new Promise((resolve, reject) => {
        ops.getStatus({}, (error, response) => (error ? reject(error) : resolve(must(response))));
      }),
    watchStatus: (intervalMs, onStatus, signal) =>
      new Promise((resolve, reject) => {
        const call = ops.watchStatus({ intervalMs }, new Metadata({ waitForReady: true }));
        const cancel = (): void => call.cancel();
        if (signal.aborted) cancel();
        signal.addEventListener('abort', cancel);
        call.on('status', () => signal.removeEventListener('abort', cancel)); // the last event of every call
        call.on('data', onStatus);
        call.on('error', (error) => (signal.aborted ? resolve() : reject(error)));
        call.on('end', resolve);
      }),
    close() {
      generation.close();
      ops.close();
    },
  };
}

/** On every call. Credentials of a call are for TLS alone in grpc-js, and a server on this machine needs none. */
function withApiKey(apiKey: string): Interceptor {
  return (options, nextCall) =>
    new InterceptingCall(nextCall(options), {
      start(metadata, listener, next) {
        metadata.set('authorization', `Bearer ${apiKey}`);
        next(metadata, listener);
      },
    });
}

function must<T>(value: T | undefined): T {
  if (value === undefined) throw new Error('the server answered without a message');
  return value;
}
