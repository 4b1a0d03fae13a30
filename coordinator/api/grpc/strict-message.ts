import type { deserialize } from '@grpc/grpc-js';
import { InvalidRequestError } from '../../../common/errors.js';

/**
 * Decodes a request, or gives an InvalidRequestError in its place: grpc-js would answer INTERNAL to what cannot be decoded. Text that is not
 * UTF-8 is refused, too, which the decoder would fill with replacement characters.
 */
export function strictly<T>(decode: deserialize<T>): deserialize<T> {
  return (bytes) => {
    let message: T;
    try {
      message = decode(bytes);
    } catch {
      return new InvalidRequestError(`the ${bytes.length} bytes of the request are not a message of this method`) as T;
    }
    const field = findReplaced(message, '', bytes);
    return field === null ? message : (new InvalidRequestError(`${field} is not valid UTF-8`, field) as T);
  };
}

/** A field with a replacement character that the sender did not write. */
function findReplaced(value: unknown, path: string, bytes: Buffer): string | null {
  if (typeof value === 'string') return value.includes('\ufffd') && !bytes.includes(value, 0, 'utf8') ? path : null;
  if (typeof value !== 'object' || value === null || ArrayBuffer.isView(value)) return null;
  if (Array.isArray(value)) {
    if (typeof value[0] === 'number') return null; // ids
    for (const [i, element] of value.entries()) {
      const found = findReplaced(element, `${path}[${i}]`, bytes);
      if (found !== null) return found;
    }
    return null;
  }
  for (const [name, field] of Object.entries(value)) {
    const found = findReplaced(field, `${path === '' ? '' : `${path}.`}${toSnakeCase(name)}`, bytes);
    if (found !== null) return found;
  }
  return null;
}

/** As the .proto file has the field. */
function toSnakeCase(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}
