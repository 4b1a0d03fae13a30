import type { z } from 'zod';
import { InvalidRequestError } from '../../../common/errors.js';

/** No body of this API nests deeper than prompts do: an object, its prompts, their ids. */
const MAX_DEPTH = 8;

/** @throws InvalidRequestError the bytes are no UTF-8 or no JSON, nest too deep, or have a key that would be an object's prototype */
export function parseJson(bytes: Uint8Array): unknown {
  let text: string;
  try {
    text = new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch {
    throw new InvalidRequestError('the body is not UTF-8');
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    const position = / at position \d+/.exec((error as Error).message)?.[0] ?? ''; // the rest quotes the body
    throw new InvalidRequestError(text.trim() === '' ? 'the body is empty: send a JSON object' : `the body is not JSON${position}`);
  }
  checkTree(value, 0);
  return value;
}

function checkTree(value: unknown, depth: number): void {
  if (typeof value !== 'object' || value === null) return;
  if (depth === MAX_DEPTH) throw new InvalidRequestError(`the body nests deeper than ${MAX_DEPTH} levels`);
  if (Array.isArray(value)) {
    for (const item of value) checkTree(item, depth + 1);
    return;
  }
  for (const key of Object.keys(value)) {
    if (key === '__proto__') throw new InvalidRequestError('unknown field "__proto__"', '__proto__');
    checkTree((value as Record<string, unknown>)[key], depth + 1);
  }
}

/** @throws InvalidRequestError naming the first field that is not what the schema says */
export function parseBody<T>(schema: z.ZodType<T>, body: unknown): T {
  if (body === undefined) throw new InvalidRequestError('the body is missing: send a JSON object with content-type application/json');
  const result = schema.safeParse(body);
  if (result.success) return result.data;
  const issue = result.error.issues[0]!;
  if (issue.code === 'unrecognized_keys') {
    const field = fieldName([...issue.path, issue.keys[0]!]);
    throw new InvalidRequestError(`unknown field ${JSON.stringify(shortened(field))}: leave it out`, shortened(field));
  }
  const field = fieldName(issue.path);
  const message = issue.message.replace(/^Invalid input: /, '');
  throw new InvalidRequestError(field === '' ? `the body: ${message}` : `${field}: ${message}`, field === '' ? null : field);
}

/** A field that may be left out, or null: clients write both. */
export function optional<T>(schema: z.ZodType<T>) {
  return schema.nullish().transform((value) => value ?? undefined);
}

function fieldName(path: readonly PropertyKey[]): string {
  return path.map((key, i) => (typeof key === 'number' ? `[${key}]` : i === 0 ? String(key) : `.${String(key)}`)).join('');
}

/** Of what a client wrote, as much as belongs into an answer. */
export function shortened(text: string): string {
  return text.length > 80 ? `${text.slice(0, 80)}...` : text;
}
