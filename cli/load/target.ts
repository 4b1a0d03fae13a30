import type { PlannedRequest } from './workload.js';

/** A server as the load generator sees it. */
export interface LoadTarget {
  /** @param onTokens a message with tokens came; `ids` are known to some protocols only */
  send(request: PlannedRequest, onTokens: (count: number, ids: readonly number[]) => void): SentRequest;
  close(): void;
}

export interface SentRequest {
  /** Never rejects. */
  readonly ended: Promise<Ending>;
  /** Leaves without a word, as a client does that goes away. */
  cancel(): void;
}

export type Ending =
  | {
      readonly kind: 'finished';
      readonly promptTokens: number;
      readonly outputTokens: number;
      readonly cachedPromptTokens: number;
      readonly serverQueueMs: number | null;
    }
  | { readonly kind: 'cancelled' }
  | { readonly kind: 'failed'; readonly code: string; readonly message: string };

/** What every request has in common. */
export interface RequestShape {
  readonly mode: 'fill-blanks' | 'mask' | 'gmask' | 'unidirectional';
  readonly temperature: number;
  /** Of the sampling. */
  readonly seed: number;
  /** 0: sampling. */
  readonly beams: number;
  readonly priority: number;
  /** 0: none. */
  readonly timeoutMs: number;
  /** False: the outputs are as long as planned, whatever the model says. */
  readonly stopsAtEnd: boolean;
}
