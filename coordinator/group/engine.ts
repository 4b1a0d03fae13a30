/** The engine boundary: what the serving loop knows of the workers. It knows no gRPC and no process. */
import type { ExtendResult, Want } from '../generation/strategy.js';

export interface Engine {
  readonly capacity: EngineCapacity;
  /**
   * Runs one step on all ranks; results in the order of the Extends. Rejects with {@link EpochEndedError} or an EngineError. One more step may be sent
   * while one runs: it runs after it. What was sent is read before this returns.
   */
  step(step: EngineStep): Promise<EngineStepResult>;
  /** Resolves when steps can run; rejects with a WorkerLostError when they never will again. */
  ready(): Promise<void>;
  close(): Promise<void>;
}

export interface EngineCapacity {
  readonly kvBlocks: number;
  readonly blockSize: number;
  readonly maxBatchTokens: number;
  readonly numLayers: number;
}

export interface EngineStep {
  /** (from, to) pairs, done before anything else. */
  readonly blockCopies: readonly number[];
  readonly extends: readonly EngineExtend[];
}

/**
 * A run of tokens through layers [firstLayer, endLayer). A run may be spread over several steps by layers: the same tokens each
 * time, each step going on at the layer where the one before ended. At most one run is under way like that at a time: the ranks
 * keep its activations, and drop them when another one is begun at layer 0 and not ended. Until the last layer nothing is
 * evaluated (the result is of kind `none`).
 */
export interface EngineExtend {
  readonly tokens: ArrayLike<number>;
  readonly positions: ArrayLike<number>;
  readonly blockTable: ArrayLike<number>;
  readonly cachedTokens: number;
  readonly bidirectionalTokens: number;
  readonly firstLayer: number;
  readonly endLayer: number;
  readonly want: Want;
  /** Which Extend of the step before draws this run's one token: `tokens` then has something else in its place. -1: none. */
  readonly sampledBy: number;
}

export interface EngineStepResult {
  readonly results: readonly ExtendResult[];
  /** Of each rank: the whole step, and of which in collectives, waiting for the other ranks included. */
  readonly ranks: readonly { readonly computeMs: number; readonly collectiveMs: number }[];
  /** Of which on rank 0 sampling and looking at logits. */
  readonly evaluateMs: number;
  /** Encoding the step and decoding its results, on the coordinator. */
  readonly codecMs: number;
}

/** A rank was lost: the step did not happen and all KV contents are gone. Everything can be run again once `ready()` resolves. */
export class EpochEndedError extends Error {}
