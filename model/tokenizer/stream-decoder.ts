/** Turns ids into text as they come. The joined pieces are `decode` of all ids; a piece never splits a character. */
export interface TextStream {
  /** @returns the text that became final; it may be empty */
  push(id: number): string;
  /** Ends the stream. @returns the text that was held back */
  flush(): string;
  /** Text is held back: part of a character, or what may be the beginning of an escape such as `<n>`. */
  readonly isHolding: boolean;
}

/** What an id stands for in text. */
export type Surface =
  | { readonly kind: 'piece'; readonly text: string; readonly isSpaceFirst: boolean; readonly isPlain: boolean } // a first space may be dropped
  | { readonly kind: 'literal'; readonly text: string; readonly isPlain: boolean } // as it is
  | { readonly kind: 'byte'; readonly value: number };

/** Text that no escape begins in. */
export function isPlain(text: string): boolean {
  return !text.includes('<');
}

export interface Surfaces {
  of(id: number): Surface;
  /** Which leading `▁` are dropped before any text has come out: of every piece, of the first piece only, or none. */
  readonly droppedSpaces: 'all' | 'first' | 'none';
}

/**
 * SentencePiece's decoding (SentencePieceProcessor::Decode) and icetk's escapes after it (model-spec section 8), one id at a time.
 * Held back: at most three bytes of a UTF-8 character, and at most the eleven characters that may become `<|blank_80|>`.
 */
export class StreamDecoder implements TextStream {
  private bytes: number[] = [];
  private held = '';
  private atStart = true; // a leading space may still be dropped

  constructor(private readonly surfaces: Surfaces) {}

  get isHolding(): boolean {
    return this.bytes.length > 0 || this.held !== '';
  }

  push(id: number): string {
    const surface = this.surfaces.of(id);
    if (surface.kind === 'byte') {
      this.bytes.push(surface.value);
      return this.unescape(this.begun(this.takeCharacters(false)), false);
    }
    const characters = this.bytes.length > 0 ? this.begun(this.takeCharacters(true)) : '';
    const text = surface.kind === 'piece' && surface.isSpaceFirst ? this.spacedText(surface.text) : surface.text;
    if (surface.isPlain && this.held === '' && characters === '') return this.begun(text);
    return this.unescape(characters + this.begun(text), false);
  }

  flush(): string {
    return this.unescape(this.takeCharacters(true), true);
  }

  /** Spaces behind text stay. */
  private begun(text: string): string {
    if (text !== '') this.atStart = false;
    return text;
  }

  private spacedText(text: string): string {
    if (!this.atStart || this.surfaces.droppedSpaces === 'none') return text;
    if (this.surfaces.droppedSpaces === 'first') this.atStart = false;
    return text.slice(1);
  }

  /** Whole characters of the byte run; bytes that begin none become U+FFFD one by one. At the end of a run nothing is left. */
  private takeCharacters(endOfRun: boolean): string {
    let text = '';
    let at = 0;
    while (at < this.bytes.length) {
      const length = characterLength(this.bytes[at]!);
      const trail = this.bytes.slice(at + 1, at + length);
      const isWhole = trail.length === length - 1;
      if (!isWhole && !endOfRun && trail.every(isTrailByte)) break;
      const codePoint = isWhole ? codePointOf(this.bytes[at]!, trail) : null;
      text += codePoint === null ? REPLACEMENT : String.fromCodePoint(codePoint);
      at += codePoint === null ? 1 : length;
    }
    this.bytes.splice(0, at);
    return text;
  }

  private unescape(more: string, isEnd: boolean): string {
    if (this.held === '' && isPlain(more)) return more;
    const text = (this.held + more).replace(ESCAPE, (escape, blanks?: string) => {
      if (blanks !== undefined) return ' '.repeat(Number(blanks));
      return escape === '<n>' ? '\n' : '\t';
    });
    const final = isEnd ? text.length : text.search(ESCAPE_BEGINNING);
    this.held = final < 0 ? '' : text.slice(final);
    return final < 0 ? text : text.slice(0, final);
  }
}

/** How pieces write a space: ▁ */
export const SPACE = '\u2581';
const REPLACEMENT = '\ufffd';
const ESCAPE = /<n>|<\|tab\|>|<\|blank_([2-9]|[1-7][0-9]|80)\|>/g;
const ESCAPE_BEGINNING = /<(?:n|\|(?:t(?:a(?:b\|?)?)?|b(?:l(?:a(?:n(?:k(?:_(?:[0-9]{1,2}\|?)?)?)?)?)?)?)?)?$/;

/** Bytes of a UTF-8 character that begins with this byte; 1 also for bytes that begin none. */
function characterLength(first: number): number {
  if (first >= 0xc0 && first < 0xe0) return 2;
  if (first >= 0xe0 && first < 0xf0) return 3;
  if (first >= 0xf0 && first < 0xf8) return 4;
  return 1;
}

function isTrailByte(byte: number): boolean {
  return (byte & 0xc0) === 0x80;
}

/** Null for a bad trail byte, an overlong form, a surrogate and what lies beyond Unicode (string_util::DecodeUTF8). */
function codePointOf(first: number, trail: readonly number[]): number | null {
  if (trail.length === 0) return first < 0x80 ? first : null;
  if (!trail.every(isTrailByte)) return null;
  const codePoint = trail.reduce((value, byte) => value * 64 + (byte & 0x3f), first & (0x3f >> trail.length));
  const lowest = [0x80, 0x800, 0x10000][trail.length - 1]!;
  const isCharacter = codePoint >= lowest && codePoint <= 0x10ffff && (codePoint < 0xd800 || codePoint > 0xdfff);
  return isCharacter ? codePoint : null;
}
