import type { TextStream } from '../../../model/tokenizer/stream-decoder.js';
import type { Tokenizer } from '../../../model/tokenizer/tokenizer.js';

/** What single tokens read as in the middle of a text. */
export class TokenTexts {
  private readonly texts = new Map<number, string>();
  /** A token that ends in a letter: a decoder drops the space that a text begins with. */
  private readonly before: number | null;

  /** @param tokenizer null: tokens have no text */
  constructor(private readonly tokenizer: Tokenizer | null) {
    this.before = tokenizer?.encode('a').at(-1) ?? null;
  }

  stream(): TextStream | null {
    return this.tokenizer?.stream() ?? null;
  }

  textOf(id: number): string {
    let text = this.texts.get(id);
    if (text === undefined) this.texts.set(id, (text = this.read(id)));
    return text;
  }

  private read(id: number): string {
    if (this.tokenizer === null || this.before === null) return nameOf(id);
    const stream = this.tokenizer.stream();
    const held = stream.push(this.before);
    const text = (held + stream.push(id) + stream.flush()).slice(held.length);
    if (text === '') return this.tokenizer.detokenize([id]) || nameOf(id); // a control token
    return text.includes('\ufffd') ? nameOf(id) : text; // part of a character, or no text at all
  }
}

/** As vLLM writes tokens that are to be told by their ids. */
export function nameOf(id: number): string {
  return `token_id:${id}`;
}

export function codePoints(text: string): number {
  let count = 0;
  for (const _ of text) count++;
  return count;
}
