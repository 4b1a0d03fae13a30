import type { TextStream } from '../../../model/tokenizer/stream-decoder.js';
import type { GenerationDelta, TokenLogprob } from '../../generation/request.js';
import { codePoints, nameOf, type TokenTexts } from './token-texts.js';

/** OpenAI's object of a completion. `text_offset` counts characters (code points) of the choice's text. */
export interface Logprobs {
  readonly tokens: string[];
  readonly token_logprobs: (number | null)[];
  readonly top_logprobs: (Record<string, number> | null)[];
  readonly text_offset: number[];
}

export interface ChoicePart {
  readonly text: string;
  /** Which blank the text is of; null: it stands between two of them, or before all. */
  readonly blank: number | null;
  readonly logprobs: Logprobs | null;
  readonly tokenIds: readonly number[];
}

/** One choice of a completion as its blanks are filled: what was echoed, then the texts of the blanks, joined by newlines. */
export class ChoiceText {
  text = '';
  /** Text of each blank. */
  readonly blanks: string[] = [''];
  readonly tokenIds: number[] = [];
  readonly logprobs: Logprobs = emptyLogprobs();
  /** Of `text`, in code points. */
  private length = 0;
  private sumOfLogprobs = 0;
  private numLogprobs = 0;
  private decoder: TextStream | null;

  /** @param echo comes first */
  constructor(
    private readonly tokens: TokenTexts,
    private echo: ChoicePart | null,
  ) {
    this.decoder = tokens.stream();
    if (echo) this.append(echo);
  }

  /** Mean log-probability of a token; that of no tokens is the worst. */
  get meanLogprob(): number {
    return this.numLogprobs === 0 ? -Number.MAX_VALUE : this.sumOfLogprobs / this.numLogprobs;
  }

  /** @returns what is new, in order: the echo, newlines where a next blank began, the delta */
  add({ blank, text, tokens, logprobs }: GenerationDelta): ChoicePart[] {
    const before = this.goTo(blank);
    const part = { text, blank, logprobs: logprobs && this.toLogprobs(logprobs), tokenIds: tokens };
    this.blanks[blank] += text;
    this.tokenIds.push(...tokens);
    this.append(part);
    return [...before, part];
  }

  /** Blanks that got no text have their newlines, too. */
  finish(numBlanks: number): ChoicePart[] {
    return this.goTo(Math.max(numBlanks, 1) - 1);
  }

  private goTo(blank: number): ChoicePart[] {
    const parts = this.echo ? [this.echo] : [];
    this.echo = null;
    while (this.blanks.length <= blank) {
      this.blanks.push('');
      this.decoder = this.tokens.stream();
      const part = { text: '\n', blank: null, logprobs: null, tokenIds: [] };
      this.append(part);
      parts.push(part);
    }
    return parts;
  }

  private append({ text, logprobs }: ChoicePart): void {
    this.text += text;
    this.length += codePoints(text);
    if (!logprobs) return;
    this.logprobs.tokens.push(...logprobs.tokens);
    this.logprobs.token_logprobs.push(...logprobs.token_logprobs);
    this.logprobs.top_logprobs.push(...logprobs.top_logprobs);
    this.logprobs.text_offset.push(...logprobs.text_offset);
  }

  private toLogprobs(entries: readonly TokenLogprob[]): Logprobs {
    const part = emptyLogprobs();
    let offset = this.length;
    for (const entry of entries) {
      this.sumOfLogprobs += entry.logprob;
      this.numLogprobs += 1;
      part.tokens.push(this.tokens.textOf(entry.token));
      part.token_logprobs.push(entry.logprob);
      part.top_logprobs.push(this.toTop(entry));
      part.text_offset.push(offset);
      offset += codePoints(this.decoder?.push(entry.token) ?? '');
    }
    return part;
  }

  /** The drawn token is always there; tokens that read the same are told apart by their ids. */
  private toTop({ token, logprob, top }: TokenLogprob): Record<string, number> {
    const texts = new Map([[this.tokens.textOf(token), logprob]]);
    for (const each of top) {
      if (each.token === token) continue;
      const text = this.tokens.textOf(each.token);
      texts.set(texts.has(text) ? nameOf(each.token) : text, each.logprob);
    }
    return Object.fromEntries(texts);
  }
}

/** A prompt in front of its completion. GLM's prompt attends both ways, so its tokens have no log-probabilities. @param ids null: without their list */
export function echoPart(tokens: TokenTexts, text: string, ids: readonly number[] | null): ChoicePart {
  if (ids === null) return { text, blank: null, logprobs: null, tokenIds: [] };
  const decoder = tokens.stream();
  const end = codePoints(text);
  const logprobs = emptyLogprobs();
  let offset = 0;
  for (const id of ids) {
    logprobs.tokens.push(tokens.textOf(id));
    logprobs.token_logprobs.push(null);
    logprobs.top_logprobs.push(null);
    logprobs.text_offset.push(offset);
    offset = Math.min(offset + codePoints(decoder?.push(id) ?? ''), end);
  }
  return { text, blank: null, logprobs, tokenIds: [] };
}

function emptyLogprobs(): Logprobs {
  return { tokens: [], token_logprobs: [], top_logprobs: [], text_offset: [] };
}
