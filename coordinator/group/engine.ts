/** The engine boundary: what the serving loop knows of the workers. It knows no gRPC and no process. */
import type { ExtendResult, Want } from '../generation/strategy.js';

export interface Engine {
  readonly capacity: EngineCapacity;
  /** Runs one step on all ranks; results in the order of the Extends. Rejects with {@link EpochEndedError} or an EngineError. */
  step(step: EngineStep): Promise<EngineStepResult>;
  /** Resolves when steps can run; rejects with a WorkerLostError when they never will again. */
  ready(): Promise<void>;
  close(): Promise<void>;
}

export interface EngineCapacity {
  readonly kvBlocks: number;
  readonly blockSize: number;
  readonly maxBatchTokens: number;
}

export interface EngineStep {
  /** (from, to) pairs, done before anything else. */
  readonly blockCopies: readonly number[];
  readonly extends: readonly EngineExtend[];
}

export interface EngineExtend {
  readonly tokens: readonly number[];
  readonly positions: readonly number[];
  readonly blockTable: readonly number[];
  readonly cachedTokens: number;
  readonly bidirectionalTokens: number;
  readonly want: Want;
}

export interface EngineStepResult {
  readonly results: readonly ExtendResult[];
  readonly computeMs: number;
  readonly collectiveMs: number;
}

/** A rank was lost: the step did not happen and all KV contents are gone. Everything can be run again once `ready()` resolves. */
export class EpochEndedError extends Error {}
