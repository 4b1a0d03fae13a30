/** `npm run bench:serve`: what the server does with many clients. Every part can be run by itself. */
import { mkdtempSync, rmSync } from 'node:fs';
import { cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import yargs from 'yargs';
import { hideBin } from 'yargs/helpers';
import { describeError } from '../../cli/describe-error.js';
import { formatTable } from '../../cli/format.js';
import { ConfigError } from '../../common/errors.js';
import { ahead } from './ahead.js';
import { coordinator } from './coordinator.js';
import { equal } from './equal.js';
import { fairness } from './fairness.js';
import { longPrompt } from './long-prompt.js';
import { memory } from './memory.js';
import { SkippedError, type BenchContext, type Part, type PartReport } from './part.js';
import { streams } from './streams.js';
import { vanish } from './vanish.js';

const PARTS: readonly Part[] = [streams, ahead, coordinator, memory, longPrompt, vanish, equal, fairness];
const names = PARTS.map(({ name }) => name);

const options = await yargs(hideBin(process.argv))
  .scriptName('npm run bench:serve --')
  .option('only', { type: 'string', describe: `Parts to run, with commas: ${names.join(',')} (default: all)` })
  .option('repeats', { type: 'number', default: 3, describe: 'Runs of each measurement; the median is printed' })
  .option('json', { type: 'boolean', default: false, describe: 'Print JSON' })
  .strict()
  .parseAsync();

const scratch = mkdtempSync(join(tmpdir(), 'tandem-bench-serve-'));
process.once('exit', () => rmSync(scratch, { recursive: true, force: true }));
const context: BenchContext = {
  repeats: options.repeats,
  scratch,
  progress: (message) => void process.stderr.write(`bench: ${message}\n`),
};

const cpu = `${cpus()[0]?.model ?? 'unknown'}, ${cpus().length} processors`;
const reports: Record<string, object> = {};
if (!options.json) process.stdout.write(`${cpu}; medians of ${options.repeats}\n`);
for (const part of chosen(options.only)) {
  const startMs = performance.now();
  try {
    const report = await part.run(context);
    const seconds = (performance.now() - startMs) / 1000;
    reports[part.name] = { title: part.title, seconds, failures: report.failures, ...report.data };
    if (!options.json) process.stdout.write(format(part, report, seconds));
    if (report.failures.length > 0) process.exitCode = 1;
  } catch (error) {
    const isSkipped = error instanceof SkippedError;
    const reason = describeError(error);
    reports[part.name] = { title: part.title, ...(isSkipped ? { skipped: error.message } : { failures: [reason] }) };
    if (!isSkipped) process.exitCode = 1; // the other parts are run all the same
    if (!options.json) process.stdout.write(`\n${part.name}: ${isSkipped ? `SKIPPED, ${error.message}` : `FAILED, ${reason}`}\n`);
  }
}
if (options.json) {
  process.stdout.write(`${JSON.stringify({ schema: 'tandem.bench-serve/1', cpu, repeats: options.repeats, parts: reports }, null, 2)}\n`);
}

/** @throws ConfigError */
function chosen(only: string | undefined): readonly Part[] {
  if (only === undefined) return PARTS;
  const wanted = only.split(',').map((name) => name.trim());
  const unknown = wanted.find((name) => !names.includes(name));
  if (unknown !== undefined) throw new ConfigError(`--only ${unknown}: there are ${names.join(', ')}`);
  return PARTS.filter(({ name }) => wanted.includes(name));
}

function format({ name, title }: Part, { header, rows, notes, failures }: PartReport, seconds: number): string {
  const lines = [
    '',
    `${name}: ${title} (${seconds.toFixed(0)} s)`,
    formatTable(header, rows),
    ...notes.map((note) => `- ${note}`),
    ...failures.map((failure) => `FAILED: ${failure}`),
  ];
  return `${lines.join('\n')}\n`;
}
