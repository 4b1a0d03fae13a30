import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { createLogger } from '../../common/log.js';
import { parseModelConfig } from '../../model/model-config.js';
import { tinyModelDir } from '../../model/tiny/tiny-model.js';
import { loadTokenizer } from '../../model/tokenizer/tokenizer.js';
import { FakeEngine } from '../group/fake-engine.js';
import { DEFAULT_LIMITS, type Limits } from '../limits.js';
import { ServingLoop } from '../serving-loop.js';
import { ServingService, type ServerState } from './service.js';

export interface FakeService {
  readonly service: ServingService;
  readonly loop: ServingLoop;
  /** What `service.health` says next. */
  setHealth(state: ServerState, reason: string): void;
  close(): Promise<void>;
}

const BLOCK_SIZE = 16;

/** For tests of the APIs: everything but the workers, with the tiny model's tokenizer and an engine whose tokens are hashes of what they can see. */
export async function startFakeService(options: { readonly limits?: Limits; readonly kvBlocks?: number } = {}): Promise<FakeService> {
  const config = parseModelConfig(JSON.parse(readFileSync(join(tinyModelDir, 'config.json'), 'utf8')), 'config.json');
  const tokenizer = await loadTokenizer(join(tinyModelDir, 'tokenizer.model'), config.tokenizer!);
  const limits = options.limits ?? DEFAULT_LIMITS;
  const maxBatchTokens = config.maxSequenceLength + 256;
  const engine = new FakeEngine({
    kvBlocks: options.kvBlocks ?? 1024,
    blockSize: BLOCK_SIZE,
    maxBatchTokens,
    vocabSize: config.vocabSize,
    numLayers: config.numLayers,
  });
  const loop = new ServingLoop(
    engine,
    { ...limits, stepTokens: 256, maxBatchTokens, maxExtends: 256, contextCacheBlocks: 256 },
    createLogger('test', 'silent'),
  );
  let health: { state: ServerState; reason: string } = { state: 'ready', reason: '' };
  const service = new ServingService({
    config,
    modelName: 'tiny',
    tokenizer,
    blockSize: BLOCK_SIZE,
    limits,
    loop: () => loop,
    health: () => health,
  });
  return {
    service,
    loop,
    setHealth: (state, reason) => {
      health = { state, reason };
    },
    close: () => loop.close(),
  };
}
