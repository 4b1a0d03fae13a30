import { CheckpointError } from '../../common/errors.js';
import type { ByteSource, Extent } from './byte-source.js';

/** Something that has to stand in one place of an archive (a header) does not. */
export class MisplacedBytesError extends CheckpointError {
  /**
   * @param place where it should be
   * @param isRight whether bytes are what should be there
   */
  constructor(
    message: string,
    readonly place: readonly Extent[],
    readonly isRight: (bytes: Buffer) => boolean,
  ) {
    super(message);
  }
}

/**
 * Says which part of a split archive is at fault, given what went wrong with the whole.
 * @param parts the archive, a file for each part
 * @returns null where nothing more can be said
 */
export function explainByParts(error: unknown, parts: ByteSource): string | null {
  if (parts.extents.length < 2) return null;
  return truncatedPart(parts.extents) ?? (error instanceof MisplacedBytesError ? misplacedPart(error, parts) : null);
}

/** `split` makes parts of one size, and the last one takes the rest. */
function truncatedPart(parts: readonly Extent[]): string | null {
  const sizes = parts.slice(0, -1).map(({ length }) => length);
  const usual = Math.max(...sizes);
  const short = parts.slice(0, -1).filter(({ length }) => length !== usual);
  const last = parts.at(-1)!;
  if (last.length > usual)
    return `${last.path} has ${last.length} bytes, the parts before it ${usual}: it is not the last part, or the others are truncated`;
  if (short.length === 0 || short.length === sizes.length - 1) return null;
  const [{ path, length }] = short as [Extent];
  return `${path} has ${length} bytes, other parts ${usual}: it is truncated${short.length > 1 ? `, and so are ${short.length - 1} others` : ''}; fetch it again`;
}

/** Looks for what is not in its place at the same place of the other parts. */
function misplacedPart({ place, isRight }: MisplacedBytesError, parts: ByteSource): string | null {
  const [at] = place;
  if (at === undefined || place.length > 1) return null;
  const here = parts.extents.find(({ path }) => path === at.path);
  if (here === undefined) return null;
  let start = 0;
  for (const part of parts.extents) {
    const fits = at.offset + at.length <= part.length;
    if (part !== here && fits && isRight(parts.read(start + at.offset, at.length))) {
      return `${here.path} holds the content of another part, and ${part.path} holds that of ${here.path}: they were swapped or renamed`;
    }
    start += part.length;
  }
  return `${here.path} is damaged at byte ${at.offset}, or is no part of this archive; fetch it again`;
}
