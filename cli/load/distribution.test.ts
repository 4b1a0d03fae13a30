import fc from 'fast-check';
import { expect, test } from 'vitest';
import { drawLength, parseDistribution } from './distribution.js';
import { createRandom } from './random.js';

test.each([
  { text: '64', mean: 64, deviation: 0 },
  { text: 'uniform:16:256', mean: 136, deviation: Math.sqrt((241 ** 2 - 1) / 12) },
  { text: 'lognormal:100:50', mean: 100, deviation: 50 },
  { text: 'lognormal:100:0', mean: 100, deviation: 0 },
])('$text has a mean of $mean and a deviation of $deviation', ({ text, mean, deviation }) => {
  const random = createRandom(5);
  const distribution = parseDistribution('prompt-tokens', text);
  const lengths = Array.from({ length: 50_000 }, () => drawLength(distribution, random));
  const measured = lengths.reduce((sum, length) => sum + length, 0) / lengths.length;
  const variance = lengths.reduce((sum, length) => sum + (length - measured) ** 2, 0) / lengths.length;
  expect(Math.abs(measured - mean)).toBeLessThan(0.02 * mean);
  expect(Math.abs(Math.sqrt(variance) - deviation)).toBeLessThanOrEqual(0.05 * deviation);
});

test('whatever is drawn is a whole number of at least 1', () => {
  const distribution = parseDistribution('prompt-tokens', 'lognormal:2:20');
  const random = createRandom(6);
  for (let i = 0; i < 10_000; i++) {
    const length = drawLength(distribution, random);
    expect(Number.isInteger(length) && length >= 1).toBe(true);
  }
});

test.each(['0', '-1', '1.5', 'uniform:0:4', 'uniform:5:4', 'uniform:1.5:4', 'uniform:4', 'lognormal:0:1', 'lognormal:5', 'zipf:1:2', ''])(
  'the distribution "%s" is refused with its flag',
  (text) => expect(() => parseDistribution('output-tokens', text)).toThrow(/^--output-tokens /),
);

test('no text makes the parser fail in another way', () => {
  fc.assert(
    fc.property(fc.string(), (text) => {
      try {
        const length = drawLength(parseDistribution('prompt-tokens', text), createRandom(1));
        return Number.isInteger(length) && length >= 1;
      } catch (error) {
        return (error as Error).name === 'ConfigError';
      }
    }),
  );
});
