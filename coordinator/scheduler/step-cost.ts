/** What a step of n tokens takes: `fixedMs + n * perTokenMs`. */
export interface StepCost {
  readonly fixedMs: number;
  readonly perTokenMs: number;
}

/** How much each step counts less with every one after it: about 200 of them matter. */
const DECAY = 0.995;
/** A slope wants steps of different sizes: their variance, in tokens squared, at least. */
const LEAST_VARIANCE = 4;

/** Least squares over the last steps, as plain data. Steps that are all alike say nothing of the slope: it then stays what it was. */
export class StepCostFit {
  private weight = 0;
  private tokens = 0;
  private ms = 0;
  private tokensSquared = 0;
  private tokensMs = 0;
  private perTokenMs: number | null = null;

  observe(tokens: number, ms: number): void {
    this.weight = this.weight * DECAY + 1;
    this.tokens = this.tokens * DECAY + tokens;
    this.ms = this.ms * DECAY + ms;
    this.tokensSquared = this.tokensSquared * DECAY + tokens * tokens;
    this.tokensMs = this.tokensMs * DECAY + tokens * ms;
  }

  /** Null as long as there is nothing to go by. */
  get cost(): StepCost | null {
    if (this.weight === 0) return null;
    const [tokens, ms] = [this.tokens / this.weight, this.ms / this.weight];
    const variance = this.tokensSquared / this.weight - tokens * tokens;
    if (variance >= LEAST_VARIANCE) this.perTokenMs = Math.max(1e-6, (this.tokensMs / this.weight - tokens * ms) / variance);
    if (this.perTokenMs === null) return null;
    return { fixedMs: Math.max(0, ms - this.perTokenMs * tokens), perTokenMs: this.perTokenMs };
  }
}
