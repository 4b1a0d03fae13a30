import { existsSync } from 'node:fs';
import { readdir } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { CheckpointError } from '../../common/errors.js';
import { readTextFile } from '../store/read-json-file.js';
import { TorchFile } from './read-torch.js';

/** GLM-130B's own distribution: a folder with `latest` and one torch.save file for each tensor-parallel rank (model-spec section 1.1). */
export class SatCheckpoint {
  private constructor(
    readonly dir: string,
    /** An integer > 0, or `release`. */
    readonly iteration: string,
    /** Indexed by rank. */
    readonly ranks: readonly TorchFile[],
  ) {}

  /** @throws CheckpointError where a file is missing or damaged */
  static async open(dir: string): Promise<SatCheckpoint> {
    const path = resolve(dir);
    const iteration = await readIteration(path);
    const folder = join(path, iteration);
    const ranks: TorchFile[] = [];
    try {
      for (const name of await listRankFiles(folder)) ranks.push(await TorchFile.open(join(folder, name)));
      return new SatCheckpoint(path, iteration, ranks);
    } catch (error) {
      await closeAll(ranks);
      throw error;
    }
  }

  async close(): Promise<void> {
    await closeAll(this.ranks);
  }
}

/** `latest`, as SAT's loader reads it: white space around is dropped, and 049 means folder 49. */
async function readIteration(dir: string): Promise<string> {
  const path = join(dir, 'latest');
  if (!existsSync(path)) throw new CheckpointError(`${dir} is no SAT checkpoint: ${path} does not exist`);
  const text = (await readTextFile(path, 1024)).trim();
  if (text === 'release') return text;
  const iteration = /^[0-9]{1,15}$/.test(text) ? Number(text) : 0;
  if (iteration === 0) {
    throw new CheckpointError(`${path} says ${JSON.stringify(text.slice(0, 40))}, it should hold an iteration above 0 or the word release`);
  }
  return String(iteration);
}

/** Names in the order of the ranks, from 0 on without a gap. */
async function listRankFiles(folder: string): Promise<string[]> {
  const names = await readdir(folder).catch((error: NodeJS.ErrnoException) => {
    throw new CheckpointError(`${folder}, which \`latest\` names, cannot be read (${error.code})`);
  });
  const found = new Set(names.filter((name) => /^mp_rank_\d{2,4}_model_states\.pt$/.test(name)));
  if (found.size === 0) throw new CheckpointError(`${folder} has no file mp_rank_00_model_states.pt`);
  return Array.from({ length: found.size }, (_, rank) => {
    const name = `mp_rank_${String(rank).padStart(2, '0')}_model_states.pt`;
    if (!found.has(name)) {
      throw new CheckpointError(
        `${join(folder, name)} is missing: ${found.size} rank files were found, so ranks 0 to ${found.size - 1} are needed`,
      );
    }
    return name;
  });
}

async function closeAll(files: readonly TorchFile[]): Promise<void> {
  for (const file of files) await file.close();
}
