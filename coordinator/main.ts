import { randomBytes } from 'node:crypto';
import { availableParallelism } from 'node:os';
import { Server } from '@grpc/grpc-js';
import { isLoopback, LINK_CHANNEL_OPTIONS, parseAddress } from '../common/address.js';
import { ConfigError } from '../common/errors.js';
import { cpusOfRank, formatCpuList } from '../common/cpu-list.js';
import { createLogger, type Logger, type LogLevel } from '../common/log.js';
import { kvBlockSize, type KvDtype } from '../model/kv-blocks.js';
import { maxStepSequences } from '../model/memory-plan.js';
import { localShare } from '../model/model-config.js';
import { openStore } from '../model/store/open-store.js';
import { ThreadedEncoder } from '../model/tokenizer/threaded-encoder.js';
import { checkSpecialTokens, loadTokenizer } from '../model/tokenizer/tokenizer.js';
import type { WorkerLinkHandlers } from '../proto/generated/tandem/v1/WorkerLink.js';
import { OPEN_GATE } from './access/caller.js';
import { KeyGate } from './access/gate.js';
import { TlsFiles, type TlsPaths } from './access/tls.js';
import { createGrpcServer } from './api/grpc-server.js';
import { createHttpServer } from './api/http/http-server.js';
import { listenHttp } from './api/http/listen-http.js';
import { ServingService, type ServerState } from './api/service.js';
import { kvBlocksFor, kvBlocksOfGpu } from './group/kv-capacity.js';
import { Supervisor } from './group/supervisor.js';
import { linkService } from './group/wire.js';
import { WorkerGroup } from './group/worker-group.js';
import type { Limits } from './limits.js';
import { checkGuard, checkListen, listen } from './listen.js';
import { createWorkerSocketPath } from './runtime-dir.js';
import { ServingLoop } from './serving-loop.js';
import { EventLog } from './status/event-log.js';
import { Metrics } from './status/metrics.js';
import { observers } from './status/observer.js';
import { ServingStats } from './status/serving-stats.js';
import { statusSnapshot, type StatusSources } from './status/snapshot.js';
import { startTraces } from './status/traces.js';

export interface ServeOptions {
  readonly model: string;
  readonly worldSize: number;
  /** Threads of each worker's kernels. */
  readonly threads: number;
  /** Shared out among supervised workers; null: they run on any. */
  readonly cpus: readonly number[] | null;
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
  /** Null: on CPUs enough for 32 sequences of full length, within a quarter of the memory; on GPUs what fits beside the weights. */
  readonly kvBlocks: number | null;
  readonly engine: {
    /** Of the workers that are started here; `cuda`: rank N takes GPU N. */
    readonly device: 'cpu' | 'cuda';
    readonly kvDtype: KvDtype;
    /** `auto`: the best that each worker's CPU has. */
    readonly isa: string;
    readonly activations: 'int8' | 'float';
    readonly quantizeEmbedding: 'none' | 'int8';
  };
  readonly stepTimeoutMs: number;
  /** What clients call the model. */
  readonly modelName: string;
  /** Null: no HTTP. */
  readonly httpListen: string | null;
  readonly access: { readonly apiKeysFile: string | null; readonly tls: TlsPaths | null };
  readonly limits: Limits;
  /** Tokens of a step before runs are sliced by layers; 0: never sliced. */
  readonly maxStepTokens: number;
  /** Whether steps are sent while others run; auto: on GPUs, and where the workers' threads leave the coordinator a CPU, which else would keep them waiting. */
  readonly runAhead: 'auto' | 'on' | 'off';
  /** Null: half of the KV blocks. */
  readonly contextCacheBlocks: number | null;
  readonly otlpEndpoint: string | null;
  readonly logLevel: LogLevel;
}

export interface RunningServer {
  /** The public gRPC API's address as clients write it. */
  readonly address: string;
  /** Null: there is no HTTP. */
  readonly httpAddress: string | null;
  /** Rejects when the server can not go on. */
  readonly failed: Promise<never>;
  /** Reads API keys and TLS files again. What is wrong with them is logged, and the old ones stay. */
  reload(): void;
  close(): Promise<void>;
}

const HEARTBEAT_MS = 1000;
const SHUTDOWN_GRACE_MS = 1000;
const MAX_RESTARTS_PER_MINUTE = 5;

