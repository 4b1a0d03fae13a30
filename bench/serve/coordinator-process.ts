/**
 * The coordinator without workers and network, in a process of its own: the serving loop and service, the tiny model's tokenizer, the echo
 * engine, and `batch` clients that always have a request under way. Sends {@link CoordinatorRun} to its parent, or prints it.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import yargs from 'yargs';
import { hideBin } from 'yargs/helpers';
import { createLogger } from '../../common/log.js';
import { Generation } from '../../common/services.js';
import { LOCAL_CALLER } from '../../coordinator/access/caller.js';
import { encodeDelta, encodeFinish } from '../../coordinator/api/encode.js';
import { ServingService } from '../../coordinator/api/service.js';
import { toGenerationRequest } from '../../coordinator/api/validate.js';
import { DEFAULT_LIMITS } from '../../coordinator/limits.js';
import { ServingLoop } from '../../coordinator/serving-loop.js';
import { parseModelConfig } from '../../model/model-config.js';
import { tinyModelDir } from '../../model/tiny/tiny-model.js';
import { loadTokenizer } from '../../model/tokenizer/tokenizer.js';
import { EchoEngine } from './echo-engine.js';

/** Microseconds of each measured step. */
export interface CoordinatorRun {
  readonly betweenUs: readonly number[];
  readonly codecUs: readonly number[];
  /** Of each request: validating, tokenising and queueing it. */
  readonly submitUs: readonly number[];
}

const BLOCK_SIZE = 16;
const PROMPT_TOKENS = 32;
const NEW_TOKENS = 256;

const options = await yargs(hideBin(process.argv))
  .option('steps', { type: 'number', default: 10_000 })
  .option('warm-up', { type: 'number', default: 2_000 })
  .option('batch', { type: 'number', default: 64 })
  .strict()
  .parseAsync();

const config = parseModelConfig(JSON.parse(readFileSync(join(tinyModelDir, 'config.json'), 'utf8')), 'config.json');
const tokenizer = await loadTokenizer(join(tinyModelDir, 'tokenizer.model'), config.tokenizer!);
const maxBatchTokens = config.maxSequenceLength + options.batch;
const engine = new EchoEngine({
  kvBlocks: options.batch * Math.ceil((PROMPT_TOKENS + NEW_TOKENS) / BLOCK_SIZE + 1),
  blockSize: BLOCK_SIZE,
  maxBatchTokens,
  numLayers: config.numLayers,
  vocabSize: config.vocabSize,
  numTextPieces: config.tokenizer!.numTextPieces,
  worldSize: 2,
});
const loop = new ServingLoop(engine, { maxBatchTokens, maxExtends: options.batch, maxQueued: 1024 }, createLogger('bench', 'error'));
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
const wanted = options.warmUp + options.steps;
await Promise.all(Array.from({ length: options.batch }, (_, client) => serveClient(client)));
await loop.close();
const measured = engine.steps.slice(options.warmUp, wanted);
const run: CoordinatorRun = {
  betweenUs: measured.map(({ betweenMs }) => betweenMs * 1000),
  codecUs: measured.map(({ codecMs }) => codecMs * 1000),
  submitUs,
};
if (process.send) process.send(run, () => process.disconnect());
else {
  const sorted = measured.map(({ betweenMs, codecMs }) => (betweenMs + codecMs) * 1000).sort((a, b) => a - b);
  const median = (values: readonly number[]): string => [...values].sort((a, b) => a - b)[values.length >> 1]!.toFixed(1);
  process.stdout.write(
    `total median ${median(sorted)} us, p99 ${sorted[Math.floor(sorted.length * 0.99)]!.toFixed(1)} us; between ${median(run.betweenUs)}, codec ${median(run.codecUs)}, submit ${median(submitUs)}\n`,
  );
}

/** Requests one after another; the first ones are of different lengths, so that they do not end together. */
async function serveClient(client: number): Promise<void> {
  for (let i = 0; engine.steps.length < wanted; i++) {
    const startMs = performance.now();
    const wire = Generation.service.Generate.requestDeserialize(
      Generation.service.Generate.requestSerialize({
        ids: { ids: Array.from({ length: PROMPT_TOKENS }, (_, at) => 100 + ((client * 7919 + i * 104729 + at * 31) % 3000)) },
        mode: 'MODE_GMASK',
        temperature: 0,
        maxNewTokens: i === 0 ? 1 + Math.floor(((client + 1) * NEW_TOKENS) / options.batch) : NEW_TOKENS,
        endTokens: { ids: [] },
      }),
    );
    const ticket = service.generate(
      toGenerationRequest(wire, DEFAULT_LIMITS),
      { caller: LOCAL_CALLER, requestId: null, priority: 0, timeoutMs: null },
      (delta) => Generation.service.Generate.responseSerialize(encodeDelta(delta)),
    );
    submitUs.push((performance.now() - startMs) * 1000);
    Generation.service.Generate.responseSerialize(encodeFinish(ticket.requestId, await ticket.done));
  }
}
