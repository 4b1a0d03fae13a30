/** The serving loop in numbers, as status and metrics show it. Totals count from the start of the server. */
export interface LoopSnapshot {
  readonly running: number;
  readonly queued: number;
  /** Prompt tokens of the queued requests. */
  readonly queuedTokens: number;
  readonly finished: number;
  readonly failed: number;
  readonly cancelled: number;
  readonly expired: number;
  readonly preemptions: number;
  readonly steps: number;
  readonly promptTokens: number;
  readonly generatedTokens: number;
  /** On the slowest rank of each step, collectives included. */
  readonly stepSeconds: number;
  readonly collectiveSeconds: number;
  /** total = used + cached + free. */
  readonly kv: {
    readonly blockSize: number;
    readonly totalBlocks: number;
    readonly usedBlocks: number;
    readonly cachedBlocks: number;
    readonly freeBlocks: number;
    readonly peakUsedBlocks: number;
  };
  readonly contextCache: {
    readonly contexts: number;
    readonly maxBlocks: number;
    readonly hits: number;
    readonly misses: number;
    readonly hitTokens: number;
    readonly evictions: number;
  };
  readonly active: readonly ActiveRequestSnapshot[];
}

export interface ActiveRequestSnapshot {
  readonly requestId: string;
  /** Name of the API key. */
  readonly key: string;
  readonly state: 'queued' | 'prefill' | 'decode' | 'preempted';
  readonly promptTokens: number;
  readonly generatedTokens: number;
  readonly kvBlocks: number;
  readonly priority: number;
  readonly ageMs: number;
}

/** Of a server whose loop has not begun yet: the model loads. */
export const EMPTY_LOOP: LoopSnapshot = {
  running: 0,
  queued: 0,
  queuedTokens: 0,
  finished: 0,
  failed: 0,
  cancelled: 0,
  expired: 0,
  preemptions: 0,
  steps: 0,
  promptTokens: 0,
  generatedTokens: 0,
  stepSeconds: 0,
  collectiveSeconds: 0,
  kv: { blockSize: 0, totalBlocks: 0, usedBlocks: 0, cachedBlocks: 0, freeBlocks: 0, peakUsedBlocks: 0 },
  contextCache: { contexts: 0, maxBlocks: 0, hits: 0, misses: 0, hitTokens: 0, evictions: 0 },
  active: [],
};
