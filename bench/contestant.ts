/** Who is measured: this project in one layout, or the peer. */

export const PHASES = ['decode', 'prefill', 'batch'] as const;
/** `decode`: one stream; `prefill`: a prompt until its first token; `batch`: {@link BATCH} streams, all their tokens together. */
export type Phase = (typeof PHASES)[number];

export const BATCH = 8;
/** Tokens of the prompts whose decoding is measured. */
export const SHORT_PROMPT = 16;
/** Of everyone: what more would be worth depends on the machine, and two is what two workers can have at least. */
export const THREADS = 2;

export interface Lengths {
  readonly prefillTokens: number;
  /** Of each stream; the first one comes with the prompt, and is not counted. */
  readonly decodeTokens: number;
}

export interface Sample {
  readonly tokensPerSecond: number;
  /** Means over the steps of one stream, the one of its prompt included. Null where nobody says: of the peer, and in other phases than `decode`. */
  readonly stepMs: StepMs | null;
}

/** All of it, what the slowest rank computes, and of that its collectives. */
export interface StepMs {
  readonly total: number;
  readonly compute: number;
  readonly collectives: number;
}

/** Loaded, and at rest unless a phase runs. */
export interface Contestant {
  /** Weights that one decoding step reads. */
  readonly bytesPerToken: number;
  /** What makes a difference to its figures, for the record. */
  readonly description: string;
  /** @param seed another one gives other prompts */
  run(phase: Phase, seed: number): Promise<Sample>;
  close(): Promise<void>;
}

export interface Entrant {
  readonly name: string;
  /** While it is loaded, about. */
  readonly memoryBytes: number;
  start(): Promise<Contestant>;
}

export function promptTokens(count: number, seed: number, vocabSize: number): number[] {
  return Array.from({ length: count }, (_, i) => 100 + ((seed * 7919 + i * 104729) % Math.min(3000, vocabSize - 200)));
}
