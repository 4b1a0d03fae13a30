/** Percentiles of a duration over the last minute. */

export interface Percentiles {
  readonly p50: number;
  readonly p90: number;
  readonly p99: number;
  readonly count: number;
}

/** Buckets of equal ratio, 16 to a doubling: a percentile is at most 2.2 % off. */
const BUCKETS_PER_DOUBLING = 16;
const MIN_MS = 0.01;
const MAX_MS = 3_600_000;
const BUCKETS = Math.ceil(Math.log2(MAX_MS / MIN_MS) * BUCKETS_PER_DOUBLING) + 1;

const SLOT_MS = 5_000;
/** The one that fills and those of the minute before: what is reported is 60 to 65 s old at most. */
const SLOTS = 13;

/**
 * Log-scaled histograms of 5 s each, in a ring: adding costs one logarithm, memory is fixed (24 KB). Times are milliseconds of
 * one monotonic clock that the caller chooses.
 */
export class LatencyWindow {
  private readonly counts = new Uint32Array(SLOTS * BUCKETS);
  /** Which slot of the clock each place of the ring holds. */
  private readonly slots = new Float64Array(SLOTS).fill(-Infinity);

  add(ms: number, nowMs: number): void {
    const slot = Math.floor(nowMs / SLOT_MS);
    const place = slot % SLOTS;
    if (this.slots[place] !== slot) {
      this.slots[place] = slot;
      this.counts.fill(0, place * BUCKETS, (place + 1) * BUCKETS);
    }
    this.counts[place * BUCKETS + bucketOf(ms)]! += 1;
  }

  /** In milliseconds; all 0 where nothing happened. */
  percentiles(nowMs: number): Percentiles {
    const oldest = Math.floor(nowMs / SLOT_MS) - SLOTS + 1;
    const sums = new Float64Array(BUCKETS);
    let count = 0;
    for (let place = 0; place < SLOTS; place++) {
      if (this.slots[place]! < oldest) continue;
      for (let bucket = 0; bucket < BUCKETS; bucket++) {
        const counted = this.counts[place * BUCKETS + bucket]!;
        sums[bucket]! += counted;
        count += counted;
      }
    }
    return { p50: percentile(sums, count, 0.5), p90: percentile(sums, count, 0.9), p99: percentile(sums, count, 0.99), count };
  }
}

function bucketOf(ms: number): number {
  if (!(ms > MIN_MS)) return 0;
  return Math.min(BUCKETS - 1, Math.floor(Math.log2(ms / MIN_MS) * BUCKETS_PER_DOUBLING));
}

function percentile(counts: Float64Array, count: number, share: number): number {
  if (count === 0) return 0;
  let left = Math.ceil(share * count);
  const bucket = counts.findIndex((counted) => (left -= counted) <= 0);
  return MIN_MS * 2 ** ((bucket + 0.5) / BUCKETS_PER_DOUBLING);
}
