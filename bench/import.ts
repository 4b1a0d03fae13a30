/**
 * `npm run bench:import`: a synthetic checkpoint of GLM-130B's tensor shapes and fewer layers, imported to INT4 from its archive in 60 parts under a
 * memory limit, next to what the disk allows; from the unpacked folder; and killed at random points. The stores have to be the same, byte for byte.
 */
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { createReadStream, existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import yargs from 'yargs';
import { hideBin } from 'yargs/helpers';
import { formatBytes, formatTable } from '../cli/format.js';
import { packageRoot } from '../common/package-root.js';
import { forgetFiles, peakResidentBytes } from './processes.js';
import { median } from './summary.js';

const options = await yargs(hideBin(process.argv))
  .scriptName('npm run bench:import --')
  .option('layers', { type: 'number', default: 2, describe: 'Layers of the checkpoint; 2 are 11 GB' })
  .option('tp', { type: 'number', default: 8, describe: 'Rank files of the checkpoint' })
  .option('memory-limit', { type: 'string', default: '1.5GiB', describe: 'What the import is told' })
  .option('repeats', { type: 'number', default: 3, describe: 'Measured imports and passes, in turn; the median is printed' })
  .option('kills', { type: 'number', default: 10, describe: 'Times that an import is killed; 0: none' })
  .option('folder', { type: 'boolean', default: true, describe: 'Import from the unpacked folder too' })
  .option('dir', {
    type: 'string',
    describe: 'Folder for the checkpoints, which are kept there (default: a temporary one, removed at the end)',
  })
  .option('json', { type: 'boolean', default: false, describe: 'Print JSON' })
  .strict()
  .parseAsync();

interface Run {
  readonly seconds: number;
  /** VmHWM: the most that was resident at once. */
  readonly peakBytes: number;
  readonly killed: boolean;
  readonly stdout: string;
}

const PIECE_BYTES = 8 * 2 ** 20;
if (options.dir !== undefined) mkdirSync(options.dir, { recursive: true });
const scratch = mkdtempSync(join(options.dir ?? tmpdir(), 'tandem-bench-import-'));
process.once('exit', () => rmSync(scratch, { recursive: true, force: true }));
const sources = options.dir ?? scratch;
const archive = join(sources, `archive-${options.layers}-${options.tp}`);
const folder = join(sources, `folder-${options.layers}-${options.tp}`);

await synthesise(archive, ['--archive-parts', '60']);
const parts = readdirSync(archive)
  .filter((name) => name.includes('.part_'))
  .sort()
  .map((name) => join(archive, name));
const sourceBytes = parts.reduce((sum, path) => sum + statSync(path).size, 0);

const imports: Run[] = [];
const passes: number[] = [];
const reads: number[] = [];
let expected = '';
let storeBytes = 0;
for (let i = 0; i < options.repeats; i++) {
  progress(`import ${i + 1} of ${options.repeats}`);
  forgetFiles(parts);
  const store = join(scratch, 'store');
  imports.push(await runImport(join(archive, '*.part_*'), store));
  storeBytes = bytesOf(store);
  if (i === 0) expected = await digestOf(store);
  rmSync(store, { recursive: true });
  progress('the disk alone');
  forgetFiles(parts);
  passes.push(await pass(parts, storeBytes));
  forgetFiles(parts);
  reads.push(await pass(parts, 0));
}
const fromFolder = options.folder ? await importFolder() : null;
const killed = options.kills > 0 ? await killAndResume() : null;
report();

async function synthesise(to: string, more: readonly string[]): Promise<void> {
  if (existsSync(to)) return;
  progress(`writing ${to}`);
  mkdirSync(sources, { recursive: true });
  await tandem(['synth', to, '--shape', 'glm-130b', '--layers', String(options.layers), '--tp', String(options.tp), ...more]);
}

async function runImport(from: string, to: string, killAfterMs: number | null = null): Promise<Run> {
  return tandem(['import', '--from', from, '--to', to, '--quantize', 'int4', '--memory-limit', options.memoryLimit], killAfterMs);
}

async function importFolder(): Promise<boolean> {
  await synthesise(folder, []);
  progress('import from the folder');
  const store = join(scratch, 'store');
  await runImport(folder, store);
  const isSame = (await digestOf(store)) === expected;
  rmSync(store, { recursive: true });
  return isSame;
}

/** Each kill comes somewhere in what is left, had the import been alone. */
async function killAndResume(): Promise<{ kills: number; isSame: boolean; lastOutput: string }> {
  const store = join(scratch, 'store');
  const usualMs = median(imports.map(({ seconds }) => seconds)) * 1000;
  let kills = 0;
  let last: Run;
  do {
    progress(`kill ${kills + 1} of ${options.kills}`);
    last = await runImport(
      join(archive, '*.part_*'),
      store,
      kills < options.kills ? 500 + Math.random() * (usualMs / options.kills) : null,
    );
    if (last.killed) kills++;
  } while (last.killed);
  const result = { kills, isSame: (await digestOf(store)) === expected, lastOutput: last.stdout.trim() };
  rmSync(store, { recursive: true });
  return result;
}

async function tandem(args: readonly string[], killAfterMs: number | null = null): Promise<Run> {
  const started = performance.now();
  const child = spawn(process.execPath, [join(packageRoot, 'bin/tandem'), ...args], { stdio: ['ignore', 'pipe', 'inherit'] });
  let stdout = '';
  child.stdout.on('data', (chunk) => (stdout += String(chunk)));
  const closed = once(child, 'close') as Promise<[number | null, NodeJS.Signals | null]>;
  let ended = false;
  void closed.then(() => (ended = true));
  let peakBytes = 0;
  while (!ended) {
    peakBytes = Math.max(peakBytes, peakResidentBytes(child.pid!));
    if (killAfterMs !== null && performance.now() - started > killAfterMs) child.kill('SIGKILL');
    await Promise.race([closed, sleep(20)]);
  }
  const [code, signal] = await closed;
  if (code !== 0 && signal !== 'SIGKILL') throw new Error(`tandem ${args.join(' ')} ended with ${code ?? signal}`);
  return { seconds: (performance.now() - started) / 1000, peakBytes, killed: signal !== null, stdout };
}

/** Reads all of `paths` and writes `writtenBytes` at the same time, synced at the end; computes nothing. @returns seconds */
async function pass(paths: readonly string[], writtenBytes: number): Promise<number> {
  const target = join(scratch, 'pass');
  const buffers = [Buffer.alloc(PIECE_BYTES, 1), Buffer.alloc(PIECE_BYTES, 2)] as const;
  const read = async (): Promise<void> => {
    for (const path of paths) {
      const handle = await open(path);
      while ((await handle.read(buffers[0], 0, PIECE_BYTES)).bytesRead > 0);
      await handle.close();
    }
  };
  const write = async (): Promise<void> => {
    const handle = await open(target, 'w');
    for (let left = writtenBytes; left > 0; left -= PIECE_BYTES) await handle.write(buffers[1], 0, Math.min(left, PIECE_BYTES));
    await handle.sync();
    await handle.close();
  };
  const started = performance.now();
  await Promise.all([read(), write()]);
  const seconds = (performance.now() - started) / 1000;
  rmSync(target);
  return seconds;
}

async function digestOf(store: string): Promise<string> {
  const hash = createHash('sha256');
  for (const name of readdirSync(store).sort()) {
    hash.update(`${name}\0`);
    for await (const chunk of createReadStream(join(store, name), { highWaterMark: PIECE_BYTES })) hash.update(chunk as Buffer);
  }
  return hash.digest('hex');
}

function bytesOf(dir: string): number {
  return readdirSync(dir).reduce((sum, name) => sum + statSync(join(dir, name)).size, 0);
}

function report(): void {
  const seconds = median(imports.map((run) => run.seconds));
  const peakBytes = Math.max(...imports.map((run) => run.peakBytes));
  const [passSeconds, readSeconds] = [median(passes), median(reads)];
  const slowest = Math.max(passSeconds, readSeconds);
  const result = { sourceBytes, storeBytes, seconds, readSeconds, passSeconds, share: slowest / seconds, peakBytes, fromFolder, killed };
  if (options.json) {
    process.stdout.write(`${JSON.stringify(result, null, 2)}\n`);
    return;
  }
  const rate = (value: number): string => `${(sourceBytes / 1e9 / value).toFixed(2)} GB/s`;
  const rows = [
    ['read the archive', readSeconds.toFixed(1), rate(readSeconds)],
    ['read it and write as many bytes as the store has, at once', passSeconds.toFixed(1), rate(passSeconds)],
    ['import to INT4', seconds.toFixed(1), rate(seconds)],
  ];
  const same = (isSame: boolean): string => (isSame ? 'the same store, byte for byte' : 'ANOTHER STORE');
  const lines = [
    `${cpus()[0]?.model ?? 'unknown'}, ${cpus().length} cores; medians of ${options.repeats}, from the disk`,
    `${options.layers} layers in ${options.tp} ranks and ${parts.length} parts: ${formatBytes(sourceBytes)}; store ${formatBytes(storeBytes)}`,
    '',
    formatTable(['', 's', 'of the archive'], rows),
    '',
    `import at ${(result.share * 100).toFixed(0)} % of the slower limit; peak memory ${formatBytes(peakBytes)}, told ${options.memoryLimit}`,
    ...(fromFolder === null ? [] : [`from the folder: ${same(fromFolder)}`]),
    ...(killed === null ? [] : [`killed ${killed.kills} times: ${same(killed.isSame)}; ${killed.lastOutput}`]),
  ];
  process.stdout.write(`${lines.join('\n')}\n`);
  if (fromFolder === false || killed?.isSame === false) process.exitCode = 1;
}

function progress(message: string): void {
  process.stderr.write(`bench: ${message}\n`);
}
