/**
 * The coordinator without workers and network, in a process of its own: the serving loop and service, the tiny model's tokenizer, the echo
 * engine, and `batch` clients that always have a request under way. Sends a {@link CoordinatorRun} to its parent, or prints the medians.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import yargs from 'yargs';
import { hideBin } from 'yargs/helpers';
import { percentiles } from '../../cli/load/summary.js';
import { createLogger } from '../../common/log.js';
import { Generation } from '../../common/services.js';
import { LOCAL_CALLER } from '../../coordinator/access/caller.js';
import { encodeDelta } from '../../coordinator/api/encode-delta.js';
import { encodeFinish } from '../../coordinator/api/encode.js';
import { ServingService } from '../../coordinator/api/service.js';
import { toGenerationRequest } from '../../coordinator/api/validate.js';
import { DEFAULT_LIMITS } from '../../coordinator/limits.js';
import { ServingLoop } from '../../coordinator/serving-loop.js';
import { NO_OBSERVER, type StepStats } from '../../coordinator/status/observer.js';
import { parseModelConfig } from '../../model/model-config.js';
import { tinyModelDir } from '../../model/tiny/tiny-model.js';
import { loadTokenizer } from '../../model/tokenizer/tokenizer.js';
import type { CoordinatorRun, MemorySample } from './coordinator-run.js';
import { EchoEngine } from './echo-engine.js';

const BLOCK_SIZE = 16;

const options = await yargs(hideBin(process.argv))
  .option('steps', { type: 'number', default: 10_000, describe: 'Steps that are measured; 0: none' })
  .option('warm-up', { type: 'number', default: 2_000, describe: 'Steps before' })
  .option('requests', { type: 'number', default: 0, describe: 'Instead of steps: requests, and the memory after each tenth of them' })
  .option('batch', { type: 'number', default: 64 })
  .option('prompt-tokens', { type: 'number', default: 32 })
  .option('new-tokens', { type: 'number', default: 256 })
  .strict()
  .parseAsync();

const config = parseModelConfig(JSON.parse(readFileSync(join(tinyModelDir, 'config.json'), 'utf8')), 'config.json');
const tokenizer = await loadTokenizer(join(tinyModelDir, 'tokenizer.model'), config.tokenizer!);
const maxBatchTokens = config.maxSequenceLength + options.batch;
const kvBlocks = 2 * options.batch * Math.ceil((options.promptTokens + options.newTokens) / BLOCK_SIZE + 1);
const engine = new EchoEngine({
  kvBlocks,
  blockSize: BLOCK_SIZE,
  maxBatchTokens,
  numLayers: config.numLayers,
  vocabSize: config.vocabSize,
  numTextPieces: config.tokenizer!.numTextPieces,
  worldSize: 2,
});
const stats: StepStats[] = [];
const isMemoryRun = options.requests > 0;
const loop = new ServingLoop(
  engine,
  { ...DEFAULT_LIMITS, stepTokens: 256, maxBatchTokens, maxExtends: options.batch, contextCacheBlocks: Math.floor(kvBlocks / 2) },
  createLogger('bench', 'error'),
  { ...NO_OBSERVER, step: (step) => (isMemoryRun ? 0 : stats.push(step)) },
);
const service = new ServingService({
  config,
  modelName: 'tiny',
  tokenizer,
  blockSize: BLOCK_SIZE,
  limits: DEFAULT_LIMITS,
  loop: () => loop,
  health: () => ({ state: 'ready', reason: '' }),
});

const submitUs: number[] = [];
let requests = 0;
const memory: MemorySample[] = [];
const wantedSteps = options.warmUp + options.steps;
await Promise.all(Array.from({ length: options.batch }, (_, client) => serveClient(client)));
const { kv } = loop.snapshot();
await loop.close();

const micros = (ms: readonly number[]): number[] => ms.map((each) => each * 1000);
const measured = stats.slice(options.warmUp, wantedSteps);
const steps = engine.steps.slice(options.warmUp, wantedSteps + 1);
const run: CoordinatorRun = {
  scheduleUs: micros(measured.map(({ scheduleMs }) => scheduleMs)),
  codecUs: micros(measured.map(({ codecMs }) => codecMs)),
  emitUs: micros(measured.map(({ emitMs }) => emitMs)),
  sumUs: micros(measured.map(({ scheduleMs, codecMs, emitMs }) => scheduleMs + codecMs + emitMs)),
  wholeUs: micros(steps.slice(1).map(({ startMs }, i) => startMs - steps[i]!.startMs - steps[i]!.ranksMs)),
  submitUs,
  memory,
  leakedBlocks: kv.totalBlocks - kv.freeBlocks - kv.cachedBlocks,
};
if (process.send) process.send(run, () => process.disconnect());
else {
  for (const [name, values] of Object.entries(run)) {
    if (Array.isArray(values) && typeof values[0] === 'number') {
      const { p50, p99 } = percentiles(values as number[])!;
      process.stdout.write(`${name.padEnd(10)} median ${p50.toFixed(1)}, p99 ${p99.toFixed(1)}\n`);
    }
  }
  for (const sample of memory) process.stdout.write(`${JSON.stringify(sample)}\n`);
}

function isDone(): boolean {
  return isMemoryRun ? requests >= options.requests : stats.length > wantedSteps;
}

/** Requests one after another; the first ones are of different lengths, so that they do not end together. */
async function serveClient(client: number): Promise<void> {
  for (let i = 0; !isDone(); i++) {
    const startMs = performance.now();
    const wire = Generation.service.Generate.requestDeserialize(
      Generation.service.Generate.requestSerialize({
        ids: { ids: Array.from({ length: options.promptTokens }, (_, at) => 100 + ((client * 7919 + i * 104729 + at * 31) % 3000)) },
        mode: 'MODE_GMASK',
        temperature: 0,
        maxNewTokens: i === 0 ? 1 + Math.floor(((client + 1) * options.newTokens) / (options.batch + 1)) : options.newTokens,
        endTokens: { ids: [] },
      }),
    );
    const ticket = service.generate(
      toGenerationRequest(wire, DEFAULT_LIMITS),
      { caller: LOCAL_CALLER, requestId: null, priority: 0, timeoutMs: null },
      (delta) => encodeDelta(delta),
    );
    if (!isMemoryRun) submitUs.push((performance.now() - startMs) * 1000);
    Generation.service.Generate.responseSerialize(encodeFinish(ticket.requestId, await ticket.done));
    requests += 1;
    if (isMemoryRun) sampleMemory();
  }
}

function sampleMemory(): void {
  engine.steps.length = 0;
  if (requests > options.requests || requests % Math.ceil(options.requests / 10) !== 0) return;
  globalThis.gc?.();
  const { heapUsed, rss } = process.memoryUsage();
  memory.push({ requests, heapBytes: heapUsed, rssBytes: rss });
}
