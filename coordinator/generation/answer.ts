import type { Context, PromptModel } from '../../model/tokenizer/prompt.js';
import type { Blank } from './request.js';

/** One answer as its blanks are filled (model-spec section 6, rules 5 and 7). With beams: the answer of one rank of the beams. */
export class Answer {
  readonly blanks: Blank[] = [];
  private styled = '';
  /** Where the text after the last filled blank begins in the row. */
  private rest = 0;

  constructor(
    private readonly context: Context,
    private readonly model: PromptModel,
  ) {}

  /** @returns the row with the blank in the place of its mask (unidirectional: at the end) */
  fill(row: readonly number[], blank: Blank): number[] {
    const { maskPosition, tokens } = blank;
    const space = this.context.isEnglish ? ' ' : '';
    const isGmask = this.context.maskToken === this.model.config.specialTokens.gmask;
    const [begin, end] = isGmask ? ['\x1b[4m', '\x1b[0m'] : ['\x1b[0;32m\x1b[4m', '\x1b[0m\x1b[0m'];
    this.styled += this.detokenize(row.slice(this.rest, maskPosition)) + space + begin + blank.text + end + space;
    this.rest = maskPosition + tokens.length;
    this.blanks.push(blank);
    return [...row.slice(0, maskPosition), ...tokens, ...row.slice(maskPosition + 1)];
  }

  /** The answer of a row whose blanks are all filled; a final `</s>` is dropped. Texts are empty without a tokenizer. */
  complete(row: readonly number[]): { ids: readonly number[]; text: string; styledText: string } {
    const ids = row.at(-1) === this.model.config.specialTokens.eos ? row.slice(0, -1) : row;
    if (this.model.tokenizer === null) return { ids, text: '', styledText: '' };
    return { ids, text: this.detokenize(ids), styledText: this.styled + this.detokenize(ids.slice(this.rest)) };
  }

  private detokenize(ids: readonly number[]): string {
    return this.model.tokenizer?.detokenize(ids) ?? '';
  }
}
