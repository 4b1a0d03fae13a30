import { randomBytes } from 'node:crypto';
import { Server } from '@grpc/grpc-js';
import { isLoopback, LINK_CHANNEL_OPTIONS, parseAddress } from '../common/address.js';
import { ConfigError } from '../common/errors.js';
import { createLogger, type LogLevel } from '../common/log.js';
import { WorkerLink } from '../common/services.js';
import { localShare } from '../model/model-config.js';
import { openStore } from '../model/store/open-store.js';
import { checkSpecialTokens, loadTokenizer } from '../model/tokenizer/tokenizer.js';
import type { WorkerLinkHandlers } from '../proto/generated/tandem/v1/WorkerLink.js';
import { createGrpcServer } from './api/grpc-server.js';
import { ServingService } from './api/service.js';
import { Supervisor } from './group/supervisor.js';
import { WorkerGroup } from './group/worker-group.js';
import { checkListen, listen } from './listen.js';
import { createWorkerSocketPath } from './runtime-dir.js';
import type { Limits } from './limits.js';
import { ServingLoop } from './serving-loop.js';
import { kvBlocksFor } from './group/kv-capacity.js';
import { statusSnapshot } from './status/snapshot.js';

interface TlsPaths {
  readonly cert: string;
  readonly key: string;
  readonly clientCa: string | null;
}

export interface ServeOptions {
  readonly model: string;
  readonly worldSize: number;
  /** Threads of each worker's kernels. */
  readonly threads: number;
  /** Public API: `unix:/path` or `host:port`. */
  readonly listen: string;
  /** Where workers dial in; null: a socket in a private folder of this process. */
  readonly workerListen: string | null;
  /** False: workers are started by somebody else (systemd) and dial in. */
  readonly supervise: boolean;
  /** What workers that are started by somebody else have to present; null: nothing. */
  readonly workerToken: string | null;
  /** Executable and arguments of one worker, for supervised ones: the link's address and the rank are appended. */
  readonly workerCommand: readonly string[];
  /** Null: enough for 32 sequences of full length, within a quarter of the memory. */
  readonly kvBlocks: number | null;
  readonly kvDtype: 'fp16' | 'fp32';
  readonly isa: string;
  readonly stepTimeoutMs: number;
  /** What clients call the model; null: the name of its folder. */
  readonly modelName: string | null;
  /** Null: no HTTP. */
  readonly httpListen: string | null;
  readonly access: { readonly apiKeysFile: string | null; readonly tls: TlsPaths | null };
  readonly limits: Limits;
  /** Tokens of a step before runs are sliced by layers; 0: never sliced. */
  readonly maxStepTokens: number;
  /** Null: half of the KV blocks. */
  readonly contextCacheBlocks: number | null;
  readonly otlpEndpoint: string | null;
  readonly logLevel: LogLevel;
}

export interface RunningServer {
  /** The public API's address as clients write it. */
  readonly address: string;
  /** Null: there is no HTTP. */
  readonly httpAddress: string | null;
  /** Rejects when the server can not go on. */
  readonly failed: Promise<never>;
  /** Reads API keys and TLS files again. */
  reload(): void;
  close(): Promise<void>;
}

export const DEFAULT_STEP_TOKENS = 256;
const KV_BLOCK_SIZE = 16;
/** Sequences that can decode in one step. */
const MAX_EXTENDS = 256;
const HEARTBEAT_MS = 1000;
const SHUTDOWN_GRACE_MS = 1000;
const MAX_RESTARTS_PER_MINUTE = 5;

