import { fileURLToPath } from 'node:url';
import type { CommandModule } from 'yargs';
import { ConfigError } from '../../common/errors.js';
import { LOG_LEVELS, type LogLevel } from '../../common/log.js';
import { startServer } from '../../coordinator/main.js';
import { nativeBuild } from '../../worker/engine.js';
import { modelOrTiny } from '../model-option.js';
import { wholeNumber } from '../number-option.js';

export const DEFAULT_ADDRESS = '127.0.0.1:7130';

/** As a shell reports a command that Ctrl-C ended. */
const EXIT_INTERRUPTED = 130;

interface ServeArgs {
  model: string | undefined;
  worldSize: number;
  threads: number;
  listen: string;
  workerListen: string | undefined;
  externalWorkers: boolean;
  kvBlocks: number | undefined;
  kvDtype: string;
  isa: string;
  stepTimeoutMs: number;
  logLevel: string;
}

/** What a parent process is told over its IPC channel once the server can be used. */
export interface ReadyMessage {
  readonly kind: 'ready';
  readonly address: string;
}

export const serveCommand: CommandModule<unknown, ServeArgs> = {
  command: 'serve',
  describe: 'Start a coordinator and its workers',
  builder: (yargs) =>
    yargs
      .option('model', { type: 'string', describe: 'Model store (default: the tiny model that ships with the project)' })
      .option('world-size', wholeNumber('world-size', { min: 1, default: 2, describe: 'Workers: the tensor-parallel degree' }))
      .option('threads', wholeNumber('threads', { min: 1, default: 1, describe: 'Threads of each worker' }))
      .option('listen', { type: 'string', default: DEFAULT_ADDRESS, describe: 'Public gRPC API: host:port or unix:/path' })
      .option('worker-listen', { type: 'string', describe: 'Where workers dial in (default: a private Unix socket)' })
      .option('external-workers', {
        type: 'boolean',
        default: false,
        describe: 'Workers are started by somebody else, with "tandem worker"',
      })
      .option(
        'kv-blocks',
        wholeNumber('kv-blocks', { min: 1, describe: 'KV cache of each worker in blocks of 16 tokens (default: by memory)' }),
      )
      .option('kv-dtype', { choices: ['fp16', 'fp32'] as const, requiresArg: true, default: 'fp16', describe: 'Precision of the KV cache' })
      .option('isa', {
        choices: ['auto', 'avx512', 'avx2', 'generic'] as const,
        requiresArg: true,
        default: 'auto',
        describe: 'Instruction set of the kernels',
      })
      .option(
        'step-timeout-ms',
        wholeNumber('step-timeout-ms', { min: 1, default: 60_000, describe: 'A step that takes longer ends the epoch' }),
      )
      .option('log-level', {
        choices: LOG_LEVELS,
        requiresArg: true,
        default: 'info',
        describe: 'Least level of the log, JSON lines on stderr',
      })
      .check((args) => {
        if (args['external-workers'] && !args['worker-listen'])
          throw new ConfigError('--external-workers needs --worker-listen, or workers could not find the coordinator');
        return true;
      }) as never,
  async handler(args) {
    const stop = new Promise<void>((resolve) => {
      for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => resolve()); // npm and timeout send it twice
      process.once('disconnect', () => resolve()); // a parent that is gone needs no server
    });
    if (!args.externalWorkers) nativeBuild(); // now, and not from each worker
    const starting = startServer({
      model: await modelOrTiny(args.model),
      worldSize: args.worldSize,
      threads: args.threads,
      listen: args.listen,
      workerListen: args.workerListen ?? null,
      supervise: !args.externalWorkers,
      workerToken: process.env['TANDEM_WORKER_TOKEN'] ?? null,
      workerCommand: [process.execPath, fileURLToPath(new URL('../main.js', import.meta.url)), 'worker'],
      kvBlocks: args.kvBlocks ?? null,
      kvDtype: args.kvDtype === 'fp32' ? 'fp32' : 'fp16',
      isa: args.isa === 'auto' ? '' : args.isa,
      stepTimeoutMs: args.stepTimeoutMs,
      logLevel: args.logLevel as LogLevel,
    });
    const server = await Promise.race([starting, stop.then(() => null)]);
    if (!server) process.exit(EXIT_INTERRUPTED); // nothing is served yet; the workers leave when their link breaks
    process.send?.({ kind: 'ready', address: server.address } satisfies ReadyMessage);
    try {
      await Promise.race([stop, server.failed]);
    } finally {
      await server.close();
      if (process.connected) process.disconnect();
    }
  },
};
