import fc from 'fast-check';
import { expect, test } from 'vitest';
import { floatToHalf, halfToFloat } from './float16.js';

test('every half but NaN survives the way to float and back', () => {
  for (let bits = 0; bits < 65536; bits++) {
    const isNaNBits = (bits & 0x7c00) === 0x7c00 && (bits & 0x3ff) !== 0;
    expect(floatToHalf(halfToFloat[bits]!)).toBe(isNaNBits ? 0x7e00 : bits);
  }
});

test.each([
  { value: 0, bits: 0 },
  { value: -0, bits: 0x8000 },
  { value: 1, bits: 0x3c00 },
  { value: -2, bits: 0xc000 },
  { value: 65504, bits: 0x7bff },
  { value: 65519.99, bits: 0x7bff },
  { value: 65520, bits: 0x7c00 },
  { value: -1e10, bits: 0xfc00 },
  { value: 2 ** -14, bits: 0x0400 },
  { value: 2 ** -24, bits: 0x0001 },
  { value: 2 ** -25, bits: 0x0000 }, // a tie, to even
  { value: 3 * 2 ** -25, bits: 0x0002 }, // a tie, to even
  { value: 2 ** -25 * 1.001, bits: 0x0001 },
  { value: 2 ** -14 - 2 ** -25, bits: 0x0400 }, // the largest subnormal's upper tie becomes normal
  { value: 1 + 2 ** -11, bits: 0x3c00 }, // a tie, to even
  { value: 1 + 3 * 2 ** -11, bits: 0x3c02 },
  { value: NaN, bits: 0x7e00 },
])('$value is the half 0x$bits', ({ value, bits }) => {
  expect(floatToHalf(value)).toBe(bits);
});

test('a float becomes the nearest half, and the even one of two equally near', () => {
  const positive = Array.from({ length: 0x7c00 }, (_, bits) => halfToFloat[bits]!); // ascending
  fc.assert(
    fc.property(fc.oneof(fc.float({ min: 0, max: 65504 }), fc.float({ min: 0, max: Math.fround(1e-4) })), (value) => {
      const bits = floatToHalf(value);
      const error = Math.abs(positive[bits]! - value); // exact: both are multiples of 2^-149 below 2^16, near each other
      for (const neighbour of [bits - 1, bits + 1]) {
        const other = positive[neighbour];
        if (other === undefined) continue;
        const otherError = Math.abs(other - value);
        expect(otherError > error || (otherError === error && bits % 2 === 0)).toBe(true);
      }
    }),
    { numRuns: 2000 },
  );
});
