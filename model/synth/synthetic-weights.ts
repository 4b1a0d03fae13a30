import { createHash } from 'node:crypto';
import { floatToHalf } from '../import/float16.js';
import type { QuantizedBits } from '../import/quantize.js';

/** Standard deviation of the weights, as trained ones have it. */
const spread = 0.02;
/** Of the gains of layer norms, around 1. */
const gainSpread = 0.05;
/** The largest of a row of some thousand normal values is about this many standard deviations out; quantised, it is the largest integer. */
const largestDeviation = 4;

const blockElements = 4096;
const poolElements = 2 ** 23;

/**
 * Random values for every element of every tensor, each a function of the seed, the tensor's name and the element's index in the whole tensor:
 * any part can be had by itself, and it is the same however the tensor is cut. A block of 4096 elements is a run of a pool of normal values,
 * from a start that a hash of tensor and block gives; so values come as fast as memory is copied.
 */
export class SyntheticWeights {
  private readonly seed: number;
  private readonly halves: Uint16Array;
  private readonly bytes = new Map<QuantizedBits, Uint8Array>();

  constructor(private readonly seedText: string) {
    this.seed = hashOf(`tandem synth ${seedText}`);
    this.halves = new Uint16Array(poolElements);
    const quantiles = normalQuantiles((value) => floatToHalf(value * spread));
    for (let i = 0; i < poolElements; i++) this.halves[i] = quantiles[mix(this.seed + i) >>> 16]!;
  }

  /** fp16 values of the elements from `begin` on. */
  fillHalves(tensor: string, begin: number, out: Uint16Array): void {
    fillFrom(this.halves, this.keyOf(tensor), begin, out);
  }

  /** fp16 values around 1, as the gains of a layer norm are. */
  fillGains(tensor: string, begin: number, out: Uint16Array): void {
    const key = this.keyOf(tensor);
    for (let i = 0; i < out.length; i++) out[i] = floatToHalf(1 + gainSpread * (uniform(key + begin + i) * 2 - 1));
  }

  /** Quantised values: for INT4 an element is a byte with two of them. */
  fillQuantized(tensor: string, bits: QuantizedBits, begin: number, out: Uint8Array): void {
    let pool = this.bytes.get(bits);
    if (pool === undefined) this.bytes.set(bits, (pool = this.quantizedPool(bits)));
    fillFrom(pool, this.keyOf(tensor), begin, out);
  }

  /** fp16 scales of the rows from `begin` on, all rank shards alike: quantised values times these have the spread of weights. */
  fillScales(tensor: string, bits: QuantizedBits, begin: number, out: Uint16Array): void {
    const key = this.keyOf(tensor);
    const scale = (spread * largestDeviation) / largestInteger(bits);
    for (let i = 0; i < out.length; i++) out[i] = floatToHalf(scale * (0.8 + 0.4 * uniform(key + begin + i)));
  }

  private quantizedPool(bits: QuantizedBits): Uint8Array {
    const largest = largestInteger(bits);
    const quantiles = normalQuantiles((value) => {
      const integer = Math.round((value * largest) / largestDeviation);
      return Math.max(-largest, Math.min(largest, integer));
    });
    const pool = new Uint8Array(poolElements);
    for (let i = 0; i < poolElements; i++) {
      const random = mix(this.seed - 1 - i);
      const high = quantiles[random >>> 16]!;
      pool[i] = bits === 8 ? high : (high << 4) | (quantiles[random & 0xffff]! & 15);
    }
    return pool;
  }

  private keyOf(tensor: string): number {
    return hashOf(`${this.seedText} ${tensor}`);
  }
}

function fillFrom<T extends Uint8Array | Uint16Array>(pool: T, key: number, begin: number, out: T): void {
  const end = begin + out.length;
  for (let index = begin; index < end;) {
    const block = Math.floor(index / blockElements);
    const inBlock = index - block * blockElements;
    const count = Math.min(blockElements - inBlock, end - index);
    const from = (mix(key + block) % (poolElements - blockElements)) + inBlock;
    out.set(pool.subarray(from, from + count), index - begin);
    index += count;
  }
}

function largestInteger(bits: QuantizedBits): number {
  return 2 ** (bits - 1) - 1;
}

/** The final mixer of MurmurHash3, of a Weyl sequence: 32 bits that look random for each counter. */
function mix(counter: number): number {
  let x = Math.imul(counter, 0x9e3779b1);
  x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
  x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
  return (x ^ (x >>> 16)) >>> 0;
}

function uniform(counter: number): number {
  return mix(counter) / 2 ** 32;
}

function hashOf(text: string): number {
  return createHash('sha256').update(text).digest().readUInt32LE();
}

/** 65536 values that are equally probable in a normal distribution, in order. */
function normalQuantiles(encode: (value: number) => number): Int32Array {
  const table = new Int32Array(65536);
  // The distribution function by the trapezoidal rule in small steps: where it passes (i + 0.5) / 65536 is quantile i.
  const step = 1 / 4096;
  const density = (x: number): number => Math.exp((-x * x) / 2) / Math.sqrt(2 * Math.PI);
  let below = 0;
  for (let i = 0, x = -6; i < 65536; x += step) {
    below += ((density(x) + density(x + step)) / 2) * step;
    while (i < 65536 && (below >= (i + 0.5) / 65536 || x > 6)) table[i++] = encode(x + step / 2);
  }
  return table;
}
