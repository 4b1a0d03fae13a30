import type { TextStream } from '../../model/tokenizer/stream-decoder.js';
import type { Tokenizer } from '../../model/tokenizer/tokenizer.js';
import type { TokenLogprob } from './request.js';

/** What of a blank became final: text, and the tokens that it is the text of. */
export interface FinalPart {
  readonly text: string;
  readonly tokens: readonly TokenLogprob[];
}

/**
 * The text of one blank as its tokens come, with stop strings. Text that may be the beginning of a stop string is held back until that is
 * decided, and tokens go with their text.
 */
export class BlankText {
  /** Final text of the decoder; `sent` characters of it have been handed out, `unsent` are the others. */
  private text = '';
  private unsent = '';
  private sent = 0;
  private readonly tokens: TokenLogprob[] = [];
  private sentTokens = 0;
  /** Length of `text` up to which tokens 0..i reach; unknown (not there yet) while the decoder holds some of it back. */
  private readonly ends: number[] = [];
  private readonly stream: TextStream | null;

  /** Without a tokenizer all text is empty and nothing stops. */
  constructor(
    private readonly tokenizer: Tokenizer | null,
    private readonly stopStrings: readonly string[],
  ) {
    this.stream = tokenizer?.stream() ?? null;
  }

  /** @returns what became final, and whether a stop string was hit; after a hit only {@link result} may be asked */
  push(token: TokenLogprob): { part: FinalPart; isStopped: boolean } {
    this.tokens.push(token);
    return this.append(this.stream?.push([token.token]) ?? '', this.stream?.isHolding ?? false);
  }

  /** Ends the blank: the rest of the text, which may still hold a stop string. */
  finish(): { part: FinalPart; isStopped: boolean } {
    const ended = this.append(this.stream?.flush() ?? '', false);
    if (ended.isStopped) return ended;
    const rest = this.take(this.text.length);
    return { part: { text: ended.part.text + rest.text, tokens: [...ended.part.tokens, ...rest.tokens] }, isStopped: false };
  }

  /** The blank's tokens (after a stop string: those that lie wholly before it) and its text, as `detokenize` writes it. */
  result(): { tokens: number[]; text: string } {
    const ids = this.tokens.map(({ token }) => token);
    if (this.tokenizer === null) return { tokens: ids, text: '' };
    // Cut inside a token, the text has more than the tokens.
    const more = this.text.slice(this.decode(ids.length).length);
    return { tokens: ids, text: this.tokenizer.detokenize(ids) + more };
  }

  private append(text: string, isHolding: boolean): { part: FinalPart; isStopped: boolean } {
    const from = Math.max(0, this.text.length - longest(this.stopStrings) + 1); // a stop string may have begun in earlier text
    this.text += text;
    this.unsent += text;
    if (!isHolding) while (this.ends.length < this.tokens.length) this.ends.push(this.text.length);
    if (this.stopStrings.length === 0) return { part: this.take(this.text.length), isStopped: false };
    const hits = this.stopStrings.map((stop) => this.text.indexOf(stop, from)).filter((at) => at >= 0);
    if (hits.length === 0) return { part: this.take(this.text.length - this.undecidedLength()), isStopped: false };
    this.cut(Math.min(...hits));
    return { part: this.take(this.text.length), isStopped: true };
  }

  /** Length of the longest end of the text that a stop string begins with. */
  private undecidedLength(): number {
    for (let length = Math.min(this.text.length, longest(this.stopStrings) - 1); length > 0; length--) {
      const end = this.text.slice(-length);
      if (this.stopStrings.some((stop) => stop.startsWith(end))) return length;
    }
    return 0;
  }

  private cut(length: number): void {
    this.text = this.text.slice(0, length);
    this.unsent = this.text.slice(this.sent);
    while (!this.text.startsWith(this.decode(this.tokens.length))) this.tokens.pop();
    this.ends.length = 0;
    this.ends.push(...this.tokens.map(() => length)); // all of them are final now
  }

  /** Text of the first `count` tokens alone. Not `Tokenizer.decode`, which refuses image tokens: they can be generated. */
  private decode(count: number): string {
    const stream = this.tokenizer!.stream();
    return stream.push(this.tokens.slice(0, count).map(({ token }) => token)) + stream.flush();
  }

  private take(length: number): FinalPart {
    // Of the unsent part: a slice of the whole text would copy all of it for every token.
    const text = this.unsent.slice(0, Math.max(0, length - this.sent));
    this.unsent = this.unsent.slice(text.length);
    this.sent += text.length;
    const first = this.sentTokens;
    while (this.sentTokens < this.ends.length && this.ends[this.sentTokens]! <= length) this.sentTokens++;
    return { text, tokens: this.tokens.slice(first, this.sentTokens) };
  }
}

function longest(texts: readonly string[]): number {
  return Math.max(0, ...texts.map((text) => text.length));
}
