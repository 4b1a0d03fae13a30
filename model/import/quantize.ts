import { CheckpointError } from '../../common/errors.js';
import { floatToHalf, halfToFloat, roundToInteger } from './float16.js';

export type QuantizedBits = 8 | 4;

export interface QuantizedRows {
  /** INT8 [rows, columns], or INT4 [rows, columns / 2] with the even column in the high nibble, two's complement. */
  readonly qweight: Uint8Array;
  /** fp16 [rows, groups]. */
  readonly scales: Uint16Array;
}

export interface QuantizeOptions {
  /** Equal runs of columns with a scale each; divides the columns, and for 4 bits leaves an even number of columns. */
  readonly groups: number;
  readonly bits: QuantizedBits;
  /** Of the tensor, for an error; and which of its rows comes first. */
  readonly name: string;
  readonly firstRow?: number;
}

/**
 * The symmetric vector-wise scheme of GLM-130B's quantization/functional.py, bit for bit as PyTorch computes it on a CPU (model-spec
 * section 1.3): for each row and group of columns
 *
 *     scale = fp16(max |W| / (2^(bits-1) - 1)),  q = int8(round_half_even(fp16(W / scale)))
 *
 * Nothing is clamped: with a subnormal scale the quotient can pass 127 and wraps. Where the scale is 0, q is 0.
 *
 * @param weights fp16 [rows, columns], dense
 * @throws CheckpointError where a weight is infinite or NaN
 */
export function quantizeRows(weights: Uint16Array, columns: number, { groups, bits, name, firstRow = 0 }: QuantizeOptions): QuantizedRows {
  const rows = weights.length / columns;
  const groupSize = columns / groups;
  const qmax = 2 ** (bits - 1) - 1;
  const scales = new Uint16Array(rows * groups);
  const quotients = new Int8Array(weights.length);
  for (let group = 0; group < scales.length; group++) {
    const begin = group * groupSize;
    const end = begin + groupSize;
    const largest = largestMagnitude(weights, begin, end);
    if (largest >= 0x7c00) {
      throw notFinite(name, firstRow + Math.floor(group / groups));
    }
    const scaleBits = floatToHalf(halfToFloat[largest]! / qmax);
    scales[group] = scaleBits;
    if (scaleBits === 0) continue;
    const scale = halfToFloat[scaleBits]!;
    for (let i = begin; i < end; i++) quotients[i] = quotientAsInt(halfToFloat[weights[i]!]! / scale);
  }
  return { qweight: bits === 8 ? new Uint8Array(quotients.buffer) : packInt4(quotients), scales };
}

export function notFinite(name: string, row: number): CheckpointError {
  return new CheckpointError(`tensor ${name} holds an infinite or NaN weight in row ${row}: it cannot be quantised`);
}

/** Two values of -8..7 a byte, the even index in the high nibble. An odd count is a defect of the caller. */
export function packInt4(values: Int8Array): Uint8Array {
  const packed = new Uint8Array(values.length / 2);
  for (let i = 0; i < packed.length; i++) packed[i] = ((values[2 * i]! & 15) << 4) | (values[2 * i + 1]! & 15);
  return packed;
}

/** The largest |w| as half bits: without its sign bit a half orders as its bits do, infinity and NaN last. */
function largestMagnitude(weights: Uint16Array, begin: number, end: number): number {
  let largest = 0;
  for (let i = begin; i < end; i++) {
    const magnitude = weights[i]! & 0x7fff;
    if (magnitude > largest) largest = magnitude;
  }
  return largest;
}

const asFloat = new Float32Array(1);
const asBits = new Uint32Array(asFloat.buffer);

/**
 * round_half_even(fp16(quotient)), to be stored in an int8 that wraps. PyTorch divides halves in float32 and rounds once more to half; storing
 * to a Float32Array is the first rounding, the bit operation the second: to 11 significant bits, ties to even. Below 2^-14 a half has fewer
 * bits, but those round to the integer 0 either way. Above, no half overflows: a scale that rounds down loses less than a third, so |quotient| < 191.
 */
function quotientAsInt(quotient: number): number {
  asFloat[0] = quotient;
  const bits = asBits[0]!;
  asBits[0] = (bits + 0xfff + ((bits >>> 13) & 1)) & ~0x1fff;
  return asFloat[0] + roundToInteger - roundToInteger;
}
