import type { GenerationDelta, TokenLogprob } from '../generation/request.js';

/**
 * A GenerateResponse with this Delta (`proto/tandem/v1/generation.proto`) in protobuf's wire format
 * (https://protobuf.dev/programming-guides/encoding/). Written out by hand: there is one for every token of every stream, and the general
 * encoder takes longer than scheduling the token does.
 */
export function encodeDelta({ output, blank, text, tokens, logprobs }: GenerationDelta): Buffer {
  let room = LEAST_BYTES + UTF8_BYTES * text.length + VARINT_BYTES * tokens.length;
  if (logprobs !== null) for (const { top } of logprobs) room += LOGPROB_BYTES * (1 + top.length);
  const out = new BackwardWriter(room);
  if (logprobs !== null) writeLogprobs(out, logprobs);
  const before = out.length;
  for (let i = tokens.length - 1; i >= 0; i--) out.varint(tokens[i]!);
  if (tokens.length > 0) out.message(FIELD.tokens, before);
  if (text !== '') out.text(FIELD.text, text);
  if (blank !== 0) out.uint32(FIELD.blank, blank);
  if (output !== 0) out.uint32(FIELD.output, output);
  out.message(FIELD.delta, 0);
  return out.finish();
}

function writeLogprobs(out: BackwardWriter, logprobs: readonly TokenLogprob[]): void {
  for (let i = logprobs.length - 1; i >= 0; i--) {
    const { token, logprob, top } = logprobs[i]!;
    const before = out.length;
    for (let j = top.length - 1; j >= 0; j--) {
      const beforeTop = out.length;
      out.float(FIELD.logprob, top[j]!.logprob);
      out.uint32(FIELD.token, top[j]!.token);
      out.message(FIELD.top, beforeTop);
    }
    out.float(FIELD.logprob, logprob);
    out.uint32(FIELD.token, token);
    out.message(FIELD.logprobs, before);
  }
}

const WIRE_TYPE = { varint: 0, bytes: 2, fixed32: 5 } as const;

/** Tags: the number of the field and its wire type. */
const FIELD = {
  delta: (1 << 3) | WIRE_TYPE.bytes,
  output: (1 << 3) | WIRE_TYPE.varint,
  blank: (2 << 3) | WIRE_TYPE.varint,
  text: (3 << 3) | WIRE_TYPE.bytes,
  tokens: (4 << 3) | WIRE_TYPE.bytes,
  logprobs: (5 << 3) | WIRE_TYPE.bytes,
  // Of TokenLogprob and TopToken.
  token: (1 << 3) | WIRE_TYPE.varint,
  logprob: (2 << 3) | WIRE_TYPE.fixed32,
  top: (3 << 3) | WIRE_TYPE.bytes,
} as const;

const VARINT_BYTES = 5;
const UTF8_BYTES = 3;
/** At most: two tags, a varint, a float, and the tag and length of the message around them. */
const LOGPROB_BYTES = 2 + VARINT_BYTES + 4 + 1 + VARINT_BYTES;
/** At most, of a Delta without text, tokens and logprobs: five tags, and as many varints. */
const LEAST_BYTES = 5 * (1 + VARINT_BYTES);

/** Characters of a text that is written by hand. */
const SHORT_TEXT = 32;

const SLAB_BYTES = 64 * 1024;
/** Messages lie in it one before the other; a new one begins when the next message may not fit. */
let slab = Buffer.allocUnsafeSlow(SLAB_BYTES);
let freeBytes = SLAB_BYTES;

/** From the last byte to the first: so the length of a message is known when it is written. */
class BackwardWriter {
  private readonly buffer: Buffer;
  private readonly end: number;
  private at: number;

  /** @param room bytes, at most */
  constructor(room: number) {
    if (room > freeBytes) {
      slab = Buffer.allocUnsafeSlow(Math.max(SLAB_BYTES, room));
      freeBytes = slab.length;
    }
    this.buffer = slab;
    this.end = freeBytes;
    this.at = freeBytes;
  }

  /** Bytes written. */
  get length(): number {
    return this.end - this.at;
  }

  varint(value: number): void {
    let bytes = 1;
    for (let rest = value >>> 7; rest > 0; rest >>>= 7) bytes += 1;
    this.at -= bytes;
    let at = this.at;
    let rest = value;
    for (; bytes > 1; bytes--, rest >>>= 7) this.buffer[at++] = (rest & 0x7f) | 0x80;
    this.buffer[at] = rest;
  }

  uint32(tag: number, value: number): void {
    this.varint(value);
    this.varint(tag);
  }

  float(tag: number, value: number): void {
    this.at -= 4;
    this.buffer.writeFloatLE(value, this.at);
    this.varint(tag);
  }

  text(tag: number, value: string): void {
    const end = this.at;
    if (value.length > SHORT_TEXT || !this.shortText(value)) {
      const bytes = Buffer.byteLength(value);
      this.at = end - bytes;
      this.buffer.write(value, this.at, bytes, 'utf8');
    }
    this.varint(end - this.at);
    this.varint(tag);
  }

  /** The UTF-8 of a text, by hand: for a word the way into Node and back takes longer. @returns false: it has surrogates; write it otherwise */
  private shortText(value: string): boolean {
    const { buffer } = this;
    let { at } = this;
    for (let i = value.length - 1; i >= 0; i--) {
      const unit = value.charCodeAt(i);
      if (unit < 0x80) buffer[--at] = unit;
      else if (unit < 0x800) {
        buffer[--at] = 0x80 | (unit & 0x3f);
        buffer[--at] = 0xc0 | (unit >> 6);
      } else if (unit < 0xd800 || unit > 0xdfff) {
        buffer[--at] = 0x80 | (unit & 0x3f);
        buffer[--at] = 0x80 | ((unit >> 6) & 0x3f);
        buffer[--at] = 0xe0 | (unit >> 12);
      } else return false;
    }
    this.at = at;
    return true;
  }

  /** What was written since `length` bytes is a message. */
  message(tag: number, length: number): void {
    this.varint(this.length - length);
    this.varint(tag);
  }

  finish(): Buffer {
    freeBytes = this.at;
    return this.buffer.subarray(this.at, this.end);
  }
}
