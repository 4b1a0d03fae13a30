import type { CommandModule } from 'yargs';
import { parseCpuList } from '../../common/cpu-list.js';
import { parseDevice } from '../../common/device.js';
import { LOG_LEVELS, type LogLevel } from '../../common/log.js';
import { runWorker } from '../../worker/main.js';
import { wholeNumber } from '../number-option.js';

/** EX_TEMPFAIL of sysexits.h: whoever supervises this process should start it again. */
const EXIT_START_AGAIN = 75;

interface WorkerArgs {
  coordinator: string;
  rank: number;
  device: string;
  cpus: string | undefined;
  connectTimeoutMs: number;
  logLevel: string;
}

export const workerCommand: CommandModule<unknown, WorkerArgs> = {
  command: 'worker',
  describe: 'Run one tensor-parallel rank for a coordinator',
  builder: (yargs) =>
    yargs
      .option('coordinator', { type: 'string', demandOption: true, describe: "The coordinator's worker address: unix:/path or host:port" })
      .option('rank', wholeNumber('rank', { min: 0, demandOption: true, describe: 'This rank, from 0' }))
      .option('device', {
        type: 'string',
        requiresArg: true,
        default: 'cpu',
        describe: 'What this rank computes on: cpu, or a GPU as in cuda:0',
      })
      .option('cpus', { type: 'string', requiresArg: true, describe: "CPUs of the engine's threads, as in 0-3,8 (default: any)" })
      .option(
        'connect-timeout-ms',
        wholeNumber('connect-timeout-ms', { min: 1, default: 30_000, describe: 'How long to try to reach the coordinator' }),
      )
      .option('log-level', {
        choices: LOG_LEVELS,
        requiresArg: true,
        default: 'info',
        describe: 'Least level of the log, JSON lines on stderr',
      }) as never,
  async handler(args) {
    const cpus = args.cpus === undefined ? [] : parseCpuList(args.cpus);
    const token = process.env['TANDEM_WORKER_TOKEN'] ?? '';
    // A terminal's Ctrl-C reaches the whole process group; a supervising coordinator decides when its workers leave.
    if (token !== '') process.on('SIGINT', () => {});
    process.once('SIGTERM', () => process.exit(0));
    const end = await runWorker({
      coordinator: args.coordinator,
      rank: args.rank,
      token,
      device: parseDevice(args.device),
      cpus,
      logLevel: args.logLevel as LogLevel,
      connectTimeoutMs: args.connectTimeoutMs,
    });
    // At once: the native engine's thread may still be inside a step that nobody waits for.
    process.exit(end === 'shutdown' ? 0 : EXIT_START_AGAIN);
  },
};
