/**
 * The bodies of Step and StepResult messages between coordinator and workers: 32-bit little-endian words in the order that
 * the functions below write and read them. Steps are many and small, and a protobuf message for each Extend costs more
 * than scheduling does; both ends are of the same version, which the Hello checks. A worker's end is native/model/step_codec.cc; the functions
 * here that read steps and write results define the format, and stand in for it in tests and benches.
 */
import { EngineError } from './errors.js';

export interface StepBody {
  /** (from, to) pairs of KV blocks. */
  readonly blockCopies: ArrayLike<number>;
  readonly extends: readonly StepExtend[];
}

/** Append a run of tokens to one sequence's KV cache (design section 1). */
export interface StepExtend {
  readonly tokens: ArrayLike<number>;
  readonly positions: ArrayLike<number>;
  /** Blocks for at least cachedTokens + tokens.length tokens. */
  readonly blockTable: ArrayLike<number>;
  readonly cachedTokens: number;
  /** Token i of the run sees all cached tokens and run tokens j with j <= i or j < bidirectionalTokens. */
  readonly bidirectionalTokens: number;
  /**
   * Layers [firstLayer, endLayer) are run; all: 0 and the model's number of layers. A run may be spread over several steps: the same tokens in each,
   * going on at the layer where the one before ended. One run at a time, whose activations the engine keeps (beginning another drops them; whole
   * Extends may run between), and one such Extend in a step; its result is `none` before the last layer.
   */
  readonly firstLayer: number;
  readonly endLayer: number;
  readonly want: StepWant;
  /**
   * Which Extend of the step before draws this run's one token, so that a step can be on its way before the one that it goes on from has ended; what
   * `tokens` has in its place does not matter. -1: none, the tokens are known.
   */
  readonly sampledBy: number;
}

export type StepWant =
  | { readonly kind: 'none' }
  | { readonly kind: 'sample'; readonly params: StepSamplingParams; readonly noise: StepNoise; readonly topLogprobs: number }
  | { readonly kind: 'candidates'; readonly count: number; readonly bannedTokens: ArrayLike<number>; readonly noise: StepNoise | null }
  | { readonly kind: 'targets'; readonly tokens: ArrayLike<number> }
  | { readonly kind: 'logits'; readonly rows: number };

export interface StepSamplingParams {
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
  readonly bannedTokens: ArrayLike<number>;
  /** Added to the logits of `biasTokens`, before the repetition penalty and the temperature. */
  readonly biasTokens: ArrayLike<number>;
  readonly biases: ArrayLike<number>;
  /** Positive logits of `repeatedTokens` are divided by it, negative ones multiplied (CTRL); 1: off. */
  readonly repetitionPenalty: number;
  readonly repeatedTokens: ArrayLike<number>;
}

export interface StepNoise {
  readonly seed: bigint;
  readonly stream: number;
  readonly position: number;
}

export type StepExtendResult =
  | { readonly kind: 'none' }
  | {
      readonly kind: 'sample';
      readonly token: number;
      readonly logprob: number;
      readonly topTokens: ArrayLike<number>;
      readonly topLogprobs: ArrayLike<number>;
    }
  | {
      readonly kind: 'candidates';
      readonly tokens: ArrayLike<number>;
      readonly logprobs: ArrayLike<number>;
      readonly keys: ArrayLike<number>;
    }
  | { readonly kind: 'targets'; readonly logprobs: ArrayLike<number> }
  | { readonly kind: 'logits'; readonly logits: Float32Array }
  /** What this Extend wanted could not be made; the others are not touched by it. */
  | { readonly kind: 'error'; readonly message: string };

const WANTS = ['none', 'sample', 'candidates', 'targets', 'logits'] as const;
const RESULTS = [...WANTS, 'error'] as const;
/** Offset of the kind in {@link WANTS} and {@link RESULTS}, as its word. */
const KIND = { none: 0, sample: 1, candidates: 2, targets: 3, logits: 4, error: 5 } as const;

export function encodeStepBody({ blockCopies, extends: all }: StepBody): Uint8Array {
  const out = new Writer();
  out.words(blockCopies);
  out.word(all.length);
  for (let i = 0; i < all.length; i++) writeExtend(out, all[i]!);
  return out.finish();
}

/** @throws EngineError the body is damaged; what the values mean is checked by the engine */
export function decodeStepBody(bytes: Uint8Array) {
  const from = new Reader(bytes, 'step');
  const blockCopies = from.words();
  const body = {
    blockCopies,
    extends: from.list(() => ({
      cachedTokens: from.word(),
      bidirectionalTokens: from.word(),
      firstLayer: from.word(),
      endLayer: from.word(),
      sampledBy: from.word() - 1,
      tokens: from.words(),
      positions: from.words(),
      blockTable: from.words(),
      want: readWant(from),
    })),
  };
  from.end();
  return body;
}

