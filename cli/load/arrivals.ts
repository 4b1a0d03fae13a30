import { ConfigError } from '../../common/errors.js';
import type { Random } from './random.js';

/** When requests are to arrive: independent of when the server answers. */
export type Arrivals =
  | { readonly kind: 'constant' }
  | { readonly kind: 'poisson' }
  /** Gamma-distributed gaps: 1 is poisson, smaller comes in bursts, larger is more regular. */
  | { readonly kind: 'gamma'; readonly burstiness: number };

/** @throws ConfigError */
export function parseArrivals(text: string): Arrivals {
  if (text === 'constant' || text === 'poisson') return { kind: text };
  const burstiness = /^gamma:(?<value>\d{1,4}(\.\d{1,6})?)$/.exec(text)?.groups?.['value'];
  if (burstiness !== undefined && Number(burstiness) > 0) return { kind: 'gamma', burstiness: Number(burstiness) };
  throw new ConfigError(`--arrivals ${text}: allowed are poisson, constant and gamma:BURSTINESS (1 is poisson, 0.25 comes in bursts)`);
}

/** Milliseconds from the beginning, without end. @param rate requests in a second */
export function* arrivalTimes(arrivals: Arrivals, rate: number, random: Random): Generator<number, never> {
  const meanMs = 1000 / rate;
  for (let atMs = 0; ; atMs += gap(arrivals, random) * meanMs) yield atMs;
}

/** Of mean 1. */
function gap(arrivals: Arrivals, random: Random): number {
  switch (arrivals.kind) {
    case 'constant':
      return 1;
    case 'poisson':
      return random.gamma(1);
    case 'gamma':
      return random.gamma(arrivals.burstiness) / arrivals.burstiness;
  }
}
