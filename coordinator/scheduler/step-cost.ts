/** What steps of some sizes take; in between it is on the line from one to the next. Sizes and times grow. Two points at least. */
export type StepCost = readonly StepPoint[];

export interface StepPoint {
  readonly tokens: number;
  readonly ms: number;
}

/** Milliseconds of a step of so many tokens. */
export function stepMs(cost: StepCost, tokens: number): number {
  const [a, b] = segment(cost, ({ tokens: size }) => size >= tokens);
  return Math.max(0, a.ms + ((tokens - a.tokens) * (b.ms - a.ms)) / (b.tokens - a.tokens));
}

/** The most tokens of a step that takes no longer, the fewest that are known at least; Infinity where more of them cost nothing. */
export function tokensWithin(cost: StepCost, ms: number): number {
  if (ms < cost[0]!.ms) return cost[0]!.tokens;
  const [a, b] = segment(cost, ({ ms: time }) => time > ms);
  return b.ms > a.ms ? a.tokens + ((ms - a.ms) * (b.tokens - a.tokens)) / (b.ms - a.ms) : Infinity;
}

/** The two points around, or the nearest two. */
function segment(cost: StepCost, isBeyond: (point: StepPoint) => boolean): readonly [StepPoint, StepPoint] {
  const found = cost.findIndex(isBeyond);
  const at = found < 0 ? cost.length - 1 : Math.max(1, found);
  return [cost[at - 1]!, cost[at]!];
}

/** How much a new step counts in the mean of its size. */
const LEARNING = 1 / 16;
/** Steps of a size before it counts: the first ones are slower than those that follow. */
const LEAST_STEPS = 4;

/** Means of what steps take, by size: one for each power of two. Kernels are not linear: a row more may be free, or cost a whole tile. */
export class StepCostTable {
  private readonly sizes: { steps: number; tokens: number; ms: number }[] = [];

  observe(tokens: number, ms: number): void {
    const size = (this.sizes[Math.max(0, Math.ceil(Math.log2(tokens)))] ??= { steps: 0, tokens, ms });
    size.steps += 1;
    const share = Math.max(LEARNING, 1 / size.steps);
    size.tokens += (tokens - size.tokens) * share;
    size.ms += (ms - size.ms) * share;
  }

  /** Null as long as there are not two sizes to go by. */
  get cost(): StepCost | null {
    const points: StepPoint[] = [];
    for (const size of this.sizes) {
      if (!size || size.steps < LEAST_STEPS) continue;
      points.push({ tokens: size.tokens, ms: Math.max(size.ms, points.at(-1)?.ms ?? 0) });
    }
    return points.length < 2 ? null : points;
  }
}