export function encodeResultBody(results: readonly StepExtendResult[]): Uint8Array {
  const out = new Writer();
  out.word(results.length);
  for (const result of results) {
    out.word(KIND[result.kind]);
    switch (result.kind) {
      case 'none':
        break;
      case 'sample':
        out.word(result.token);
        out.float(result.logprob);
        out.words(result.topTokens);
        out.floats(result.topLogprobs);
        break;
      case 'candidates':
        out.words(result.tokens);
        out.floats(result.logprobs);
        out.floats(result.keys);
        break;
      case 'targets':
        out.floats(result.logprobs);
        break;
      case 'logits':
        out.floats(result.logits);
        break;
      case 'error':
        out.text(result.message);
        break;
    }
  }
  return out.finish();
}

/** @throws EngineError the body is damaged; whether the results are what was asked for is for the caller to check */
export function decodeResultBody(bytes: Uint8Array) {
  const from = new Reader(bytes, 'result');
  const results = from.list(readResult);
  from.end();
  return results;
}

function readResult(from: Reader) {
  switch (from.kind(RESULTS)) {
    case 'none':
      return { kind: 'none' as const };
    case 'sample':
      return { kind: 'sample' as const, token: from.word(), logprob: from.float(), topTokens: from.words(), topLogprobs: from.floats() };
    case 'candidates':
      return { kind: 'candidates' as const, tokens: from.words(), logprobs: from.floats(), keys: from.floats() };
    case 'targets':
      return { kind: 'targets' as const, logprobs: from.floats() };
    case 'logits':
      return { kind: 'logits' as const, logits: from.floats() };
    case 'error':
      return { kind: 'error' as const, message: from.text() };
  }
}

function writeExtend(
  out: Writer,
  { tokens, positions, blockTable, cachedTokens, bidirectionalTokens, firstLayer, endLayer, want, sampledBy }: StepExtend,
): void {
  out.fourWords(cachedTokens, bidirectionalTokens, firstLayer, endLayer);
  out.word(sampledBy + 1);
  out.words(tokens);
  out.words(positions);
  out.words(blockTable);
  writeWant(out, want);
}

function writeWant(out: Writer, want: StepWant): void {
  out.word(KIND[want.kind]);
  switch (want.kind) {
    case 'none':
      break;
    case 'sample': {
      const { params } = want;
      out.float(params.temperature);
      out.word(params.topK);
      out.float(params.topP);
      out.words(params.bannedTokens);
      out.words(params.biasTokens);
      out.floats(params.biases);
      out.float(params.repetitionPenalty);
      out.words(params.repeatedTokens);
      writeNoise(out, want.noise);
      out.word(want.topLogprobs);
      break;
    }
    case 'candidates':
      out.word(want.count);
      out.words(want.bannedTokens);
      out.word(want.noise ? 1 : 0);
      if (want.noise) writeNoise(out, want.noise);
      break;
    case 'targets':
      out.words(want.tokens);
      break;
    case 'logits':
      out.word(want.rows);
      break;
  }
}

function readWant(from: Reader) {
  switch (from.kind(WANTS)) {
    case 'none':
      return { kind: 'none' as const };
    case 'sample':
      return {
        kind: 'sample' as const,
        params: {
          temperature: from.float(),
          topK: from.word(),
          topP: from.float(),
          bannedTokens: from.words(),
          biasTokens: from.words(),
          biases: from.floats(),
          repetitionPenalty: from.float(),
          repeatedTokens: from.words(),
        },
        noise: readNoise(from),
        topLogprobs: from.word(),
      };
    case 'candidates':
      return {
        kind: 'candidates' as const,
        count: from.word(),
        bannedTokens: from.words(),
        noise: from.word() === 0 ? null : readNoise(from),
      };
    case 'targets':
      return { kind: 'targets' as const, tokens: from.words() };
    case 'logits':
      return { kind: 'logits' as const, rows: from.word() };
  }
}

/** To take a 64-bit integer apart without making others. */
const seedBits = new BigUint64Array(1);
const seedWords = new Uint32Array(seedBits.buffer);

function writeNoise(out: Writer, { seed, stream, position }: StepNoise): void {
  seedBits[0] = seed;
  out.fourWords(seedWords[0]!, seedWords[1]!, stream, position);
}

function readNoise(from: Reader): StepNoise {
  const low = BigInt(from.word());
  return { seed: (BigInt(from.word()) << 32n) | low, stream: from.word(), position: from.word() };
}

if (new Uint8Array(Uint32Array.of(1).buffer)[0] !== 1)
  throw new EngineError('this machine is big-endian; steps are sent as little-endian words');

/** What is written goes here first: to make a large buffer for each body costs more than to copy the body out of it. */
let scratch = new Uint32Array(4096);
let scratchFloats = new Float32Array(scratch.buffer);

/** Words one after another; an array is its length and its elements, a text its length in bytes and its UTF-8 in whole words. One at a time. */
class Writer {
  private at = 0;

  word(value: number): void {
    const { at } = this;
    if (at === scratch.length) this.grow(1);
    scratch[at] = value;
    this.at = at + 1;
  }

