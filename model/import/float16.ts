/**
 * IEEE 754 half precision as its 16 bits: sign, 5 bits of exponent (bias 15), 10 bits of fraction. Exact, on any machine; ECMAScript has no
 * half type on the Node versions that Tandem runs on.
 */

/** The value of every half, indexed by its bits. */
export const halfToFloat: Float32Array = buildTable();

/** Bits of the half nearest to `value` taken as a float32, ties to even; beyond the largest half, infinity; NaN is 0x7e00. */
export function floatToHalf(value: number): number {
  asFloat[0] = value;
  const bits = asBits[0]!;
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00; // 65520, half way to the first value past 65504, rounds to even: infinity
  if (magnitude >= 0x38800000) {
    // Normal, >= 2^-14: drop 13 bits; a carry out of the fraction runs into the exponent, as it should. 112 = 127 - 15.
    return sign | ((magnitude - (112 << 23) + 0xfff + ((magnitude >>> 13) & 1)) >>> 13);
  }
  // Subnormal: a multiple of 2^-24. Adding 1.5 * 2^52 to a double rounds it to an integer, ties to even.
  const steps = Math.abs(asFloat[0]) * 2 ** 24;
  return sign | (steps + roundToInteger - roundToInteger);
}

/** Adding and subtracting this rounds a double of magnitude below 2^51 to the nearest integer, ties to even. */
export const roundToInteger = 1.5 * 2 ** 52;

const asFloat = new Float32Array(1);
const asBits = new Uint32Array(asFloat.buffer);

function buildTable(): Float32Array {
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const exponent = (bits >>> 10) & 31;
    const fraction = bits & 0x3ff;
    let magnitude: number;
    if (exponent === 0) magnitude = fraction * 2 ** -24;
    else if (exponent === 31) magnitude = fraction === 0 ? Infinity : NaN;
    else magnitude = (1024 + fraction) * 2 ** (exponent - 25);
    table[bits] = bits & 0x8000 ? -magnitude : magnitude;
  }
  return table;
}
