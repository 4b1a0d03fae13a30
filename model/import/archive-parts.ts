import { readdirSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { CheckpointError, ConfigError } from '../../common/errors.js';

/**
 * The files that `--from` names, where that is no folder: paths, or a pattern in the last component (`*` and `?`), put in the order of their names.
 * @throws ConfigError where nothing matches
 * @throws CheckpointError where a part is missing between the first and the last
 */
export function findParts(from: readonly string[]): string[] {
  const paths = from.flatMap((each) => (/[*?]/.test(basename(each)) ? matching(each) : [each]));
  const numbered = numberParts([...new Set(paths)].sort());
  const missing = numbered === null ? null : missingPart(numbered);
  if (missing !== null) throw new CheckpointError(missing);
  return numbered === null ? [...new Set(paths)].sort() : numbered.map(({ path }) => path);
}

interface NumberedPart {
  readonly path: string;
  readonly index: number;
}

function matching(pattern: string): string[] {
  const folder = dirname(pattern);
  const escaped = basename(pattern).replaceAll(/[.+^${}()|[\]\\]/g, '\\$&');
  const expression = new RegExp(`^${escaped.replaceAll('*', '.*').replaceAll('?', '.')}$`, 's');
  let names: string[];
  try {
    names = readdirSync(folder).filter((name) => expression.test(name) && !name.startsWith('.'));
  } catch (error) {
    throw new ConfigError(`${folder} cannot be read (${(error as NodeJS.ErrnoException).code})`);
  }
  if (names.length === 0) throw new ConfigError(`no file matches ${pattern}`);
  return names.map((name) => join(folder, name));
}

/** In order, where the names differ in a number at the end, or in letters as `split` writes them (aa, ab, ...); else null. */
function numberParts(paths: readonly string[]): NumberedPart[] | null {
  if (paths.length < 2) return null;
  const suffixes = suffixesOf(paths);
  const width = suffixes[0]!.length;
  const isNumber = suffixes.every((suffix) => /^\d{1,9}$/.test(suffix));
  if (!isNumber && !suffixes.every((suffix) => /^[a-z]{1,6}$/.test(suffix) && suffix.length === width)) return null;
  const indexOf = (suffix: string): number =>
    isNumber ? Number(suffix) : [...suffix].reduce((sum, letter) => 26 * sum + letter.charCodeAt(0) - 97, 0);
  return paths.map((path, i) => ({ path, index: indexOf(suffixes[i]!) })).sort((a, b) => a.index - b.index);
}

/** What follows the last dot, dash or underscore, or the digits at the end. The rest has to be the same for all, or they are no series. */
function suffixesOf(paths: readonly string[]): string[] {
  const split = paths
    .map((path) => /^(.*?)(\d+|[._-]([a-z]+))$/s.exec(path))
    .map((match) => [match?.[1] ?? '', match?.[3] ?? match?.[2] ?? '']);
  const isSeries = new Set(split.map(([stem]) => stem)).size === 1;
  return isSeries ? split.map(([, suffix]) => suffix!) : paths.map(() => '');
}

/** Series begin at 0 (part_00, aa) or 1. */
function missingPart(parts: readonly NumberedPart[]): string | null {
  const first = parts[0]!;
  const last = parts.at(-1)!;
  if (first.index > 1) {
    return `the first parts are missing: ${first.path} is the first of ${parts.length} that are there; fetch those before it`;
  }
  const gap = parts.findIndex(({ index }, i) => i > 0 && index !== parts[i - 1]!.index + 1);
  if (gap === -1) return null;
  const before = parts[gap - 1]!;
  const after = parts[gap]!;
  if (before.index === after.index) return `${before.path} and ${after.path} have the same number; give one of them`;
  const count = after.index - before.index - 1;
  return (
    `${count === 1 ? 'a part is' : `${count} parts are`} missing between ${before.path} and ${basename(after.path)}: ` +
    `${parts.length} parts were found, up to ${basename(last.path)}`
  );
}
