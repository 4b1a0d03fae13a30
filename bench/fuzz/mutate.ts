/** Numbers in [0, 2^32), the same for the same seed (mulberry32). */
export function randomIntegers(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return (t ^ (t >>> 14)) >>> 0;
  };
}

/** One of `corpus` with a few changes, as files get them by accident or by intent. */
export function mutate(corpus: readonly Uint8Array[], random: () => number): Uint8Array {
  const pick = (count: number): number => random() % Math.max(1, count);
  let bytes: Uint8Array = Buffer.from(corpus[pick(corpus.length)]!);
  const changes = 1 + pick(random() % 4 === 0 ? 16 : 3);
  for (let i = 0; i < changes; i++) bytes = mutations[pick(mutations.length)]!(bytes, { corpus, pick });
  return bytes;
}

interface Choice {
  readonly corpus: readonly Uint8Array[];
  /** A number from 0 to count - 1, or 0. */
  readonly pick: (count: number) => number;
}

type Mutation = (bytes: Uint8Array, choice: Choice) => Uint8Array;

/** What breaks arithmetic: around 0 and around the ends of 7, 8, 15, 16, 31, 32, 53, 63 and 64 bits. */
const numbers = [0, 1, 7, 8, 15, 16, 31, 32, 53, 63, 64].flatMap((bits) => [-1n, 0n, 1n].map((more) => 2n ** BigInt(bits) + more));

const mutations: readonly Mutation[] = [
  (bytes, { pick }) => changed(bytes, pick(bytes.length), (byte) => byte ^ (1 << pick(8))),
  (bytes, { pick }) => changed(bytes, pick(bytes.length), () => pick(256)),
  (bytes, { pick }) => changed(bytes, pick(bytes.length), () => [0, 1, 0x7f, 0x80, 0xff][pick(5)]!),
  // A number of 1, 2, 4 or 8 bytes, in either order.
  (bytes, { pick }) => {
    const width = [1, 2, 4, 8][pick(4)]!;
    const field = Buffer.alloc(8);
    field.writeBigUInt64LE(BigInt.asUintN(64, numbers[pick(numbers.length)]!));
    const number = field.subarray(0, width);
    return spliced(bytes, pick(bytes.length), width, pick(2) === 0 ? number : Buffer.from(number).reverse());
  },
  // A number in decimal: in JSON, and in tar's octal.
  (bytes, { pick }) => {
    const at = indexOfDigit(bytes, pick(bytes.length));
    let end = at;
    while (end < bytes.length && isDigit(bytes[end]!)) end++;
    return spliced(bytes, at, end - at, Buffer.from(String(numbers[pick(numbers.length)])));
  },
  (bytes, { pick }) => bytes.subarray(0, pick(bytes.length + 1)),
  (bytes, { pick }) => bytes.subarray(pick(bytes.length)),
  (bytes, { pick }) => spliced(bytes, pick(bytes.length), pick(32), Buffer.alloc(0)),
  (bytes, { pick }) => spliced(bytes, pick(bytes.length), 0, Buffer.alloc(pick(32), pick(256))),
  // A piece of it once more, here or elsewhere.
  (bytes, { pick }) => {
    const from = pick(bytes.length);
    return spliced(bytes, pick(bytes.length), pick(2) * 8, bytes.subarray(from, from + pick(64)));
  },
  // A piece of another.
  (bytes, { corpus, pick }) => {
    const other = corpus[pick(corpus.length)]!;
    const from = pick(other.length);
    return spliced(bytes, pick(bytes.length), pick(64), other.subarray(from, from + pick(256)));
  },
  (bytes, { corpus, pick }) => {
    const other = corpus[pick(corpus.length)]!;
    return Buffer.concat([bytes.subarray(0, pick(bytes.length)), other.subarray(pick(other.length))]);
  },
];

function changed(bytes: Uint8Array, at: number, change: (byte: number) => number): Uint8Array {
  const copy = Buffer.from(bytes);
  if (at < copy.length) copy[at] = change(copy[at]!);
  return copy;
}

function spliced(bytes: Uint8Array, at: number, removed: number, inserted: Uint8Array): Uint8Array {
  return Buffer.concat([bytes.subarray(0, at), inserted, bytes.subarray(at + removed)]);
}

function indexOfDigit(bytes: Uint8Array, from: number): number {
  const found = bytes.subarray(from).findIndex(isDigit);
  return found < 0 ? from : from + found;
}

function isDigit(byte: number): boolean {
  return byte >= 0x30 && byte <= 0x39;
}