/** Starts coordinator and workers; resolves when the first epoch is ready and the public API listens. */
export async function startServer(options: ServeOptions): Promise<RunningServer> {
  const startMs = performance.now();
  const log = createLogger('coordinator', options.logLevel);
  requireLoopback('--listen', options.listen);
  if (options.workerListen !== null) requireLoopback('--worker-listen', options.workerListen);
  await checkListen(options.listen);
  const store = await openStore(options.model);
  const { config } = store;
  const share = localShare(config, options.worldSize);
  const tokenizer = store.tokenizerPath && config.tokenizer ? await loadTokenizer(store.tokenizerPath, config.tokenizer) : null;

  if (tokenizer) checkSpecialTokens(tokenizer, config.specialTokens);

  const token = options.supervise ? randomBytes(16).toString('hex') : options.workerToken;
  const maxRunTokens = config.maxSequenceLength;
  // A step's whole runs beside one that goes through the layers.
  const maxBatchTokens = maxRunTokens + Math.max(MAX_EXTENDS, options.maxStepTokens);
  let supervisor: Supervisor | null = null;
  const group = new WorkerGroup({
    worldSize: options.worldSize,
    modelPath: store.dir,
    threads: options.threads,
    isa: options.isa,
    kv: { blockSize: KV_BLOCK_SIZE, dtype: options.kvDtype },
    kvBlocks: (totalMemoryBytes) =>
      options.kvBlocks ??
      kvBlocksFor({ config, share, blockSize: KV_BLOCK_SIZE, dtype: options.kvDtype, totalMemoryBytes, ranks: options.worldSize }),
    maxBatchTokens,
    collectiveTimeoutMs: options.stepTimeoutMs,
    stepTimeoutMs: options.stepTimeoutMs,
    heartbeatMs: HEARTBEAT_MS,
    token,
    log,
    vocabSize: config.vocabSize,
    numLayers: config.numLayers,
    onAttached: (rank) => supervisor?.attached(rank),
    onDismissed: (rank, isCulprit) => supervisor?.expectExit(rank, isCulprit),
  });

  const linkServer = new Server(LINK_CHANNEL_OPTIONS);
  const handlers: WorkerLinkHandlers = { Attach: (call) => group.attach(call) };
  linkServer.addService(WorkerLink.service, { ...handlers });
  let loop: ServingLoop | null = null;
  let publicServer: Server | null = null;
  let closing: Promise<void> | null = null;
  const close = (): Promise<void> =>
    (closing ??= (async () => {
      log.info('stopping');
      await Promise.all([loop?.close(), group.close()]);
      if (publicServer) await shutDown(publicServer);
      await supervisor?.close();
      linkServer.forceShutdown();
    })());

  try {
    const linkAddress = await listen(linkServer, options.workerListen ?? `unix:${await createWorkerSocketPath()}`);
    if (options.supervise) {
      supervisor = new Supervisor({
        worldSize: options.worldSize,
        command: [...options.workerCommand, '--coordinator', linkAddress, '--log-level', options.logLevel, '--rank'],
        env: { ...process.env, TANDEM_WORKER_TOKEN: token! },
        maxRestartsPerMinute: MAX_RESTARTS_PER_MINUTE,
        log,
        onGivenUp: (_rank, reason) => group.giveUp(reason),
      });
    } else log.info({ address: linkAddress, worldSize: options.worldSize }, 'waiting for workers');
    await group.ready();

    loop = new ServingLoop(
      group,
      {
        ...options.limits,
        stepTokens: options.maxStepTokens || maxBatchTokens,
        maxBatchTokens,
        maxExtends: MAX_EXTENDS,
        contextCacheBlocks: options.contextCacheBlocks ?? Math.floor(group.capacity.kvBlocks / 2),
      },
      log,
    );
    const running = loop;
    const service = new ServingService({
      config,
      modelName: 'glm',
      tokenizer,
      blockSize: KV_BLOCK_SIZE,
      limits: options.limits,
      loop: () => running,
      health: () => ({ state: 'ready', reason: '' }),
    });
    publicServer = createGrpcServer({
      service,
      log,
      status: () =>
        statusSnapshot({
          state: closing ? 'stopping' : group.failureReason !== null ? 'failed' : group.isReady ? 'ready' : 'recovering',
          uptimeSeconds: (performance.now() - startMs) / 1000,
          epoch: group.epoch,
          model: {
            path: store.dir,
            config,
            weights: store.quantization ? `INT${store.quantization.bits}` : 'FP16',
            hasTokenizer: tokenizer !== null,
          },
          threads: options.threads,
          ranks: group.snapshot(),
          restarts: (rank) => supervisor?.restarts(rank) ?? 0,
          loop: running.snapshot(),
        }),
    });
    const address = await listen(publicServer, options.listen);
    log.info(
      { address, worldSize: options.worldSize, kvBlocks: group.capacity.kvBlocks, startMs: Math.round(performance.now() - startMs) },
      'ready',
    );
    return { address, httpAddress: null, failed: group.failed, reload: () => {}, close };
  } catch (error) {
    await close();
    throw error;
  }
}

/** @throws ConfigError */
function requireLoopback(flag: string, address: string): void {
  if (isLoopback(parseAddress(address))) return;
  throw new ConfigError(`${flag} ${address}: there is no authentication yet, so only unix:/path and loopback addresses are allowed`);
}

/** Lets the last messages reach the clients. */
async function shutDown(server: Server): Promise<void> {
  const timer = setTimeout(() => server.forceShutdown(), SHUTDOWN_GRACE_MS);
  await new Promise<void>((resolve) => server.tryShutdown(() => resolve()));
  clearTimeout(timer);
}
