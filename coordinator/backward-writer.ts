/** In a tag, behind the number of the field. */
export const WIRE_TYPE = { varint: 0, bytes: 2, fixed32: 5 } as const;

export const VARINT_BYTES = 5;

/** Characters of a text that is written by hand. */
const SHORT_TEXT = 32;

const SLAB_BYTES = 64 * 1024;
/** Larger messages have a buffer of their own: a small one that waits for its client would keep them. */
const LARGE_BYTES = 4096;
/** Messages lie in it one before the other; a new one begins when the next message may not fit. */
let slab = Buffer.allocUnsafeSlow(SLAB_BYTES);
let freeBytes = SLAB_BYTES;

/**
 * Messages in protobuf's wire format (https://protobuf.dev/programming-guides/encoding/), for the few that are so frequent that the general
 * encoder takes too long. From the last byte to the first: so the length of a message is known when it is written. One at a time.
 */
export class BackwardWriter {
  private readonly buffer: Buffer;
  private readonly end: number;
  private at: number;

  /** @param room bytes, at most */
  constructor(room: number) {
    const isLarge = room > LARGE_BYTES;
    if (!isLarge && room > freeBytes) {
      slab = Buffer.allocUnsafeSlow(SLAB_BYTES);
      freeBytes = SLAB_BYTES;
    }
    this.buffer = isLarge ? Buffer.allocUnsafeSlow(room) : slab;
    this.end = isLarge ? room : freeBytes;
    this.at = this.end;
  }

  /** Bytes written. */
  get length(): number {
    return this.end - this.at;
  }

  varint(value: number): void {
    if (value < 0x80) {
      this.buffer[--this.at] = value;
      return;
    }
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

  bytes(tag: number, value: Uint8Array): void {
    this.at -= value.length;
    this.buffer.set(value, this.at);
    this.varint(value.length);
    this.varint(tag);
  }

  /** What was written since `length` bytes is a message. */
  message(tag: number, length: number): void {
    this.varint(this.length - length);
    this.varint(tag);
  }

  finish(): Buffer {
    if (this.buffer === slab) freeBytes = this.at;
    return this.buffer.subarray(this.at, this.end);
  }
}
