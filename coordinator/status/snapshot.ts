/** What the status RPC and `GET /status` show, put together from the parts that know it. */
import { packageVersion } from '../../common/package-root.js';
import type { ModelConfig } from '../../model/model-config.js';
import type { Status__Output } from '../../proto/generated/tandem/v1/Status.js';
import type { ServerState } from '../api/service.js';
import type { RankSnapshot } from '../group/worker-group.js';
import type { ServerEvent } from './event-log.js';
import { EMPTY_LOOP, type LoopSnapshot } from './loop-snapshot.js';
import type { ServingStatsSnapshot } from './serving-stats.js';

export const SERVER_STATES = ['loading', 'ready', 'recovering', 'draining', 'stopping', 'failed'] as const satisfies readonly ServerState[];

export interface StatusSources {
  readonly state: ServerState;
  /** Why the state is not `ready`; else empty. */
  readonly reason: string;
  readonly uptimeSeconds: number;
  readonly epoch: number;
  readonly model: {
    readonly name: string;
    readonly path: string;
    readonly config: ModelConfig;
    readonly weights: string;
    readonly hasTokenizer: boolean;
  };
  readonly threads: number;
  readonly ranks: readonly RankSnapshot[];
  /** How often each rank's process was restarted; 0 where it is not supervised from here. */
  readonly restarts: (rank: number) => number;
  /** Null before the first epoch. */
  readonly loop: LoopSnapshot | null;
  readonly stats: ServingStatsSnapshot;
  readonly events: readonly ServerEvent[];
}

const MOST_ACTIVE = 200;

/** @param unixSeconds the server's clock */
export function statusSnapshot(sources: StatusSources, unixSeconds: number = Date.now() / 1000): Status__Output {
  const { model, stats } = sources;
  const { kv, contextCache, active, ...loop } = sources.loop ?? EMPTY_LOOP;
  return {
    schema: 'tandem.status/1',
    version: packageVersion,
    state: sources.state,
    reason: sources.reason,
    uptimeSeconds: sources.uptimeSeconds,
    unixSeconds,
    epoch: sources.epoch,
    model: {
      name: model.name,
      path: model.path,
      numLayers: model.config.numLayers,
      hiddenSize: model.config.hiddenSize,
      numAttentionHeads: model.config.numAttentionHeads,
      vocabSize: model.config.vocabSize,
      maxSequenceLength: model.config.maxSequenceLength,
      weights: model.weights,
      hasTokenizer: model.hasTokenizer,
    },
    workers: sources.ranks.map(({ rank, state, pid, device, isa, memory, loading, heartbeatAgeMs }) => ({
      rank,
      pid,
      state,
      device,
      isa,
      threads: sources.threads,
      weightBytes: memory.weightBytes,
      kvBytes: memory.kvBytes,
      workspaceBytes: memory.workspaceBytes,
      rssBytes: memory.rssBytes,
      loadedBytes: loading.doneBytes,
      loadBytes: loading.totalBytes,
      heartbeatAgeSeconds: heartbeatAgeMs / 1000,
      restarts: sources.restarts(rank),
      computeSeconds: stats.ranks[rank]?.computeSeconds ?? 0,
      collectiveSeconds: stats.ranks[rank]?.collectiveSeconds ?? 0,
    })),
    kv: { ...kv },
    contextCache: { ...contextCache },
    requests: {
      running: loop.running,
      queued: loop.queued,
      queuedTokens: loop.queuedTokens,
      finished: loop.finished,
      failed: loop.failed,
      cancelled: loop.cancelled,
      expired: loop.expired,
      rejected: stats.rejected,
      preemptions: loop.preemptions,
    },
    totals: {
      steps: loop.steps,
      promptTokens: loop.promptTokens,
      generatedTokens: loop.generatedTokens,
      stepSeconds: loop.stepSeconds,
      collectiveSeconds: loop.collectiveSeconds,
    },
    rates: { ...stats.rates },
    latency: { ...stats.latency },
    step: { ...stats.step },
    active: [...active]
      .sort((a, b) => b.ageMs - a.ageMs)
      .slice(0, MOST_ACTIVE)
      .map(({ ageMs, ...request }) => ({ ...request, ageSeconds: ageMs / 1000 })),
    events: sources.events.map((event) => ({ ...event })),
  };
}
