/** `npm run bench`: decode and prefill rates of the tiny and of a synthetic INT4 model, next to what this machine's memory can do. */
import { mkdtempSync, rmSync } from 'node:fs';
import { cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import yargs from 'yargs';
import { hideBin } from 'yargs/helpers';
import type { TandemClient } from '../cli/client.js';
import { formatTable } from '../cli/format.js';
import { startLocalCluster } from '../cli/local-cluster.js';
import { openStore } from '../model/store/open-store.js';
import { ensureTinyStore } from '../model/tiny/tiny-model.js';
import { loadAddon } from '../native/binding/addon.js';
import { SYNTHETIC_CONFIG, writeSyntheticStore } from './synthetic-store.js';

interface ModelCase {
  readonly name: string;
  readonly dir: string;
  readonly bytesPerToken: number;
  readonly vocabSize: number;
  readonly prefillTokens: number;
  readonly decodeTokens: number;
}

interface Measurement {
  readonly model: string;
  readonly workers: number;
  readonly threadsPerWorker: number;
  readonly prefillTokens: number;
  /** Medians over the repeats. */
  readonly prefillTokensPerSecond: number;
  readonly decodeTokensPerSecond: number;
  readonly batch8TokensPerSecond: number;
  readonly bytesPerToken: number;
  /** Mean step of one stream, its prefill of 16 tokens included: all of it, what the slowest rank computes, and its collectives. */
  readonly stepMs: { readonly total: number; readonly compute: number; readonly collectives: number };
  /** Weight bytes that decoding reads per second, as a fraction of the read bandwidth of as many threads. */
  readonly decodeBandwidthFraction: number;
}

const LAYOUTS = [
  { workers: 1, threads: 2 },
  { workers: 2, threads: 1 },
] as const;
const BANDWIDTH_BYTES = 512 * 1024 * 1024;
const BATCH = 8;

const options = await yargs(hideBin(process.argv))
  .scriptName('npm run bench --')
  .option('json', { type: 'boolean', default: false, describe: 'Print JSON' })
  .option('repeats', { type: 'number', default: 3, describe: 'Runs of each measurement; the median is printed' })
  .option('model', { choices: ['tiny', 'synthetic', 'both'] as const, default: 'both' as const })
  .strict()
  .parseAsync();

const addon = loadAddon();
const bandwidth = {
  oneThread: await addon.measureReadBandwidth({ bytes: BANDWIDTH_BYTES, threads: 1, repeats: 8 }),
  twoThreads: await addon.measureReadBandwidth({ bytes: BANDWIDTH_BYTES, threads: 2, repeats: 8 }),
};
progress(`memory read bandwidth: ${gigabytes(bandwidth.oneThread)} GB/s with 1 thread, ${gigabytes(bandwidth.twoThreads)} GB/s with 2`);

const scratch = mkdtempSync(join(tmpdir(), 'tandem-bench-'));
process.once('exit', () => rmSync(scratch, { recursive: true, force: true }));
const measurements: Measurement[] = [];
if (options.model !== 'synthetic') measurements.push(...(await measureModel(await tinyCase())));
if (options.model !== 'tiny') measurements.push(...(await measureModel(await syntheticCase())));
report();

async function tinyCase(): Promise<ModelCase> {
  const dir = await ensureTinyStore();
  const { tensors, config } = await openStore(dir);
  const bytesPerToken = tensors.reduce((sum, { bytes }) => sum + bytes, 0);
  return { name: 'tiny, FP16', dir, bytesPerToken, vocabSize: config.vocabSize, prefillTokens: 256, decodeTokens: 200 };
}

async function syntheticCase(): Promise<ModelCase> {
  progress('writing the synthetic model');
  const dir = join(scratch, 'synthetic');
  const bytesPerToken = await writeSyntheticStore(dir, SYNTHETIC_CONFIG);
  return { name: 'synthetic, INT4', dir, bytesPerToken, vocabSize: SYNTHETIC_CONFIG.vocabSize, prefillTokens: 512, decodeTokens: 24 };
}

async function measureModel(model: ModelCase): Promise<Measurement[]> {
  const results: Measurement[] = [];
  for (const { workers, threads } of LAYOUTS) {
    progress(`${model.name}: ${workers} worker(s) x ${threads} thread(s)`);
    const cluster = await startLocalCluster({ model: model.dir, worldSize: workers, threads });
    try {
      const { client } = cluster;
      await measureOnce(client, model, 1); // warms caches and page tables up
      const runs = [];
      for (let i = 0; i < options.repeats; i++) runs.push(await measureOnce(client, model, i + 2));
      const decode = median(runs.map((run) => run.decode));
      results.push({
        model: model.name,
        workers,
        threadsPerWorker: threads,
        prefillTokens: model.prefillTokens,
        prefillTokensPerSecond: median(runs.map((run) => run.prefill)),
        decodeTokensPerSecond: decode,
        batch8TokensPerSecond: median(runs.map((run) => run.batch)),
        bytesPerToken: model.bytesPerToken,
        stepMs: {
          total: median(runs.map((run) => run.stepMs)),
          compute: median(runs.map((run) => run.computeMs)),
          collectives: median(runs.map((run) => run.collectiveMs)),
        },
        decodeBandwidthFraction: (decode * model.bytesPerToken) / bandwidth.twoThreads,
      });
    } finally {
      await cluster.close();
    }
  }
  return results;
}

async function measureOnce(client: TandemClient, model: ModelCase, seed: number) {
  const prefill = await generate(client, model, model.prefillTokens - 2, 1, seed); // [gMASK] and <sop> make up the rest
  const before = (await client.status()).totals!;
  const single = await generate(client, model, 14, model.decodeTokens, seed);
  const after = (await client.status()).totals!;
  const steps = after.steps - before.steps;
  const start = performance.now();
  const batch = await Promise.all(Array.from({ length: BATCH }, (_, i) => generate(client, model, 14, model.decodeTokens, seed * 100 + i)));
  const batchMs = performance.now() - start - Math.max(...batch.map((each) => each.prefillMs));
  return {
    prefill: (model.prefillTokens * 1000) / prefill.prefillMs,
    decode: ((model.decodeTokens - 1) * 1000) / single.decodeMs,
    stepMs: (single.prefillMs + single.decodeMs) / steps,
    computeMs: ((after.stepSeconds - before.stepSeconds) * 1000) / steps,
    collectiveMs: ((after.collectiveSeconds - before.collectiveSeconds) * 1000) / steps,
    batch: (BATCH * (model.decodeTokens - 1) * 1000) / batchMs,
  };
}

/** A random prompt, and exactly `newTokens` greedy ones after it. */
async function generate(client: TandemClient, model: ModelCase, promptTokens: number, newTokens: number, seed: number) {
  const ids = Array.from({ length: promptTokens }, (_, i) => 100 + ((seed * 7919 + i * 104729) % Math.min(3000, model.vocabSize - 200)));
  const finish = await client.generate({
    ids: { ids },
    mode: 'MODE_GMASK',
    temperature: 0,
    maxNewTokens: newTokens,
    endTokens: { ids: [] },
  });
  if (finish.usage!.generatedTokens !== newTokens) throw new Error(`${finish.usage!.generatedTokens} tokens instead of ${newTokens}`);
  return finish.timings!;
}

function report(): void {
  const cpu = cpus()[0]?.model ?? 'unknown';
  if (options.json) {
    const { isa, compiler } = addon.build;
    process.stdout.write(`${JSON.stringify({ cpu, isa, compiler, readBandwidthBytesPerSecond: bandwidth, measurements }, null, 2)}\n`);
    return;
  }
  const rows = measurements.map((each) => [
    each.model,
    `${each.workers} x ${each.threadsPerWorker}`,
    `${each.prefillTokensPerSecond.toFixed(1)} (${each.prefillTokens})`,
    each.decodeTokensPerSecond.toFixed(2),
    each.batch8TokensPerSecond.toFixed(2),
    `${(each.bytesPerToken / 1e6).toFixed(1)} MB`,
    `${gigabytes(each.decodeTokensPerSecond * each.bytesPerToken)} GB/s`,
    `${(each.decodeBandwidthFraction * 100).toFixed(0)}%`,
    [each.stepMs.total, each.stepMs.compute, each.stepMs.collectives].map((ms) => ms.toFixed(2)).join(' / '),
  ]);
  const header = [
    'model',
    'workers x threads',
    'prefill tok/s (tokens)',
    'decode tok/s',
    `decode tok/s, ${BATCH} streams`,
    'weights per token',
    'decode reads',
    'of bandwidth',
    'mean step / compute / collectives ms',
  ];
  process.stdout.write(
    `${cpu}, ${addon.build.isa}; medians of ${options.repeats}\n` +
      `memory read bandwidth: ${gigabytes(bandwidth.oneThread)} GB/s with 1 thread, ${gigabytes(bandwidth.twoThreads)} GB/s with 2\n\n` +
      `${formatTable(header, rows)}\n`,
  );
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)]!;
}

function gigabytes(bytesPerSecond: number): string {
  return (bytesPerSecond / 1e9).toFixed(1);
}

function progress(message: string): void {
  process.stderr.write(`bench: ${message}\n`);
}
