/** What the status RPC shows, put together from the parts that know it. */
import { packageVersion } from '../../common/package-root.js';
import type { ModelConfig } from '../../model/model-config.js';
import type { Status } from '../../proto/generated/tandem/v1/Status.js';
import type { RankSnapshot } from '../group/worker-group.js';
import type { LoopSnapshot } from './loop-snapshot.js';

export interface StatusSources {
  readonly state: 'ready' | 'recovering' | 'failed' | 'stopping';
  readonly uptimeSeconds: number;
  readonly epoch: number;
  readonly model: { readonly path: string; readonly config: ModelConfig; readonly weights: string; readonly hasTokenizer: boolean };
  readonly threads: number;
  readonly ranks: readonly RankSnapshot[];
  /** How often each rank's process was restarted; 0 where it is not supervised from here. */
  readonly restarts: (rank: number) => number;
  readonly loop: LoopSnapshot;
}

export function statusSnapshot(sources: StatusSources): Status {
  const { model, loop } = sources;
  return {
    version: packageVersion,
    state: sources.state,
    uptimeSeconds: sources.uptimeSeconds,
    epoch: sources.epoch,
    model: {
      path: model.path,
      numLayers: model.config.numLayers,
      hiddenSize: model.config.hiddenSize,
      numAttentionHeads: model.config.numAttentionHeads,
      vocabSize: model.config.vocabSize,
      maxSequenceLength: model.config.maxSequenceLength,
      weights: model.weights,
      hasTokenizer: model.hasTokenizer,
    },
    workers: sources.ranks.map(({ rank, state, pid, device, isa, memory, heartbeatAgeMs }) => ({
      rank,
      pid,
      state,
      device,
      isa,
      threads: sources.threads,
      ...memory,
      heartbeatAgeSeconds: heartbeatAgeMs / 1000,
      restarts: sources.restarts(rank),
    })),
    kv: loop.kv,
    requests: { running: loop.running, queued: loop.queued, finished: loop.finished, failed: loop.failed, cancelled: loop.cancelled },
    totals: {
      steps: loop.steps,
      promptTokens: loop.promptTokens,
      generatedTokens: loop.generatedTokens,
      stepSeconds: loop.stepSeconds,
      collectiveSeconds: loop.collectiveSeconds,
    },
  };
}
