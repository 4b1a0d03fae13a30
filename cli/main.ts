import { logVerbosity, setLogVerbosity } from '@grpc/grpc-js';
import yargs, { type CommandModule } from 'yargs';
import { hideBin } from 'yargs/helpers';
import { packageVersion } from '../common/package-root.js';
import { checkFlags, type FlagTypes } from './check-flags.js';
import { describeError, oneLine } from './describe-error.js';

/** The command line was wrong: nothing was done. */
class UsageError extends Error {}

const EXIT_FAILURE = 1;
const EXIT_USAGE = 2;
/** As a shell reports a command whose reader went away: 128 + SIGPIPE. */
const EXIT_PIPE = 141;

/** Each is loaded when it is asked for: a worker need not wait for a web server, nor an error for either. */
const COMMANDS: Readonly<Record<string, () => Promise<unknown>>> = {
  serve: async () => (await import('./commands/serve.js')).serveCommand,
  worker: async () => (await import('./commands/worker.js')).workerCommand,
  generate: async () => (await import('./commands/generate.js')).generateCommand,
  import: async () => (await import('./commands/import.js')).importCommand,
  export: async () => (await import('./commands/export.js')).exportCommand,
  inspect: async () => (await import('./commands/inspect.js')).inspectCommand,
  verify: async () => (await import('./commands/verify.js')).verifyCommand,
  plan: async () => (await import('./commands/plan.js')).planCommand,
  synth: async () => (await import('./commands/synth.js')).synthCommand,
  status: async () => (await import('./commands/status.js')).statusCommand,
  top: async () => (await import('./commands/top.js')).topCommand,
  logits: async () => (await import('./commands/logits.js')).logitsCommand,
  load: async () => (await import('./commands/load.js')).loadCommand,
  key: async () => (await import('./commands/key.js')).keyCommand,
  demo: async () => (await import('./commands/demo.js')).demoCommand,
};
const names = Object.keys(COMMANDS);
const typed = hideBin(process.argv);

if (process.env['GRPC_VERBOSITY'] === undefined) setLogVerbosity(logVerbosity.NONE); // its lines say nothing that ours do not
process.noDeprecation = true; // what Node has to say to the authors of libraries, as of TLS to an address without a name
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') process.stderr.write(`tandem: cannot write the output: ${oneLine(error.message)}\n`);
  process.exit(error.code === 'EPIPE' ? EXIT_PIPE : EXIT_FAILURE);
});

try {
  const [first = ''] = typed;
  if (!first.startsWith('-') && !names.includes(first)) {
    throw new UsageError(`${first === '' ? 'no command given' : `unknown command ${first}`}, there are ${names.join(', ')}`);
  }
  const wanted = names.includes(first) ? [first] : names;
  const commands = (await Promise.all(wanted.map((name) => COMMANDS[name]!()))) as CommandModule[];
  await yargs(typed)
    .scriptName('tandem')
    .locale('en')
    .parserConfiguration({ 'boolean-negation': false }) // or --no-repeat-ngram-size would be the negation of another flag
    .updateStrings(strings())
    .usage('$0 <command>\n\nServer for GLM-130B and models of its architecture.')
    .command(commands)
    .demandCommand(1, 'no command given')
    .strict()
    .check((parsed, types) => {
      checkFlags(parsed, types as unknown as FlagTypes, typed);
      return true;
    }, true)
    .version(packageVersion)
    .wrap(Math.min(120, process.stdout.columns ?? 100))
    .fail((message, error) => {
      throw message ? new UsageError(message) : error; // without a message it is the command that failed
    })
    .parseAsync();
} catch (error) {
  process.stderr.write(
    `tandem: ${error instanceof UsageError ? `${oneLine(error.message)} (see ${helpCommand()})` : describeError(error)}\n`,
  );
  process.exitCode = error instanceof UsageError ? EXIT_USAGE : EXIT_FAILURE;
  if (process.connected) process.disconnect(); // a parent's channel would keep this process alive
}

function helpCommand(): string {
  return names.includes(typed[0] ?? '') ? `tandem ${typed[0]} --help` : 'tandem --help';
}

/** What yargs says, on one line each and as the rest of this program would say it. */
function strings(): Record<string, string> {
  const plural = (one: string, other = one) => ({ one, other }) as unknown as string; // which the types leave out
  return {
    'Unknown argument: %s': plural('unknown argument: %s'),
    'Missing required argument: %s': plural('missing flag: --%s', 'missing flags: %s'),
    'Not enough arguments following: %s': '--%s needs a value',
    'Not enough non-option arguments: got %s, need at least %s': plural('too few arguments: %s given, %s needed'),
    'Invalid values:': ' ',
    'Argument: %s, Given: %s, Choices: %s': '--%s %s: allowed are %s',
  };
}
