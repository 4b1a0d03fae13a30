import { randomBytes } from 'node:crypto';
import { existsSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { packageRoot } from '../../common/package-root.js';
import { importCheckpoint } from '../import/import-checkpoint.js';
import { putInPlace } from '../store/new-folder.js';
import { configFileName } from '../store/store-format.js';

/** The tiny trained model that ships with the project: `sat/`, `config.json`, `tokenizer.model`, `eval/`, `prompts.txt`. */
export const tinyModelDir: string = join(packageRoot, 'model', 'tiny');

/** Its model store, built on first use. */
export const tinyStoreDir: string = join(tinyModelDir, 'store');

/**
 * Imports the tiny model where its store does not exist yet. Several processes may do so at once: each builds its own, the first one puts
 * it in place and the others use that.
 * @returns {@link tinyStoreDir}
 */
export async function ensureTinyStore(): Promise<string> {
  if (isStore(tinyStoreDir)) return tinyStoreDir;
  const mine = `${tinyStoreDir}-${process.pid}-${randomBytes(4).toString('hex')}`;
  try {
    await importCheckpoint({
      from: join(tinyModelDir, 'sat'),
      to: mine,
      configPath: join(tinyModelDir, 'config.json'),
      tokenizerPath: join(tinyModelDir, 'tokenizer.model'),
    });
    await putInPlace(mine, tinyStoreDir);
  } catch (error) {
    if (!isStore(tinyStoreDir)) throw error;
  } finally {
    await rm(mine, { recursive: true, force: true });
  }
  return tinyStoreDir;
}

/** A store appears as a whole, so its configuration stands for all of it. */
function isStore(dir: string): boolean {
  return existsSync(join(dir, configFileName));
}
