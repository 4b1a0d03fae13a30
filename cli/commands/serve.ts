import { readFileSync } from 'node:fs';
import { basename, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { CommandModule, Options } from 'yargs';
import { parseCpuList } from '../../common/cpu-list.js';
import { ConfigError } from '../../common/errors.js';
import { LOG_LEVELS, type LogLevel } from '../../common/log.js';
import type { ServeOptions } from '../../coordinator/main.js';
import { DEFAULT_STEP_TOKENS, type LimitName, LIMITS, limitsFrom } from '../../coordinator/limits.js';
import { describeGpu, nativeBuild } from '../../worker/engine.js';
import { DEFAULT_ADDRESS } from '../default-address.js';
import { modelOrTiny } from '../model-option.js';
import { type EngineArgs, engineFlags, engineOptions, localEngineFlags } from '../engine-options.js';
import { wholeNumber } from '../number-option.js';

const DEFAULT_HTTP_ADDRESS = '127.0.0.1:7131';

/** As a shell reports a command that Ctrl-C ended. */
const EXIT_INTERRUPTED = 130;

type ServeArgs = FlagArgs & Partial<Record<LimitName, number>>;

interface FlagArgs extends EngineArgs {
  model: string | undefined;
  modelName: string | undefined;
  httpListen: string;
  apiKeys: string | undefined;
  tlsCert: string | undefined;
  tlsKey: string | undefined;
  clientCa: string | undefined;
  maxStepTokens: number;
  runAhead: ServeOptions['runAhead'];
  contextCacheBlocks: number | undefined;
  otlpEndpoint: string | undefined;
  worldSize: number;
  threads: number;
  cpus: string | undefined;
  listen: string;
  workerListen: string | undefined;
  externalWorkers: boolean;
  kvBlocks: number | undefined;
  stepTimeoutMs: number;
  logLevel: string;
}

/** What a parent process is told over its IPC channel once the server can be used. */
export interface ReadyMessage {
  readonly kind: 'ready';
  readonly address: string;
  /** Null: there is no HTTP. */
  readonly httpAddress: string | null;
}

const FLAGS: Readonly<Record<string, Options>> = {
  model: { type: 'string', describe: 'Model store (default: the tiny model that ships with the project)' },
  'world-size': wholeNumber('world-size', { min: 1, default: 2, describe: 'Workers: the tensor-parallel degree' }),
  threads: wholeNumber('threads', { min: 1, default: 1, describe: 'Threads of each worker' }),
  cpus: {
    type: 'string',
    requiresArg: true,
    describe: 'CPUs of the workers, as in 0-3,8, shared out evenly: rank 0 gets the first ones (default: any)',
  },
  listen: { type: 'string', default: DEFAULT_ADDRESS, describe: 'Public gRPC API: host:port or unix:/path' },
  'http-listen': {
    type: 'string',
    default: DEFAULT_HTTP_ADDRESS,
    describe: 'HTTP API, metrics and dashboard: host:port, unix:/path, or "off"',
  },
  'model-name': { type: 'string', describe: 'What clients call the model (default: the name of its folder)' },
  'api-keys': { type: 'string', describe: 'File of API keys (tandem key new): every call needs one' },
  'tls-cert': { type: 'string', describe: 'PEM file: certificate chain of both APIs' },
  'tls-key': { type: 'string', describe: 'PEM file: its private key' },
  'client-ca': { type: 'string', describe: 'PEM file: clients need a certificate that one of these has signed' },
  'worker-listen': { type: 'string', describe: 'Where workers dial in (default: a private Unix socket)' },
  'external-workers': {
    type: 'boolean',
    default: false,
    describe: 'Workers are started by somebody else, with "tandem worker"',
  },
  'kv-blocks': wholeNumber('kv-blocks', { min: 1, describe: 'KV cache of each worker in blocks of 16 tokens (default: by memory)' }),
  ...engineOptions({ kvDtype: 'fp16', activations: 'int8' }),
  'step-timeout-ms': wholeNumber('step-timeout-ms', { min: 1, default: 60_000, describe: 'A step that takes longer ends the epoch' }),
  'max-step-tokens': wholeNumber('max-step-tokens', {
    min: 0,
    default: DEFAULT_STEP_TOKENS,
    describe: 'Tokens of one step; a longer prompt goes through the layers in several, so that others keep decoding (0: never)',
  }),
  'run-ahead': {
    choices: ['auto', 'on', 'off'],
    requiresArg: true,
    default: 'auto',
    describe:
      'Send a step while the one before it runs, where what it needs can be foreseen (auto: where a CPU is left for it, or on GPUs)',
  },
  'context-cache-blocks': wholeNumber('context-cache-blocks', {
    min: 0,
    describe: 'KV blocks that keep contexts nobody uses at the moment (default: half of all)',
  }),
  'otlp-endpoint': {
    type: 'string',
    describe: 'URL of an OpenTelemetry collector (OTLP over HTTP) that gets a trace of each request',
  },
  ...limitFlags(),
  'log-level': {
    choices: LOG_LEVELS,
    requiresArg: true,
    default: 'info',
    describe: 'Least level of the log, JSON lines on stderr',
  },
};

export const serveCommand: CommandModule<unknown, ServeArgs> = {
  command: 'serve',
  describe: 'Start a coordinator and its workers',
  builder: (yargs) =>
    yargs
      .config('config', 'JSON file with any of these flags, named as here without the dashes in front', readConfigFile)
      .options(FLAGS)
      .check((args) => {
        if (args['external-workers'] && args['cpus'] !== undefined)
          throw new ConfigError('--cpus is for workers that this server starts; give it to "tandem worker"');
        if (args['external-workers'] && !args['worker-listen'])
          throw new ConfigError('--external-workers needs --worker-listen, or workers could not find the coordinator');
        return true;
      }) as never,
  async handler(args) {
    let reload: (() => void) | null = null;
    const stop = new Promise<void>((end) => {
      for (const signal of ['SIGINT', 'SIGTERM'] as const) process.on(signal, () => end()); // npm and timeout send it twice
      // With nothing to read again it means what it means to every program: the terminal is gone.
      process.on('SIGHUP', () => (args.apiKeys || args.tlsCert ? reload?.() : end()));
      process.once('disconnect', () => end()); // a parent that is gone needs no server
    });
    const cpus = args.cpus === undefined ? null : parseCpuList(args.cpus);
    const engine = args.externalWorkers ? engineFlags(args) : localEngineFlags(args);
    // Now, and not from each worker.
    if (!args.externalWorkers) nativeBuild();
    for (let gpu = 0; engine.device === 'cuda' && !args.externalWorkers && gpu < args.worldSize; gpu++) describeGpu(gpu);
    const { startServer } = await import('../../coordinator/main.js'); // web server and all: not for an error of the flags to wait for
    const starting = startServer({
      model: await modelOrTiny(args.model),
      worldSize: args.worldSize,
      threads: args.threads,
      cpus,
      listen: args.listen,
      workerListen: args.workerListen ?? null,
      supervise: !args.externalWorkers,
      workerToken: process.env['TANDEM_WORKER_TOKEN'] ?? null,
      workerCommand: [process.execPath, fileURLToPath(new URL('../main.js', import.meta.url)), 'worker'],
      modelName: args.modelName ?? (args.model === undefined ? 'tiny-glm' : basename(resolve(args.model))),
      httpListen: args.httpListen === 'off' ? null : args.httpListen,
      access: {
        apiKeysFile: args.apiKeys ?? null,
        tls: tlsPaths(args),
      },
      limits: limitsFrom(args),
      maxStepTokens: args.maxStepTokens,
      runAhead: args.runAhead,
      contextCacheBlocks: args.contextCacheBlocks ?? null,
      otlpEndpoint: args.otlpEndpoint ?? null,
      kvBlocks: args.kvBlocks ?? null,
      engine,
      stepTimeoutMs: args.stepTimeoutMs,
      logLevel: args.logLevel as LogLevel,
    });
    const server = await Promise.race([starting, stop.then(() => null)]);
    if (!server) process.exit(EXIT_INTERRUPTED); // nothing is served yet; the workers leave when their link breaks
    reload = () => server.reload();
    process.send?.({ kind: 'ready', address: server.address, httpAddress: server.httpAddress } satisfies ReadyMessage);
    try {
      await Promise.race([stop, server.failed]);
    } finally {
      await server.close();
      if (process.connected) process.disconnect();
    }
  },
};

/** `--max-queued-requests` and so on: one for each of {@link LIMITS}. */
function limitFlags(): Record<string, Options> {
  const flags = Object.entries(LIMITS).map(([name, { default: usual, min, max, what }]) => {
    const flag = name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
    return [flag, { ...wholeNumber(flag, { min, max, default: usual, describe: `Most ${what}` }), group: 'Limits:' }] as const;
  });
  return Object.fromEntries(flags);
}

/** @throws ConfigError only one of the two is given */
function tlsPaths({ tlsCert, tlsKey, clientCa }: FlagArgs) {
  if (tlsCert === undefined && tlsKey === undefined) {
    if (clientCa !== undefined)
      throw new ConfigError('--client-ca needs --tls-cert and --tls-key: there are no client certificates without TLS');
    return null;
  }
  if (tlsCert === undefined || tlsKey === undefined) throw new ConfigError('--tls-cert and --tls-key go together: give both');
  return { cert: tlsCert, key: tlsKey, clientCa: clientCa ?? null };
}

/** @throws ConfigError */
function readConfigFile(path: string): Record<string, unknown> {
  let parsed: unknown;
  try {
    parsed = JSON.parse(readFileSync(path, 'utf8'));
  } catch (error) {
    throw new ConfigError(`--config ${path}: ${(error as Error).message}`);
  }
  if (typeof parsed !== 'object' || parsed === null || Array.isArray(parsed)) {
    throw new ConfigError(`--config ${path}: a JSON object of flags is needed, as in {"world-size": 4}`);
  }
  for (const [flag, value] of Object.entries(parsed)) {
    // What yargs would make of it is another thing than what was meant: of "yes" false.
    const { number, type = 'string' } = Object.hasOwn(FLAGS, flag) ? FLAGS[flag]! : unknownFlag(path, flag);
    const needed = number ? 'number' : type;
    if (typeof value !== needed) throw new ConfigError(`--config ${path}: ${flag} is ${JSON.stringify(value)}, a ${needed} is needed`);
  }
  return parsed as Record<string, unknown>;
}

function unknownFlag(path: string, flag: string): never {
  throw new ConfigError(`--config ${path}: unknown argument: ${flag}`);
}
