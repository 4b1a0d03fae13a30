/** API keys and the file that lists them. The file holds hashes: who reads it can call nothing. */
import { createHash, randomBytes, timingSafeEqual } from 'node:crypto';
import { closeSync, constants, fstatSync, openSync, readFileSync } from 'node:fs';
import { z } from 'zod';
import { ConfigError } from '../../common/errors.js';
import { type Caller, MAX_PRIORITY, ROLES } from './caller.js';

const MAX_FILE_BYTES = 1024 * 1024;
const KEY_BYTES = 32;

const entrySchema = z.strictObject({
  name: z.string().regex(/^[A-Za-z0-9._-]{1,64}$/, 'allowed are 1 to 64 of the characters A-Z a-z 0-9 . _ -'),
  sha256: z.string().regex(/^[0-9a-f]{64}$/, 'the SHA-256 of the key is needed, as 64 lower-case hex digits'),
  roles: z
    .array(z.enum(['infer', 'observe', 'operate'] satisfies typeof ROLES))
    .min(1)
    .refine((roles) => new Set(roles).size === roles.length, 'a role is there twice'),
  weight: z.number().min(0.001).max(1000).optional(),
  maxPriority: z.number().int().min(-MAX_PRIORITY).max(MAX_PRIORITY).optional(),
  maxStreams: z.number().int().min(1).max(1_000_000).optional(),
  maxTokensPerMinute: z.number().int().min(1).max(1_000_000_000_000).optional(),
});
const fileSchema = z.strictObject({ keys: z.array(entrySchema).max(10_000) });

/** One key as the file has it. */
export type ApiKeyEntry = z.infer<typeof entrySchema>;

export interface ApiKey {
  readonly digest: Buffer;
  readonly caller: Caller;
}

export interface ApiKeys {
  readonly keys: readonly ApiKey[];
  /** Others than the owner can read the file: worth a warning, as hashes are all that it holds. */
  readonly isWorldReadable: boolean;
}

/** What a key that sets no `maxPriority` may ask for: normal, or to go behind others. */
const DEFAULT_MAX_PRIORITY = 0;

/** @throws ConfigError naming the file and the entry */
export function readApiKeys(path: string): ApiKeys {
  const { text, mode } = readSmallFile(path);
  return { keys: parseApiKeys(text, path).map(toApiKey), isWorldReadable: (mode & 0o004) !== 0 };
}

/** @param source the file's name, for messages @throws ConfigError */
export function parseApiKeys(text: string, source: string): ApiKeyEntry[] {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (error) {
    throw new ConfigError(`${source} is no JSON: ${(error as Error).message}`);
  }
  const result = fileSchema.safeParse(json);
  if (!result.success) {
    const [issue] = result.error.issues;
    throw new ConfigError(`${source}: ${entryName(json, issue!.path)}${issue!.message}`);
  }
  const { keys } = result.data;
  for (const field of ['name', 'sha256'] as const) {
    const seen = new Set<string>();
    for (const [i, key] of keys.entries()) {
      if (seen.has(key[field])) throw new ConfigError(`${source}: keys[${i}].${field} is ${key[field]}, which another key has: change one`);
      seen.add(key[field]);
    }
  }
  return keys;
}

/** The key that was presented, or null. Every entry is compared, in the same time each: how long it takes tells nothing about the keys. */
export function findApiKey(keys: readonly ApiKey[], presented: string): ApiKey | null {
  const digest = sha256(presented);
  let found: ApiKey | null = null;
  for (const key of keys) if (timingSafeEqual(key.digest, digest)) found = key;
  return found;
}

/**
 * A new key and its entry. A key is 256 random bits, so its plain SHA-256 cannot be turned back by guessing; salts and slow hashes
 * are for passwords, which people choose.
 */
export function createApiKey(entry: Omit<ApiKeyEntry, 'sha256'>): { readonly key: string; readonly entry: ApiKeyEntry } {
  const key = `tk_${randomBytes(KEY_BYTES).toString('base64url')}`;
  const { name, ...rest } = entry;
  return { key, entry: { name, sha256: sha256(key).toString('hex'), ...rest } };
}

function toApiKey(entry: ApiKeyEntry): ApiKey {
  return {
    digest: Buffer.from(entry.sha256, 'hex'),
    caller: {
      name: entry.name,
      roles: entry.roles,
      weight: entry.weight ?? 1,
      maxPriority: entry.maxPriority ?? DEFAULT_MAX_PRIORITY,
      maxStreams: entry.maxStreams ?? null,
      maxTokensPerMinute: entry.maxTokensPerMinute ?? null,
    },
  };
}

/** Where in the file: `keys[2] (team-a).weight: `. */
function entryName(json: unknown, path: readonly PropertyKey[]): string {
  if (path.length === 0) return '';
  const [first, index, ...rest] = path;
  const name = (json as { keys?: { name?: unknown }[] }).keys?.[Number(index)]?.name;
  const entry = index === undefined ? '' : `[${String(index)}]${typeof name === 'string' ? ` (${name})` : ''}`;
  return `${String(first)}${entry}${rest.map((part) => (typeof part === 'number' ? `[${part}]` : `.${String(part)}`)).join('')}: `;
}

/** A FIFO or a device would block, or never end. */
function readSmallFile(path: string): { readonly text: string; readonly mode: number } {
  let file: number;
  try {
    file = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
  } catch (error) {
    throw new ConfigError(`API keys: ${path} cannot be opened (${(error as NodeJS.ErrnoException).code})`);
  }
  try {
    const stat = fstatSync(file);
    if (!stat.isFile()) throw new ConfigError(`API keys: ${path} is not a regular file`);
    if (stat.size > MAX_FILE_BYTES) throw new ConfigError(`API keys: ${path} has ${stat.size} bytes, at most ${MAX_FILE_BYTES} are read`);
    return { text: readFileSync(file, 'utf8'), mode: stat.mode };
  } finally {
    closeSync(file);
  }
}

function sha256(text: string): Buffer {
  return createHash('sha256').update(text, 'utf8').digest();
}
