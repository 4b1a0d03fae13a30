import type { CommandModule } from 'yargs';
import { LOG_LEVELS, type LogLevel } from '../../common/log.js';
import { runWorker } from '../../worker/main.js';

/** EX_TEMPFAIL of sysexits.h: whoever supervises this process should start it again. */
const EXIT_START_AGAIN = 75;

interface WorkerArgs {
  coordinator: string;
  rank: number;
  connectTimeoutMs: number;
  logLevel: string;
}

export const workerCommand: CommandModule<unknown, WorkerArgs> = {
  command: 'worker',
  describe: 'Run one tensor-parallel rank for a coordinator',
  builder: (yargs) =>
    yargs
      .option('coordinator', { type: 'string', demandOption: true, describe: "The coordinator's worker address: unix:/path or host:port" })
      .option('rank', { type: 'number', demandOption: true, describe: 'This rank, from 0' })
      .option('connect-timeout-ms', { type: 'number', default: 30_000, describe: 'How long to try to reach the coordinator' })
      .option('log-level', { choices: LOG_LEVELS, default: 'info' }) as never,
  async handler(args) {
    // A terminal's Ctrl-C reaches the whole process group; the coordinator decides when its workers leave.
    process.on('SIGINT', () => {});
    process.once('SIGTERM', () => process.exit(0));
    const end = await runWorker({
      coordinator: args.coordinator,
      rank: args.rank,
      token: process.env['TANDEM_WORKER_TOKEN'] ?? '',
      logLevel: args.logLevel as LogLevel,
      connectTimeoutMs: args.connectTimeoutMs,
    });
    // At once: the native engine's thread may still be inside a step that nobody waits for.
    process.exit(end === 'shutdown' ? 0 : EXIT_START_AGAIN);
  },
};