  fourWords(a: number, b: number, c: number, d: number): void {
    const { at } = this;
    if (at + 4 > scratch.length) this.grow(4);
    scratch[at] = a;
    scratch[at + 1] = b;
    scratch[at + 2] = c;
    scratch[at + 3] = d;
    this.at = at + 4;
  }

  float(value: number): void {
    const { at } = this;
    if (at === scratch.length) this.grow(1);
    scratchFloats[at] = value;
    this.at = at + 1;
  }

  words(values: ArrayLike<number>): void {
    const { length } = values;
    const { at } = this;
    if (at + length >= scratch.length) this.grow(1 + length);
    scratch[at] = length;
    if (length > SHORT) scratch.set(values, at + 1);
    else for (let i = 0; i < length; i++) scratch[at + 1 + i] = values[i]!;
    this.at = at + 1 + length;
  }

  floats(values: ArrayLike<number>): void {
    const { length } = values;
    const { at } = this;
    if (at + length >= scratch.length) this.grow(1 + length);
    scratch[at] = length;
    if (length > SHORT) scratchFloats.set(values, at + 1);
    else for (let i = 0; i < length; i++) scratchFloats[at + 1 + i] = values[i]!;
    this.at = at + 1 + length;
  }

  text(value: string): void {
    const bytes = new TextEncoder().encode(value);
    const words = Math.ceil(bytes.length / 4);
    this.word(bytes.length);
    if (this.at + words > scratch.length) this.grow(words);
    if (words > 0) scratch[this.at + words - 1] = 0; // padding
    new Uint8Array(scratch.buffer, this.at * 4).set(bytes);
    this.at += words;
  }

  finish(): Uint8Array {
    const { buffer } = Buffer.allocUnsafeSlow(this.at * 4); // not filled with zeros first, as an array's is
    const bytes = new Uint8Array(buffer);
    bytes.set(new Uint8Array(scratch.buffer, 0, bytes.length));
    return bytes;
  }

  private grow(words: number): void {
    const larger = new Uint32Array(Math.max(scratch.length * 2, this.at + words));
    larger.set(scratch);
    scratch = larger;
    scratchFloats = new Float32Array(larger.buffer);
  }
}

/** Up to so many elements a loop is faster than `set`. */
const SHORT = 64;
/** Most lists are empty, and a view takes its time to make. */
const NO_WORDS = new Uint32Array();
const NO_FLOATS = new Float32Array();

class Reader {
  private readonly buffer: Uint32Array;
  private readonly asFloats: Float32Array;
  private at = 0;

  constructor(
    bytes: Uint8Array,
    private readonly what: string,
  ) {
    if (bytes.byteLength % 4 !== 0) throw new EngineError(`a ${what} body of ${bytes.byteLength} bytes, which are no whole words`);
    // A message's bytes lie anywhere in a larger buffer, words have to be aligned.
    const aligned = bytes.byteOffset % 4 === 0 ? bytes : new Uint8Array(bytes);
    this.buffer = new Uint32Array(aligned.buffer, aligned.byteOffset, aligned.byteLength / 4);
    this.asFloats = new Float32Array(this.buffer.buffer, this.buffer.byteOffset, this.buffer.length);
  }

  word(): number {
    if (this.at >= this.buffer.length) this.tooShort();
    return this.buffer[this.at++]!;
  }

  float(): number {
    if (this.at >= this.buffer.length) this.tooShort();
    return this.asFloats[this.at++]!;
  }

  /** A number of things, each of at least one word. */
  count(): number {
    const count = this.word();
    if (count > this.buffer.length - this.at) this.tooShort();
    return count;
  }

  list<Item>(read: (from: Reader) => Item): Item[] {
    const items: Item[] = [];
    for (let left = this.count(); left > 0; left--) items.push(read(this));
    return items;
  }

  words(): Uint32Array {
    const length = this.count();
    if (length === 0) return NO_WORDS;
    this.at += length;
    return this.buffer.subarray(this.at - length, this.at);
  }

  floats(): Float32Array {
    const length = this.count();
    if (length === 0) return NO_FLOATS;
    this.at += length;
    return this.asFloats.subarray(this.at - length, this.at);
  }

  text(): string {
    const length = this.word();
    const words = Math.ceil(length / 4);
    if (words > this.buffer.length - this.at) this.tooShort();
    this.at += words;
    return new TextDecoder('utf-8', { ignoreBOM: true }).decode(
      new Uint8Array(this.buffer.buffer, this.buffer.byteOffset + (this.at - words) * 4, length),
    );
  }

  kind<Kind>(kinds: readonly Kind[]): Kind {
    const kind = kinds[this.word()];
    if (kind === undefined) throw new EngineError(`a ${this.what} body with an unknown kind in word ${this.at - 1}`);
    return kind;
  }

  end(): void {
    if (this.at !== this.buffer.length) throw new EngineError(`a ${this.what} body with ${this.buffer.length - this.at} words left over`);
  }

  private tooShort(): never {
    throw new EngineError(`a ${this.what} body of ${this.buffer.length} words ends too early`);
  }
}
