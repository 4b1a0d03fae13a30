/** Between the bench and the process that runs the peer (peer-process.ts). */
import type { Lengths, Phase } from '../contestant.js';

export interface PeerOptions {
  readonly modelFile: string;
  readonly vocabSize: number;
  readonly threads: number;
  readonly lengths: Lengths;
}

export interface PeerRequest {
  readonly phase: Phase;
  readonly seed: number;
}

export type PeerMessage =
  | { readonly kind: 'ready'; readonly description: string }
  | { readonly kind: 'result'; readonly tokensPerSecond: number }
  | { readonly kind: 'error'; readonly message: string };
