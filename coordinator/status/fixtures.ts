/** A step, a request and a server for the tests of status and metrics. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseModelConfig } from '../../model/model-config.js';
import { tinyModelDir } from '../../model/tiny/tiny-model.js';
import { EMPTY_LOOP, type LoopSnapshot } from './loop-snapshot.js';
import type { RequestStats, StepStats } from './observer.js';
import { ServingStats } from './serving-stats.js';
import type { StatusSources } from './snapshot.js';

export const STEP: StepStats = {
  scheduleMs: 1,
  wireMs: 2,
  codecMs: 1,
  computeMs: 10,
  allReduceMs: 4,
  sampleMs: 2,
  emitMs: 1,
  ranks: [
    { computeMs: 14, collectiveMs: 4 },
    { computeMs: 16, collectiveMs: 6 },
  ],
  decodeTokens: 30,
  prefillTokens: 70,
  generatedTokens: 31,
  extends: 31,
};

export const REQUEST: RequestStats = {
  requestId: 'r-1',
  key: 'team',
  outcome: 'finished',
  errorCode: null,
  arrivalMs: 0,
  timings: { queueMs: 100, prefillMs: 400, decodeMs: 1500, stallMs: 50 },
  promptTokens: 70,
  cachedPromptTokens: 10,
  generatedTokens: 20,
  preemptions: 1,
};

export const LOOP: LoopSnapshot = {
  ...EMPTY_LOOP,
  running: 3,
  queued: 2,
  queuedTokens: 500,
  finished: 40,
  preemptions: 4,
  steps: 1000,
  promptTokens: 9000,
  generatedTokens: 8000,
  stepSeconds: 12,
  collectiveSeconds: 3,
  kv: { blockSize: 16, totalBlocks: 200, usedBlocks: 50, cachedBlocks: 20, freeBlocks: 130, peakUsedBlocks: 90 },
  contextCache: { contexts: 2, maxBlocks: 100, hits: 6, misses: 4, hitTokens: 300, evictions: 1 },
};

const config = parseModelConfig(JSON.parse(readFileSync(join(tinyModelDir, 'config.json'), 'utf8')), 'config.json');

export function statusSources(given: Partial<StatusSources> = {}): StatusSources {
  const memory = { weightBytes: 1000, kvBytes: 2000, workspaceBytes: 300, rssBytes: 5000 };
  const rank = { state: 'ready', device: 'cpu', isa: 'avx2', memory, loading: { doneBytes: 0, totalBytes: 0 } } as const;
  return {
    state: 'ready',
    reason: '',
    uptimeSeconds: 60,
    epoch: 2,
    model: { name: 'glm', path: '/models/glm', config, weights: 'INT4', hasTokenizer: true },
    threads: 4,
    ranks: [
      { ...rank, rank: 0, pid: 10, heartbeatAgeMs: 200 },
      { ...rank, rank: 1, pid: 11, heartbeatAgeMs: 700 },
    ],
    restarts: (index) => index,
    loop: LOOP,
    stats: new ServingStats(() => 0).snapshot(),
    events: [{ unixSeconds: 1000, severity: 'warning', message: 'epoch ended: rank 1 was lost' }],
    ...given,
  };
}
