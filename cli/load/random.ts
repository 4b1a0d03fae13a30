/** Random numbers that are the same for the same seeds, on every machine. */
export interface Random {
  /** From 0 up to but not including 1, in steps of 2^-32. */
  readonly uniform: () => number;
  /** A whole number from `low` to `high`, both included. */
  integer(low: number, high: number): number;
  /** Mean 0, deviation 1. */
  readonly normal: () => number;
  /** Of mean `shape`, so of variance `shape`; a shape of 1 is the exponential distribution. */
  gamma(shape: number): number;
}

/** sfc32 (Chris Doty-Humphrey, PractRand); another generator for every row of seeds. */
export function createRandom(...seeds: readonly number[]): Random {
  let [a, b, c, counter] = [0x9e3779b9, 0x243f6a88, 0xb7e15162, 1];
  const next = (): number => {
    const sum = (((a + b) | 0) + counter) | 0;
    counter = (counter + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (((c << 21) | (c >>> 11)) + sum) | 0;
    return sum >>> 0;
  };
  for (const seed of seeds) {
    a ^= seed | 0;
    b ^= Math.floor(seed / 2 ** 32) | 0;
    for (let i = 0; i < MIXING_ROUNDS; i++) next();
  }
  const uniform = (): number => next() / 2 ** 32;
  const normal = (): number => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  const gamma = (shape: number): number => {
    if (shape < 1) return gamma(shape + 1) * (1 - uniform()) ** (1 / shape);
    // Marsaglia and Tsang, "A simple method for generating gamma variables" (2000).
    const d = shape - 1 / 3;
    while (true) {
      const x = normal();
      const v = (1 + x / Math.sqrt(9 * d)) ** 3;
      if (v > 0 && Math.log(1 - uniform()) < 0.5 * x * x + d - d * v + d * Math.log(v)) return d * v;
    }
  };
  return { uniform, normal, gamma, integer: (low, high) => low + Math.floor(uniform() * (high - low + 1)) };
}

const MIXING_ROUNDS = 12;
