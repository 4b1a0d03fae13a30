/** One part of `npm run bench:serve`. */
export interface Part {
  readonly name: string;
  /** What it shows, in a line. */
  readonly title: string;
  run(context: BenchContext): Promise<PartReport>;
}

export interface BenchContext {
  /** Runs of each measurement; medians are printed. */
  readonly repeats: number;
  readonly progress: (message: string) => void;
  /** A folder that is removed at the end. */
  readonly scratch: string;
}

export interface PartReport {
  readonly header: readonly string[];
  readonly rows: readonly (readonly string[])[];
  /** Lines below the table. */
  readonly notes: readonly string[];
  /** For `--json`. */
  readonly data: object;
  /** What is wrong with the server: the bench ends with status 1. Figures that miss an aim are notes. */
  readonly failures: readonly string[];
}

/** Why a part can not be run here. */
export class SkippedError extends Error {}

/** The lower one of the two in the middle. */
export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.ceil(sorted.length / 2) - 1] ?? NaN;
}
