import { ConfigError } from '../../common/errors.js';
import type { Random } from './random.js';

/** How lengths in tokens are drawn. */
export type Distribution =
  | { readonly kind: 'constant'; readonly value: number }
  | { readonly kind: 'uniform'; readonly low: number; readonly high: number }
  /** `mean` and `deviation` of the lengths themselves, not of their logarithms. */
  | { readonly kind: 'lognormal'; readonly mean: number; readonly deviation: number };

/** @throws ConfigError naming the flag */
export function parseDistribution(flag: string, text: string): Distribution {
  const [kind = '', ...rest] = text.split(':');
  if (/^\d{1,7}$/.test(kind) && rest.length === 0 && Number(kind) >= 1) return { kind: 'constant', value: Number(kind) };
  const [first = NaN, second = NaN] = rest.map((part) => (/^\d{1,7}(\.\d{1,6})?$/.test(part) ? Number(part) : NaN));
  if (rest.length === 2 && first >= 1 && kind === 'uniform' && Number.isInteger(first) && Number.isInteger(second) && second >= first)
    return { kind, low: first, high: second };
  if (rest.length === 2 && first >= 1 && kind === 'lognormal' && second >= 0) return { kind, mean: first, deviation: second };
  throw new ConfigError(`--${flag} ${text}: write a number of tokens (64), uniform:16:256 (both included) or lognormal:mean:deviation`);
}

/** A whole number, at least 1. */
export function drawLength(distribution: Distribution, random: Random): number {
  switch (distribution.kind) {
    case 'constant':
      return distribution.value;
    case 'uniform':
      return random.integer(distribution.low, distribution.high);
    case 'lognormal': {
      const { mean, deviation } = distribution;
      const variance = Math.log(1 + (deviation / mean) ** 2);
      return Math.max(1, Math.round(Math.exp(Math.log(mean) - variance / 2 + Math.sqrt(variance) * random.normal())));
    }
  }
}
