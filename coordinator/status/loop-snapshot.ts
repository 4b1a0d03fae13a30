/** What the serving loop knows of itself, for the status page. */
export interface LoopSnapshot {
  readonly running: number;
  readonly queued: number;
  /** Prompt tokens of the queued ones. */
  readonly queuedTokens: number;
  readonly finished: number;
  readonly failed: number;
  readonly cancelled: number;
  readonly expired: number;
  readonly rejected: number;
  readonly preemptions: number;
  readonly steps: number;
  readonly promptTokens: number;
  readonly generatedTokens: number;
  readonly stepSeconds: number;
  readonly collectiveSeconds: number;
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
  /** Of all steps, by rank. */
  readonly ranks: readonly { readonly computeSeconds: number; readonly collectiveSeconds: number }[];
  /** Oldest first, at most 200. */
  readonly active: readonly ActiveSnapshot[];
}

export interface ActiveSnapshot {
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
