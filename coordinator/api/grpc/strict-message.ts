import type { deserialize } from '@grpc/grpc-js';
import { InvalidRequestError } from '../../../common/errors.js';

/**
 * Decodes a request, or gives an InvalidRequestError in its place: grpc-js would answer INTERNAL to what cannot be decoded. What the decoder
 * lets pass is refused, too: a message that is cut off, and text that is not UTF-8.
 */
export function strictly<T>(decode: deserialize<T>): deserialize<T> {
  return (bytes) => {
    let message: T;
    try {
      if (!isWhole(bytes)) throw new Error('cut off');
      message = decode(bytes);
    } catch {
      return new InvalidRequestError(`the ${bytes.length} bytes of the request are not a message of this method`) as T;
    }
    const field = findReplaced(message, '', new TextSearch(bytes));
    return field === null ? message : (new InvalidRequestError(`${field} is not valid UTF-8`, field) as T);
  };
}

/** Whether the outermost fields end where the bytes do (https://protobuf.dev/programming-guides/encoding/). */
function isWhole(bytes: Buffer): boolean {
  let at = 0;
  const varint = (): number => {
    let value = 0;
    for (let shift = 0; shift < 70; shift += 7) {
      const byte = bytes[at++];
      if (byte === undefined) return NaN;
      value += (byte & 0x7f) * 2 ** shift;
      if (byte < 0x80) return value;
    }
    return NaN;
  };
  while (at < bytes.length) {
    const tag = varint();
    const wireType = tag % 8;
    if (!(tag >= 8)) return false;
    if (wireType === 0) {
      if (Number.isNaN(varint())) return false;
    } else if (wireType === 1) at += 8;
    else if (wireType === 2) {
      const length = varint();
      at += length;
    } else if (wireType === 5) at += 4;
    else if (wireType > 5) return false; // 3 and 4 are the marks around a group, whose fields come between
  }
  return at === bytes.length; // false for NaN
}

/**
 * Finds texts in the bytes of a message. Elements of a repeated field come in the order of the message, so each search goes on where the last
 * one ended: from the beginning, a message of very many texts would take time by the square of its length.
 */
class TextSearch {
  private at = 0;

  constructor(private readonly bytes: Buffer) {}

  includes(text: string): boolean {
    let found = this.bytes.indexOf(text, this.at);
    if (found < 0 && this.at > 0) found = this.bytes.indexOf(text); // of a field that came earlier
    if (found < 0) return false;
    this.at = found + Buffer.byteLength(text);
    return true;
  }
}

/** A field with a replacement character that the sender did not write. */
function findReplaced(value: unknown, path: string, sent: TextSearch): string | null {
  if (typeof value === 'string') return value.includes('\ufffd') && !sent.includes(value) ? path : null;
  if (typeof value !== 'object' || value === null || ArrayBuffer.isView(value)) return null;
  if (Array.isArray(value)) {
    if (typeof value[0] === 'number') return null; // ids
    for (const [i, element] of value.entries()) {
      const found = findReplaced(element, `${path}[${i}]`, sent);
      if (found !== null) return found;
    }
    return null;
  }
  for (const [name, field] of Object.entries(value)) {
    const found = findReplaced(field, `${path === '' ? '' : `${path}.`}${toSnakeCase(name)}`, sent);
    if (found !== null) return found;
  }
  return null;
}

/** As the .proto file has the field. */
function toSnakeCase(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}
