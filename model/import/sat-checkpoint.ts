import { existsSync, statSync } from 'node:fs';
import { readdir } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { CheckpointError } from '../../common/errors.js';
import { readTextFile } from '../store/read-json-file.js';
import { findParts } from './archive-parts.js';
import { ByteSource } from './byte-source.js';
import { explainByParts } from './misplaced-bytes.js';
import { TorchFile } from './read-torch.js';
import { indexTar, type TarMember } from './tar-index.js';

/**
 * GLM-130B's own distribution: a folder with `latest` and one torch.save file for each tensor-parallel rank (model-spec section 1.1), or a tar
 * archive of that folder in any number of parts, which is read where it is.
 */
export class SatCheckpoint {
  /** Made by {@link open}. */
  constructor(
    /** Folder of the checkpoint, or of the archive's parts. */
    readonly dir: string,
    /** What to call it. */
    readonly label: string,
    /** Indexed by rank. */
    readonly ranks: readonly TorchFile[],
    private readonly archive: ByteSource | null = null,
  ) {}

  /**
   * @param from the folder; or the archive's parts, one of them, or patterns for them
   * @throws CheckpointError where a file is missing or damaged
   */
  static async open(from: string | readonly string[]): Promise<SatCheckpoint> {
    const paths = (typeof from === 'string' ? [from] : from).map((path) => resolve(path));
    const [first] = paths as [string];
    const isFolder = paths.length === 1 && (statSync(first, { throwIfNoEntry: false })?.isDirectory() ?? false);
    return isFolder ? openFolder(first) : openArchive(findParts(paths), paths.length === 1 ? first : null);
  }

  /** Files that the tensors lie in. */
  get files(): readonly string[] {
    return this.archive === null ? this.ranks.map(({ path }) => path) : this.archive.extents.map(({ path }) => path);
  }

  /** What an error with the checkpoint's data means, where the archive's parts say more than the error itself. */
  explain(error: unknown): unknown {
    return this.archive === null ? error : explained(error, this.archive);
  }

  async close(): Promise<void> {
    if (this.archive !== null) this.archive.close();
    else for (const file of this.ranks) await file.close();
  }
}

async function openFolder(path: string): Promise<SatCheckpoint> {
  const latest = join(path, 'latest');
  if (!existsSync(latest)) throw new CheckpointError(`${path} is no SAT checkpoint: ${latest} does not exist`);
  const iteration = parseIteration(await readTextFile(latest, 1024), latest);
  const folder = join(path, iteration);
  const names = await readdir(folder).catch((error: NodeJS.ErrnoException) => {
    throw new CheckpointError(`${folder}, which \`latest\` names, cannot be read (${error.code})`);
  });
  const ranks: TorchFile[] = [];
  try {
    for (const name of listRankFiles(names, folder)) ranks.push(await TorchFile.open(join(folder, name)));
    return new SatCheckpoint(path, path, ranks);
  } catch (error) {
    for (const file of ranks) await file.close();
    throw error;
  }
}

async function openArchive(parts: readonly string[], pattern: string | null): Promise<SatCheckpoint> {
  const label = pattern ?? (parts.length === 1 ? parts[0]! : `${parts[0]!} and ${parts.length - 1} more parts`);
  const archive = ByteSource.open(parts, label);
  try {
    const members = new Map(indexTar(archive, (needed) => missingEnd(archive, needed)).map((member) => [plainPath(member.name), member]));
    const [root, latest] = findLatest(members, label);
    if (latest.size > 1024) throw new CheckpointError(`${label}: ${latest.name} has ${latest.size} bytes, at most 1024 are read`);
    const iteration = parseIteration(archive.read(latest.offset, latest.size).toString('utf8'), `${label}: ${latest.name}`);
    const folder = root + iteration;
    const names = [...members.keys()].filter((name) => dirname(name) === folder).map((name) => name.slice(folder.length + 1));
    const ranks: TorchFile[] = [];
    for (const name of listRankFiles(names, `${label}: ${folder}`)) {
      const { offset, size } = members.get(`${folder}/${name}`)!;
      ranks.push(await TorchFile.open(archive.section(`${label}: ${folder}/${name}`, offset, size)));
    }
    return new SatCheckpoint(dirname(parts[0]!), label, ranks, archive);
  } catch (error) {
    const better = explained(error, archive);
    archive.close();
    throw better;
  }
}

/** The one `latest` of the archive, and what its folder's names begin with. */
function findLatest(members: ReadonlyMap<string, TarMember>, label: string): [root: string, latest: TarMember] {
  const found = [...members].filter(([name]) => /(^|\/)latest$/.test(name));
  const [only] = found;
  if (only === undefined || found.length > 1) {
    throw new CheckpointError(
      `${label} is an archive of ${members.size} files with ${found.length} named latest, a SAT checkpoint has one`,
    );
  }
  return [only[0].slice(0, -'latest'.length), only[1]];
}

/** Members are found by name; nothing is written by it. */
function plainPath(name: string): string {
  return name.replace(/^(\.?\/)+/, '');
}

function missingEnd(archive: ByteSource, neededBytes: number): string {
  const { extents } = archive;
  const last = extents.at(-1)!;
  const usual = extents[0]!.length;
  if (extents.length < 2) return `: ${last.path} is truncated, or there are more parts`;
  if (last.length < usual) return `: ${last.path}, the last part, is truncated, or parts before it are`;
  const count = Math.ceil((neededBytes - archive.size) / usual);
  return `: ${count === 1 ? 'the part' : `at least ${count} parts`} after ${last.path} ${count === 1 ? 'is' : 'are'} missing`;
}

function explained(error: unknown, archive: ByteSource): unknown {
  const reason = error instanceof CheckpointError ? explainByParts(error, archive) : null;
  return reason === null ? error : new CheckpointError(`${reason} (${(error as Error).message})`, { cause: error });
}

/** `latest`, as SAT's loader reads it: white space around is dropped, and 049 means folder 49. */
function parseIteration(content: string, path: string): string {
  const text = content.trim();
  if (text === 'release') return text;
  const iteration = /^[0-9]{1,15}$/.test(text) ? Number(text) : 0;
  if (iteration === 0) {
    throw new CheckpointError(`${path} says ${JSON.stringify(text.slice(0, 40))}, it should hold an iteration above 0 or the word release`);
  }
  return String(iteration);
}

/** Names in the order of the ranks, from 0 on without a gap. */
function listRankFiles(names: readonly string[], folder: string): string[] {
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
