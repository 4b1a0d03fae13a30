/** Events per millisecond, of which those long past count less and less. */
export class MovingRate {
  private weight = 0;
  private events = 0;
  private updatedMs = 0;

  /** @param windowMs how long an event counts, about @param startMs of the clock that the others are told */
  constructor(
    private readonly windowMs: number,
    private readonly startMs = 0,
  ) {
    this.updatedMs = startMs;
  }

  count(nowMs: number): void {
    this.decay(nowMs);
    this.events += 1;
  }

  /** 0 before the first event. */
  at(nowMs: number): number {
    this.decay(nowMs);
    return this.weight > 0 ? this.events / (this.weight * this.windowMs) : 0;
  }

  private decay(nowMs: number): void {
    const factor = Math.exp((this.updatedMs - nowMs) / this.windowMs);
    this.events *= factor;
    this.weight = 1 - Math.exp((this.startMs - nowMs) / this.windowMs); // of the time there has been
    this.updatedMs = nowMs;
  }
}
