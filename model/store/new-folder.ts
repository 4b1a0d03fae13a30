import { randomBytes } from 'node:crypto';
import { mkdir, open, readdir, rename, rm } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { ConfigError } from '../../common/errors.js';

/** A folder that is filled beside its place and renamed into it at the end: the target is either absent or complete. */
export class NewFolder {
  private constructor(
    private readonly target: string,
    /** Where to put the files meanwhile. */
    readonly path: string,
  ) {}

  /** @throws ConfigError where the target exists and is not an empty folder, or cannot be created */
  static async create(dir: string): Promise<NewFolder> {
    const target = resolve(dir);
    await refuseExisting(target);
    const path = join(dirname(target), `.${basename(target)}.partial-${process.pid}-${randomBytes(4).toString('hex')}`);
    await mkdir(path, { recursive: true }).catch((error: NodeJS.ErrnoException) => {
      throw new ConfigError(`${dirname(target)} cannot be written to (${error.code}); choose another target`);
    });
    return new NewFolder(target, path);
  }

  /** Puts the folder in its place. Its files are synced by those who wrote them. */
  async commit(): Promise<void> {
    await putInPlace(this.path, this.target);
  }

  /** Removes what was written. After {@link commit} there is nothing to remove. */
  async dispose(): Promise<void> {
    await rm(this.path, { recursive: true, force: true });
  }
}

/** Renames a folder to `target`, which is absent or empty, and syncs both. @throws ConfigError where somebody else was faster */
export async function putInPlace(folder: string, target: string): Promise<void> {
  await syncPath(folder);
  await refuseExisting(target);
  await rename(folder, target).catch((error: NodeJS.ErrnoException) => {
    // rename(2) replaces an empty folder and no other.
    throw error.code === 'ENOTEMPTY' || error.code === 'EEXIST' ? existsError(target) : error;
  });
  await syncPath(dirname(target));
}

/** @throws ConfigError where `target` exists and is not an empty folder */
export async function refuseExisting(target: string): Promise<void> {
  const content = await readdir(target).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return [];
    throw new ConfigError(`target ${target} is no folder or cannot be read (${error.code}); choose another target`);
  });
  if (content.length > 0) throw existsError(target);
}

function existsError(target: string): ConfigError {
  return new ConfigError(`target ${target} exists and is not empty; remove it or choose another target`);
}

export async function syncPath(path: string): Promise<void> {
  const handle = await open(path, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}
