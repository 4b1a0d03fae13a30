const SLOT_MS = 500;
const WINDOW_MS = 10_000;
/** The one that fills and those of the 10 s before. */
const SLOTS = WINDOW_MS / SLOT_MS + 1;

/**
 * Sums of some quantities over the last 10 s, in slots of half a second. Times are milliseconds of one monotonic clock that the
 * caller chooses.
 */
export class RateWindow<Name extends string> {
  private readonly sums: Float64Array;
  private readonly slots = new Float64Array(SLOTS).fill(-Infinity);

  constructor(
    private readonly names: readonly Name[],
    private readonly startMs: number,
  ) {
    this.sums = new Float64Array(SLOTS * names.length);
  }

  add(amounts: Readonly<Partial<Record<Name, number>>>, nowMs: number): void {
    const slot = Math.floor(nowMs / SLOT_MS);
    const place = slot % SLOTS;
    const first = place * this.names.length;
    if (this.slots[place] !== slot) {
      this.slots[place] = slot;
      this.sums.fill(0, first, first + this.names.length);
    }
    this.names.forEach((name, i) => (this.sums[first + i]! += amounts[name] ?? 0));
  }

  /** @returns the sums, and the seconds that they are of: fewer than 10 only when the server is younger */
  read(nowMs: number): { readonly sums: Readonly<Record<Name, number>>; readonly seconds: number } {
    const oldest = Math.floor(nowMs / SLOT_MS) - SLOTS + 1;
    const sums = Object.fromEntries(
      this.names.map((name, i) => {
        let sum = 0;
        for (let place = 0; place < SLOTS; place++) if (this.slots[place]! >= oldest) sum += this.sums[place * this.names.length + i]!;
        return [name, sum];
      }),
    ) as Record<Name, number>;
    return { sums, seconds: Math.max(1000, Math.min(nowMs - oldest * SLOT_MS, nowMs - this.startMs)) / 1000 };
  }
}
