/** `npm run bench`: this project and its peer in turn, next to what the machine can do; the project's performance record. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import yargs from 'yargs';
import { hideBin } from 'yargs/helpers';
import { describeError } from '../cli/describe-error.js';
import { wholeNumber } from '../cli/number-option.js';
import { ConfigError } from '../common/errors.js';
import { packageRoot } from '../common/package-root.js';
import { loadAddon, type NativeAddon } from '../native/binding/addon.js';
import { measureLimits } from './machine.js';
import { measureCase } from './measure-case.js';
import { CASE_NAMES, CASE_TITLES, prepareCase, type CaseName } from './model-cases.js';
import { installPeer } from './peer/install-peer.js';
import { compareRuns, readRecord, recordFile, writeRecord, type RecordedRun } from './record.js';
import { renderComparisons, renderMarkdown, renderText, replaceSection } from './report.js';
import { summarize, type CaseSummary } from './summary.js';

/** Share of the processors' time that nobody minds. */
const MOST_OTHER_LOAD = 0.1;
const documentFile = join(packageRoot, 'docs', 'performance.md');
const progress = (message: string): void => void process.stderr.write(`bench: ${message}\n`);

try {
  process.exitCode = await main();
} catch (error) {
  process.stderr.write(`bench: ${describeError(error)}\n`);
  process.exitCode = 1;
}

async function main(): Promise<number> {
  const options = await parseOptions();
  const only = chosenCases(options.only);
  if (options.record && (options.only !== undefined || options.check))
    throw new ConfigError('--record is for whole runs: without --only, and without --check');
  const addon = loadAddon();
  const { isa } = addon.build;
  const recorded = readRecord()[isa];
  if (options.check && recorded === undefined)
    throw new ConfigError(`${recordFile} has nothing of ${isa} to check against; --record makes it`);

  const withPeer = only.includes('peer') && options.peer && (await peerIsThere());
  const run: RecordedRun = {
    date: new Date().toISOString().slice(0, 10),
    cpu: `${cpus()[0]?.model.trim() ?? 'unknown'}, ${cpus().length} processors`,
    compiler: addon.build.compiler,
    node: process.versions.node,
    repeats: options.repeats,
    cases: await measureCases(only, { addon, withPeer, repeats: options.repeats }),
  };
  const comparisons = options.check ? compareRuns(recorded!, run, options.tolerance / 100) : [];

  if (options.json) process.stdout.write(`${JSON.stringify({ isa, ...run, ...(options.check ? { comparisons } : {}) }, null, 2)}\n`);
  else process.stdout.write(`${renderText(isa, run)}\n`);
  const otherLoad = Math.max(...Object.values(run.cases).map((summary) => summary.otherLoad ?? 0));
  if (otherLoad > MOST_OTHER_LOAD)
    progress(`other work took up to ${(otherLoad * 100).toFixed(0)} % of the processors: do not rely on these figures`);
  if (options.record) {
    const record = { ...readRecord(), [isa]: run };
    writeRecord(record);
    writeFileSync(documentFile, replaceSection(readFileSync(documentFile, 'utf8'), renderMarkdown(record)));
    progress(`written to ${recordFile} and ${documentFile}`);
  }
  if (!options.check) return 0;
  if (recorded!.cpu !== run.cpu) progress(`the record is of another machine: ${recorded!.cpu}, ${recorded!.date}`);
  if (!options.json) process.stdout.write(`\n${renderComparisons(comparisons)}\n`);
  if (comparisons.length === 0) throw new ConfigError('the record and this run have no ratio in common');
  const fallen = comparisons.filter(({ hasFallen }) => hasFallen);
  for (const { what, recorded: was, now } of fallen) {
    progress(`${what} has fallen from ${was.toFixed(3)} to ${now.toFixed(3)}, by more than ${options.tolerance} %`);
  }
  return fallen.length > 0 ? 1 : 0;
}

interface BenchOptions {
  readonly only: string | undefined;
  readonly repeats: number;
  readonly peer: boolean;
  readonly json: boolean;
  readonly record: boolean;
  readonly check: boolean;
  readonly tolerance: number;
}

async function parseOptions(): Promise<BenchOptions> {
  const cases = CASE_NAMES.map((name) => `${name} (${CASE_TITLES[name]})`).join(', ');
  const options = await yargs(hideBin(process.argv))
    .scriptName('npm run bench --')
    .usage('$0 [options]\n\nMeasures decoding, prefill and a batch of streams, of each model in turn.')
    .option('only', { type: 'string', requiresArg: true, describe: `Models, with commas: ${cases}; all without it` })
    .option('repeats', wholeNumber('repeats', { min: 1, max: 100, default: 3, describe: 'Rounds of each model; medians are printed' }))
    .option('peer', { type: 'boolean', default: true, describe: 'Run llama.cpp beside the model "peer"; installed on first use' })
    .option('json', { type: 'boolean', default: false, describe: 'Print JSON' })
    .option('record', { type: 'boolean', default: false, describe: 'Write bench/record.json and the measured part of docs/performance.md' })
    .option('check', {
      type: 'boolean',
      default: false,
      describe: 'Compare the ratios with those of bench/record.json; status 1 where one has fallen',
    })
    .option(
      'tolerance',
      wholeNumber('tolerance', { min: 0, max: 100, default: 15, describe: 'Percent by which a ratio may fall in --check' }),
    )
    .strict()
    .version(false)
    .fail((message, error) => {
      throw error === undefined || error.name === 'YError' ? new ConfigError(message) : error;
    })
    .parseAsync();
  return options as unknown as BenchOptions;
}

function chosenCases(only: string | undefined): readonly CaseName[] {
  if (only === undefined) return CASE_NAMES;
  const chosen = only.split(',').map((name) => name.trim());
  const unknown = chosen.find((name) => !CASE_NAMES.some((known) => known === name));
  if (unknown !== undefined) throw new ConfigError(`--only ${unknown}: there is ${CASE_NAMES.join(', ')}`);
  return CASE_NAMES.filter((name) => chosen.includes(name));
}

async function peerIsThere(): Promise<boolean> {
  try {
    await installPeer(progress);
    return true;
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    progress(`without the peer: ${error.message}`);
    return false;
  }
}

interface Measuring {
  readonly addon: NativeAddon;
  readonly withPeer: boolean;
  readonly repeats: number;
}

async function measureCases(
  names: readonly CaseName[],
  { addon, withPeer, repeats }: Measuring,
): Promise<Partial<Record<CaseName, CaseSummary>>> {
  const scratch = mkdtempSync(join(tmpdir(), 'tandem-bench-'));
  const remove = (): void => rmSync(scratch, { recursive: true, force: true });
  process.once('exit', remove);
  const summaries: Partial<Record<CaseName, CaseSummary>> = {};
  for (const name of names) {
    const modelCase = await prepareCase(name, { scratch, withPeer, progress });
    summaries[name] = summarize(modelCase, await measureCase(modelCase, { repeats, progress, measureLimits: () => measureLimits(addon) }));
  }
  return summaries;
}
