/** What the processes and threads of the fuzzing bench tell each other. */

export interface InputThreadData {
  readonly target: string;
  readonly seed: number;
  /** Inputs [from, to). */
  readonly from: number;
  readonly to: number;
  /** For its files. */
  readonly dir: string;
  /** Two words: the index of the input that is being read, and how many have been begun. */
  readonly current: SharedArrayBuffer;
}

export type ThreadMessage =
  { readonly kind: 'defect'; readonly index: number; readonly what: string } | { readonly kind: 'done'; readonly refused: number };

/** What the parent is told. `stopped`: inputs from `index` on have not been read. */
export type ChildMessage =
  | ThreadMessage
  | { readonly kind: 'peak'; readonly rssBytes: number }
  | { readonly kind: 'stopped'; readonly index: number; readonly what: string };

export interface ChildTask extends Omit<InputThreadData, 'current'> {
  readonly timeLimitMs: number;
  readonly rssLimitBytes: number;
}

/** In the task's folder: four bytes, the index of the input that is being read. */
export const currentFileName = 'current';
