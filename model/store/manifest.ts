import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { z } from 'zod';
import { CheckpointError } from '../../common/errors.js';
import { readJsonFile } from './read-json-file.js';

/** manifest.json: size and hash of everything in a store (store/README.md). */
export interface StoreManifest {
  readonly version: 1;
  readonly hash: 'sha256';
  /** Data bytes of every tensor, without the headers of the files that they lie in. */
  readonly tensors: Readonly<Record<string, ManifestEntry & { readonly file: string }>>;
  /** Whole files: all that are no safetensors files, this one excepted. */
  readonly files: Readonly<Record<string, ManifestEntry>>;
}

export interface ManifestEntry {
  readonly bytes: number;
  /** Hexadecimal. */
  readonly sha256: string;
}

export const manifestFileName = 'manifest.json';

const maxManifestBytes = 64 * 2 ** 20;

/**
 * Reads the manifest of a store; whether it is true is another matter.
 * @returns null where there is none: a store of another origin, or of an earlier version
 * @throws CheckpointError where it is damaged
 */
export async function readManifest(dir: string): Promise<StoreManifest | null> {
  const path = join(dir, manifestFileName);
  if (!existsSync(path)) return null;
  const parsed = manifestFile.safeParse(await readJsonFile(path, maxManifestBytes));
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0]!;
  throw new CheckpointError(`${path} is damaged: ${issue.path.join('.')}: ${issue.message}`);
}

// Plain names: nothing that a manifest says leads out of the store's folder.
const plainName = z.string().regex(/^[A-Za-z0-9_][A-Za-z0-9._-]*$/);
const entry = { bytes: z.int().min(0), sha256: z.string().regex(/^[0-9a-f]{64}$/) };
const manifestFile = z.object({
  version: z.literal(1),
  hash: z.literal('sha256'),
  tensors: z.record(z.string(), z.object({ file: plainName, ...entry })),
  files: z.record(plainName, z.object(entry)),
});
