/**
 * `npm run bench:load`: two workers load a synthetic INT4 store of 6 GB from the disk, next to a plain read of the same bytes: seconds, and the memory that
 * each worker needs beside the weights themselves.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import yargs from 'yargs';
import { hideBin } from 'yargs/helpers';
import { formatBytes, formatTable } from '../cli/format.js';
import { packageRoot } from '../common/package-root.js';
import { forgetFiles, peakResidentBytes } from './processes.js';
import { SYNTHETIC_CONFIG, writeSyntheticStore } from './synthetic-store.js';
import { median } from './summary.js';

const options = await yargs(hideBin(process.argv))
  .scriptName('npm run bench:load --')
  .option('layers', { type: 'number', default: 26, describe: 'Layers of the store; 26 are 6 GB' })
  .option('workers', { type: 'number', default: 2, describe: 'Ranks that load their shares at once' })
  .option('repeats', { type: 'number', default: 3, describe: 'Measured loads and reads, in turn; medians are printed' })
  .option('dir', { type: 'string', describe: 'Folder for the store, which is kept there (default: a temporary one, removed at the end)' })
  .strict()
  .parseAsync();

interface Load {
  readonly seconds: number;
  /** Of the worker that needs most: resident at its peak, without the weights. */
  readonly extraBytes: number;
}

const PIECE_BYTES = 8 * 2 ** 20;
if (options.dir !== undefined) mkdirSync(options.dir, { recursive: true });
const scratch = mkdtempSync(join(options.dir ?? tmpdir(), 'tandem-bench-load-'));
process.once('exit', () => rmSync(scratch, { recursive: true, force: true }));
const store = join(options.dir ?? scratch, `store-${options.layers}`);
if (!existsSync(store)) {
  process.stderr.write(`bench: writing ${store}\n`);
  const shape = { hiddenSize: 6144, numAttentionHeads: 48, innerHiddenSize: 16384, vocabSize: 32768 };
  await writeSyntheticStore(store, { ...SYNTHETIC_CONFIG, ...shape, numLayers: options.layers });
}
const files = readdirSync(store)
  .filter((name) => name.endsWith('.safetensors'))
  .map((name) => join(store, name));
const bytes = files.reduce((sum, file) => sum + statSync(file).size, 0);

const loads: Load[] = [];
const reads: number[] = [];
for (let repeat = 0; repeat < options.repeats; repeat++) {
  process.stderr.write(`bench: round ${repeat + 1} of ${options.repeats}\n`);
  forgetFiles(files);
  reads.push(await readAll());
  forgetFiles(files);
  loads.push(await load());
}
const [readSeconds, loadSeconds] = [median(reads), median(loads.map(({ seconds }) => seconds))];
const ratio = median(loads.map(({ seconds }, i) => seconds / reads[i]!));
const rate = (seconds: number): string => `${(bytes / 1e9 / seconds).toFixed(2)} GB/s`;
process.stdout.write(
  [
    `${cpus()[0]?.model ?? 'unknown'}, ${cpus().length} cores; medians of ${options.repeats}, from the disk; store of ${formatBytes(bytes)}`,
    '',
    formatTable(
      ['', 's', 'of the store'],
      [
        ['read it', readSeconds.toFixed(1), rate(readSeconds)],
        [`${options.workers} workers load and pack it`, loadSeconds.toFixed(1), rate(loadSeconds)],
      ],
    ),
    '',
    `loading takes ${ratio.toFixed(2)} times the read; a worker needs ${formatBytes(Math.max(...loads.map(({ extraBytes }) => extraBytes)))} beside the weights at most`,
    '',
  ].join('\n'),
);

async function readAll(): Promise<number> {
  const buffer = Buffer.alloc(PIECE_BYTES);
  const started = performance.now();
  for (const file of files) {
    const handle = await open(file);
    while ((await handle.read(buffer, 0, PIECE_BYTES)).bytesRead > 0);
    await handle.close();
  }
  return (performance.now() - started) / 1000;
}

/** From the assignment to the last rank that is ready. */
async function load(): Promise<Load> {
  const address = `unix:${join(scratch, 'api.sock')}`;
  const flags = [
    '--model',
    store,
    '--world-size',
    String(options.workers),
    '--kv-blocks',
    '128',
    '--listen',
    address,
    '--http-listen',
    'off',
  ];
  const server = spawn(process.execPath, [join(packageRoot, 'bin/tandem'), 'serve', ...flags, '--log-level', 'debug'], {
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  const ended = once(server, 'exit');
  const loaded: { loadMs: number; extraBytes: number }[] = [];
  const pids = new Map<number, number>();
  let last = '';
  createInterface({ input: server.stderr }).on('line', (line) => {
    last = line;
    const { msg, rank, pid, loadMs, weightBytes } = parsed(line);
    if (msg === 'worker attached') pids.set(rank!, pid!);
    if (msg !== 'shard loaded' || weightBytes === undefined) return; // the coordinator has such a line, too
    loaded.push({ loadMs: loadMs!, extraBytes: peakResidentBytes(pids.get(rank!)!) - weightBytes }); // the KV cache takes pages when it is used
  });
  while (loaded.length < options.workers) {
    if (server.exitCode !== null) throw new Error(`the server ended: ${last}`);
    await sleep(20);
  }
  await stop(server, ended);
  return {
    seconds: Math.max(...loaded.map(({ loadMs }) => loadMs)) / 1000,
    extraBytes: Math.max(...loaded.map(({ extraBytes }) => extraBytes)),
  };
}

async function stop(server: ChildProcess, ended: Promise<unknown>): Promise<void> {
  server.kill('SIGTERM');
  await ended;
}

interface LogLine {
  readonly msg?: string;
  readonly rank?: number;
  readonly pid?: number;
  readonly loadMs?: number;
  readonly weightBytes?: number;
}

function parsed(line: string): LogLine {
  return line.startsWith('{') ? (JSON.parse(line) as LogLine) : {};
}