/** Starts coordinator and workers. The public APIs answer from the beginning, but take no requests yet; resolves when the first epoch is ready. */
export async function startServer(options: ServeOptions): Promise<RunningServer> {
  const startMs = performance.now();
  const { cpus, worldSize } = options;
  const { device, ...engine } = options.engine;
  const cpusOf = cpus === null ? null : Array.from({ length: worldSize }, (_, rank) => cpusOfRank(cpus, rank, worldSize));
  const log = createLogger('coordinator', options.logLevel);
  const { gate, tls } = loadAccess(options, log);
  await checkAddresses(options, tls, log);
  const store = await openStore(options.model);
  const { config } = store;
  const share = localShare(config, options.worldSize);
  const tokenizer = store.tokenizerPath && config.tokenizer ? await loadTokenizer(store.tokenizerPath, config.tokenizer) : null;
  if (tokenizer) checkSpecialTokens(tokenizer, config.specialTokens);

  const encoder =
    tokenizer && config.tokenizer && store.tokenizerPath
      ? new ThreadedEncoder({ tokenizer, path: store.tokenizerPath, config: config.tokenizer, log })
      : null;

  const token = options.supervise ? randomBytes(16).toString('hex') : options.workerToken;
  const maxRunTokens = config.maxSequenceLength;
  // A step's whole runs beside one that goes through the layers.
  const maxBatchTokens = maxRunTokens + Math.max(maxStepSequences, options.maxStepTokens);
  const events = new EventLog();
  let supervisor: Supervisor | null = null;
  const group = new WorkerGroup({
    worldSize: options.worldSize,
    modelPath: store.dir,
    threads: options.threads,
    engine,
    kvBlockSize,
    kvBlocks: (totalMemoryBytes, deviceKind) => {
      if (options.kvBlocks !== null) return options.kvBlocks;
      const cache = { config, share, blockSize: kvBlockSize, dtype: engine.kvDtype, totalMemoryBytes, ranks: worldSize };
      return deviceKind === 'cpu' ? kvBlocksFor(cache) : kvBlocksOfGpu({ ...cache, weights: store.quantization?.bits ?? 16 });
    },
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
    onEvent: (severity, message) => events.add(severity, message),
  });

  const linkServer = new Server(LINK_CHANNEL_OPTIONS);
  const handlers: WorkerLinkHandlers = { Attach: (call) => group.attach(call) };
  linkServer.addService(linkService, { ...handlers });
  let loop: ServingLoop | null = null;
  let closing: Promise<void> | null = null;
  const health = (): { state: ServerState; reason: string } => {
    if (closing) return { state: 'stopping', reason: 'the server was told to stop' };
    if (group.failureReason !== null) return { state: 'failed', reason: group.failureReason };
    const loaded = `${group.snapshot().filter(({ state }) => state === 'ready').length} of ${options.worldSize} ranks have loaded the model`;
    if (!loop) return { state: 'loading', reason: loaded };
    if (loop.isDraining) return { state: 'draining', reason: 'the server takes no new requests and ends when the running ones have' };
    return group.isReady ? { state: 'ready', reason: '' } : { state: 'recovering', reason: `a rank was lost: ${loaded}` };
  };
  const stats = new ServingStats();
  const sources = (): StatusSources => ({
    ...health(),
    uptimeSeconds: (performance.now() - startMs) / 1000,
    epoch: group.epoch,
    model: {
      name: options.modelName,
      path: store.dir,
      config,
      weights: store.quantization ? `INT${store.quantization.bits}` : 'FP16',
      hasTokenizer: tokenizer !== null,
    },
    threads: options.threads,
    ranks: group.snapshot(),
    restarts: (rank) => supervisor?.restarts(rank) ?? 0,
    loop: loop?.snapshot() ?? null,
    stats: stats.snapshot(),
    events: events.list(),
  });
  const metrics = new Metrics(sources);
  const { otlpEndpoint, modelName } = options;
  const traces = otlpEndpoint === null ? null : await startTraces({ otlpEndpoint, modelName, log });
  const observer = observers(metrics, stats, ...(traces ? [traces.observer] : []));
  const service = new ServingService({
    config,
    modelName,
    tokenizer,
    blockSize: kvBlockSize,
    limits: options.limits,
    loop: () => loop,
    health,
    observer,
    encoder,
  });
  const status = () => statusSnapshot(sources());
  const grpcServer = createGrpcServer({ service, gate: gate ?? OPEN_GATE, status, log, onRefused: (error) => service.refused(error) });
  const httpServer =
    options.httpListen === null
      ? null
      : createHttpServer({
          service,
          gate: gate ?? OPEN_GATE,
          status,
          metrics: () => metrics.text(),
          log,
          ...(tls ? { tls: tls.serverOptions() } : {}),
          hosts: gate || tls?.requiresClientCertificate ? null : [],
          onRefused: (error) => service.refused(error),
        });
  tls?.onReload((files) => httpServer?.setTls(files));

  const close = (): Promise<void> =>
    (closing ??= (async () => {
      log.info('stopping');
      grpcServer.updateHealth();
      await Promise.all([loop?.close(), group.close(), encoder?.close()]);
      await Promise.all([shutDown(grpcServer), httpServer?.close()]);
      await supervisor?.close();
      linkServer.forceShutdown();
      await traces?.close();
    })());

  try {
    const { maxConnections, maxHeaderBytes } = options.limits;
    const address = await listen(grpcServer, options.listen, {
      maxConnections,
      maxHeaderBytes,
      ...(tls ? { credentials: tls.grpcCredentials() } : {}),
    });
    const httpAddress = httpServer === null ? null : await listenHttp(httpServer, options.httpListen!);
    log.info({ address, httpAddress }, 'listening');
    const linkAddress = await listen(linkServer, options.workerListen ?? `unix:${await createWorkerSocketPath()}`);
    if (options.supervise) {
      supervisor = new Supervisor({
        worldSize: options.worldSize,
        command: (rank) => [
          ...[...options.workerCommand, '--coordinator', linkAddress, '--log-level', options.logLevel, '--rank', String(rank)],
          ...['--device', device === 'cpu' ? 'cpu' : `cuda:${rank}`],
          ...(cpusOf === null ? [] : ['--cpus', formatCpuList(cpusOf[rank]!)]),
        ],
        env: { ...process.env, TANDEM_WORKER_TOKEN: token! },
        maxRestartsPerMinute: MAX_RESTARTS_PER_MINUTE,
        log,
        onGivenUp: (_rank, reason) => group.giveUp(reason),
      });
    } else log.info({ address: linkAddress, worldSize: options.worldSize }, 'waiting for workers');
    await group.ready();

    const runAhead = runsAhead(options, group);
    loop = new ServingLoop(
      group,
      {
        ...options.limits,
        stepTokens: options.maxStepTokens || maxBatchTokens,
        maxBatchTokens,
        maxExtends: maxStepSequences,
        runAhead,
        contextCacheBlocks: options.contextCacheBlocks ?? Math.floor(group.capacity.kvBlocks / 2),
      },
      log,
      observer,
    );
    const readyMs = Math.round(performance.now() - startMs);
    log.info(
      { address, httpAddress, worldSize: options.worldSize, kvBlocks: group.capacity.kvBlocks, runAhead, startMs: readyMs },
      'ready',
    );
    const reload = (): void => {
      const isTaken = [gate?.reload() ?? true, tls?.reload() ?? true].every(Boolean);
      events.add(
        isTaken ? 'info' : 'error',
        isTaken ? 'API keys and certificates were read again' : 'API keys or certificates are wrong, the old ones stay',
      );
    };
    return { address, httpAddress, failed: group.failed, reload, close };
  } catch (error) {
    await close();
    throw error;
  }
}

