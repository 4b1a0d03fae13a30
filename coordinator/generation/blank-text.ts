import type { TextStream } from '../../model/tokenizer/stream-decoder.js';
import type { Tokenizer } from '../../model/tokenizer/tokenizer.js';

/** What of a blank became final: text, and the tokens that it is the text of. */
export interface FinalPart {
  readonly text: string;
  readonly tokens: readonly number[];
}

/**
 * The text of one blank as its tokens come, with stop strings. Text that may be the beginning of a stop string is held back until that is
 * decided, and tokens go with their text.
 */
export class BlankText {
  /** A stop string was hit; from then on only {@link result} may be asked. */
  isStopped = false;
  private readonly tokens: number[] = [];
  private sentTokens = 0;
  private readonly stream: TextStream | null;
  private readonly longestStop: number;
  // The rest is of use where there are stop strings only.
  /** Final text of the decoder; `sent` characters of it have been handed out, `unsent` are the others. */
  private text = '';
  private unsent = '';
  private sent = 0;
  /** Length of `text` up to which tokens 0..i reach; unknown (not there yet) while the decoder holds some of it back. */
  private readonly ends: number[] = [];

  /** Without a tokenizer all text is empty and nothing stops. */
  constructor(
    private readonly tokenizer: Tokenizer | null,
    private readonly stopStrings: readonly string[],
  ) {
    this.stream = tokenizer?.stream() ?? null;
    this.longestStop = Math.max(0, ...stopStrings.map((stop) => stop.length));
  }

  /** @returns what became final */
  push(token: number): FinalPart {
    this.tokens.push(token);
    const { stream } = this;
    if (stream === null) return this.append('', false);
    const text = stream.push(token);
    return this.append(text, stream.isHolding);
  }

  /** Ends the blank. @returns the rest of the text, which may still hold a stop string */
  finish(): FinalPart {
    const ended = this.append(this.stream?.flush() ?? '', false);
    if (this.isStopped || this.longestStop === 0) return ended;
    const rest = this.take(this.text.length);
    return { text: ended.text + rest.text, tokens: [...ended.tokens, ...rest.tokens] };
  }

  /** The blank's tokens (after a stop string: those that lie wholly before it) and its text, as `detokenize` writes it. */
  result(): { readonly tokens: readonly number[]; readonly text: string } {
    const { tokens } = this;
    if (this.tokenizer === null) return { tokens, text: '' };
    // Cut inside a token, the text has more than the tokens.
    const more = this.isStopped ? this.text.slice(this.decode(tokens.length).length) : '';
    return { tokens, text: this.tokenizer.detokenize(tokens) + more };
  }

  private append(text: string, isHolding: boolean): FinalPart {
    if (this.longestStop === 0) {
      if (isHolding) return { text, tokens: NO_TOKENS };
      const first = this.sentTokens;
      const { length } = this.tokens;
      this.sentTokens = length;
      return { text, tokens: length === first + 1 ? [this.tokens[first]!] : this.tokens.slice(first) };
    }
    const from = Math.max(0, this.text.length - this.longestStop + 1); // a stop string may have begun in earlier text
    this.text += text;
    this.unsent += text;
    if (!isHolding) while (this.ends.length < this.tokens.length) this.ends.push(this.text.length);
    const hits = this.stopStrings.map((stop) => this.text.indexOf(stop, from)).filter((at) => at >= 0);
    if (hits.length === 0) return this.take(this.text.length - this.undecidedLength());
    this.isStopped = true;
    this.cut(Math.min(...hits));
    return this.take(this.text.length);
  }

  /** Length of the longest end of the text that a stop string begins with. */
  private undecidedLength(): number {
    for (let length = Math.min(this.text.length, this.longestStop - 1); length > 0; length--) {
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
    let text = '';
    for (let i = 0; i < count; i++) text += stream.push(this.tokens[i]!);
    return text + stream.flush();
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

const NO_TOKENS: readonly number[] = [];
