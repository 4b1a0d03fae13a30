import type { Metric, Registry } from 'prom-client';

/**
 * A histogram for prom-client's Registry whose `observe` costs a binary search in a typed array. prom-client's own makes an object
 * and a hash key for each value: too much for what is called once for each token of each step.
 */
export class BucketHistogram {
  private readonly bounds: Float64Array;
  /** The last is of what is above all bounds. */
  private readonly counts: Float64Array;
  private sum = 0;

  /** @param bounds upper ones, ascending */
  constructor(
    readonly name: string,
    readonly help: string,
    bounds: readonly number[],
    registry: Registry,
  ) {
    this.bounds = Float64Array.from(bounds);
    this.counts = new Float64Array(bounds.length + 1);
    registry.registerMetric(this as unknown as Metric); // of which it uses `name` and `get()`, and wants one of its own classes
  }

  observe(value: number): void {
    let low = 0;
    let high = this.bounds.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (value <= this.bounds[middle]!) high = middle;
      else low = middle + 1;
    }
    this.counts[low]! += 1;
    this.sum += value;
  }

  get(): Promise<object> {
    let count = 0;
    const buckets = Array.from(this.counts, (counted, i) => {
      count += counted;
      return { metricName: `${this.name}_bucket`, labels: { le: this.bounds[i] ?? '+Inf' }, value: count };
    });
    const values = [
      ...buckets,
      { metricName: `${this.name}_sum`, labels: {}, value: this.sum },
      { metricName: `${this.name}_count`, labels: {}, value: count },
    ];
    return Promise.resolve({ name: this.name, help: this.help, type: 'histogram', values });
  }
}
