/** A rate limit as plain data: `perMinute` tokens flow in, what is taken flows out, and a debt has to be paid back first. */
export class TokenBucket {
  private level: number;

  constructor(
    readonly perMinute: number,
    private updatedMs: number,
  ) {
    this.level = perMinute;
  }

  /** Milliseconds until so many tokens can be taken (a full bucket is enough for anything); 0: now. */
  waitMs(tokens: number, nowMs: number): number {
    this.refill(nowMs);
    const missing = Math.min(tokens, this.perMinute) - this.level;
    return missing <= 0 ? 0 : (missing * 60_000) / this.perMinute;
  }

  /** Takes tokens, there or not. */
  take(tokens: number, nowMs: number): void {
    this.refill(nowMs);
    this.level -= tokens;
  }

  private refill(nowMs: number): void {
    this.level = Math.min(this.perMinute, this.level + ((nowMs - this.updatedMs) * this.perMinute) / 60_000);
    this.updatedMs = nowMs;
  }
}
