/** What `coordinator-process` sends to its parent. Microseconds of each measured step, in order. */
export interface CoordinatorRun {
  readonly scheduleUs: readonly number[];
  /** Encoding for two ranks and decoding. */
  readonly codecUs: readonly number[];
  /** Applying results, strategies, text, protobuf of the responses. */
  readonly emitUs: readonly number[];
  /** The three together. */
  readonly sumUs: readonly number[];
  /** From one step to the next without what the ranks would do: the three, new requests, and everything that nobody measures. */
  readonly wholeUs: readonly number[];
  /** Of each request: decoding, validating and queueing it. */
  readonly submitUs: readonly number[];
  readonly memory: readonly MemorySample[];
  /** KV blocks that are neither free nor of cached contexts at the end. */
  readonly leakedBlocks: number;
}

/** After a collection. */
export interface MemorySample {
  readonly requests: number;
  readonly heapBytes: number;
  readonly rssBytes: number;
}
