import { chmodSync, existsSync, lstatSync, readFileSync, realpathSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import type { CommandModule } from 'yargs';
import { ConfigError } from '../../common/errors.js';
import { type ApiKeyEntry, createApiKey, parseApiKeys } from '../../coordinator/access/api-keys.js';
import { ROLES, type Role } from '../../coordinator/access/caller.js';
import { decimalNumber, wholeNumber } from '../number-option.js';

interface KeyArgs {
  name: string;
  roles: string;
  weight: number | undefined;
  maxPriority: number | undefined;
  maxStreams: number | undefined;
  maxTokensPerMinute: number | undefined;
  file: string | undefined;
}

export const keyCommand: CommandModule<unknown, KeyArgs> = {
  command: 'key <action>',
  describe: 'Make an API key for "tandem serve --api-keys"',
  builder: (yargs) =>
    yargs
      .positional('action', { choices: ['new'] as const, describe: 'What to do' })
      .option('name', { type: 'string', demandOption: true, requiresArg: true, describe: 'Who it is for: up to 64 of A-Z a-z 0-9 . _ -' })
      .option('roles', { type: 'string', requiresArg: true, default: 'infer', describe: `With commas: ${ROLES.join(', ')}` })
      .option('weight', decimalNumber('weight', { describe: 'Share of the server, relative to other keys (1)' }))
      .option('max-priority', wholeNumber('max-priority', { min: 0, describe: 'Highest priority of its requests (0)' }))
      .option('max-streams', wholeNumber('max-streams', { min: 1, describe: 'Requests that may wait or run at once' }))
      .option(
        'max-tokens-per-minute',
        wholeNumber('max-tokens-per-minute', { min: 1, describe: 'Prompt and generated tokens in a minute' }),
      )
      .option('file', { type: 'string', requiresArg: true, describe: 'Add it to this file, which is made if it is not there' }) as never,
  handler({ name, roles, weight, maxPriority, maxStreams, maxTokensPerMinute, file }) {
    const { key, entry } = createApiKey({
      name,
      roles: roles.split(',').map((role) => role.trim()) as Role[],
      ...(weight === undefined ? {} : { weight }),
      ...(maxPriority === undefined ? {} : { maxPriority }),
      ...(maxStreams === undefined ? {} : { maxStreams }),
      ...(maxTokensPerMinute === undefined ? {} : { maxTokensPerMinute }),
    });
    const source = file ?? 'the new key';
    const before = file !== undefined && existsSync(file) ? parseApiKeys(readText(file), file) : [];
    const text = formatKeys([...before, entry]);
    parseApiKeys(text, source); // what serve would refuse is refused here
    if (file !== undefined) replaceFile(file, text);
    process.stdout.write(`${key}\n`);
    process.stderr.write(
      file === undefined
        ? `This is the only time that the key is shown. Add this entry to "keys" in the file of API keys:\n${JSON.stringify(entry)}\n`
        : `This is the only time that the key is shown. ${file} has its entry; a running server takes it on SIGHUP.\n`,
    );
  },
};

/** A line for each key. */
function formatKeys(keys: readonly ApiKeyEntry[]): string {
  return `{"keys":[\n${keys.map((entry) => `  ${JSON.stringify(entry)}`).join(',\n')}\n]}\n`;
}

function readText(file: string): string {
  if (!lstatSync(realpathSync(file)).isFile()) throw new ConfigError(`--file ${file} is not a regular file`);
  try {
    return readFileSync(file, 'utf8');
  } catch (error) {
    throw new ConfigError(`--file ${file} cannot be read (${(error as NodeJS.ErrnoException).code})`);
  }
}

/** The new file is complete or not there, and nobody else's to read at any time. */
function replaceFile(file: string, text: string): void {
  const target = existsSync(file) ? realpathSync(file) : file;
  const partial = `${target}.${process.pid}.partial`;
  try {
    writeFileSync(partial, text, { mode: 0o600, flag: 'wx', flush: true });
    chmodSync(partial, 0o600);
    renameSync(partial, target);
  } catch (error) {
    rmSync(partial, { force: true });
    throw new ConfigError(`--file ${file} cannot be written (${(error as NodeJS.ErrnoException).code})`);
  }
}
