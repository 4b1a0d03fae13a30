import { status, type ServiceError } from '@grpc/grpc-js';
import yargs from 'yargs';
import { hideBin } from 'yargs/helpers';
import { TandemError } from '../common/errors.js';
import { packageVersion } from '../common/package-root.js';
import { demoCommand } from './commands/demo.js';
import { generateCommand } from './commands/generate.js';
import { importCommand } from './commands/import.js';
import { inspectCommand } from './commands/inspect.js';
import { logitsCommand } from './commands/logits.js';
import { serveCommand } from './commands/serve.js';
import { statusCommand } from './commands/status.js';
import { workerCommand } from './commands/worker.js';

/** The command line was wrong: nothing was done. */
class UsageError extends Error {}

const EXIT_FAILURE = 1;
const EXIT_USAGE = 2;

try {
  await yargs(hideBin(process.argv))
    .scriptName('tandem')
    .locale('en')
    .usage('$0 <command>\n\nServer for GLM-130B and models of its architecture.')
    .command(serveCommand)
    .command(workerCommand)
    .command(generateCommand)
    .command(importCommand)
    .command(inspectCommand)
    .command(statusCommand)
    .command(logitsCommand)
    .command(demoCommand)
    .demandCommand(1, 'no command given')
    .recommendCommands()
    .strict()
    .version(packageVersion)
    .wrap(Math.min(120, process.stdout.columns ?? 100))
    .fail((message, error) => {
      throw error ?? new UsageError(message);
    })
    .parseAsync();
} catch (error) {
  process.stderr.write(`tandem: ${describe(error)}\n`);
  process.exitCode = error instanceof UsageError ? EXIT_USAGE : EXIT_FAILURE;
  if (process.connected) process.disconnect(); // a parent's channel would keep this process alive
}

/** One line for whatever ended the command; a stack only for what is a defect of this program. */
function describe(error: unknown): string {
  if (error instanceof UsageError) return `${oneLine(error.message)} (see tandem --help)`;
  if (error instanceof TandemError) return oneLine(error.message);
  if (isServiceError(error)) return oneLine(`${status[error.code]}: ${error.details || error.message}`);
  if (error instanceof Error && 'code' in error && typeof error.code === 'string') return oneLine(error.message); // of the operating system
  return error instanceof Error ? (error.stack ?? error.message) : String(error);
}

function oneLine(message: string): string {
  return message.replaceAll(/\s*\n\s*/g, '; ');
}

function isServiceError(error: unknown): error is ServiceError {
  return error instanceof Error && 'details' in error && typeof (error as Partial<ServiceError>).code === 'number';
}