function runsAhead({ runAhead, worldSize, threads }: ServeOptions, { deviceKind }: WorkerGroup): boolean {
  if (runAhead !== 'auto') return runAhead === 'on';
  return deviceKind === 'cuda' || availableParallelism() > worldSize * threads;
}

/** @throws ConfigError */
function loadAccess({ access }: ServeOptions, log: Logger): { gate: KeyGate | null; tls: TlsFiles | null } {
  return {
    gate: access.apiKeysFile === null ? null : KeyGate.load(access.apiKeysFile, log),
    tls: access.tls === null ? null : TlsFiles.load(access.tls, log),
  };
}

/** Whether all addresses can be bound and are guarded as they need. @throws ConfigError */
async function checkAddresses(
  { listen, httpListen, workerListen, access }: ServeOptions,
  tls: TlsFiles | null,
  log: Logger,
): Promise<void> {
  const guard = { hasKeys: access.apiKeysFile !== null, hasTls: tls !== null, hasClientCa: tls?.requiresClientCertificate ?? false };
  for (const [flag, address] of [
    ['--listen', listen],
    ['--http-listen', httpListen],
  ] as const) {
    if (address === null) continue;
    checkGuard(flag, address, guard, log);
    await checkListen(address);
  }
  if (workerListen !== null && !isLoopback(parseAddress(workerListen))) {
    throw new ConfigError(
      `--worker-listen ${workerListen}: workers share memory with each other, so only unix:/path and loopback addresses are allowed`,
    );
  }
}

/** Lets the last messages reach the clients. */
async function shutDown(server: Server): Promise<void> {
  const timer = setTimeout(() => server.forceShutdown(), SHUTDOWN_GRACE_MS);
  await new Promise<void>((resolve) => server.tryShutdown(() => resolve()));
  clearTimeout(timer);
}
