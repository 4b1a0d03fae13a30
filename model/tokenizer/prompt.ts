import { InvalidRequestError, PromptTooLongError } from '../../common/errors.js';
import type { ModelConfig } from '../model-config.js';
import type { Tokenizer } from './tokenizer.js';

/** A prompt as text (tokenised here) or as token ids (taken as they are, without `<sop>`). */
export type Prompt = TextPrompt | { readonly kind: 'ids'; readonly ids: readonly number[] };

export interface TextPrompt {
  readonly kind: 'text';
  readonly text: string;
  /** What the text is encoded to (a prompt by `encodePrompt`, a choice by `encode`), where somebody has done that before. */
  readonly ids?: readonly number[];
}

/**
 * How the context is built from the prompt:
 * - `fill-blanks`: GLM-130B's generate.py (model-spec section 6): every mask of the first kind present in the prompt is filled, one after
 *   another; a prompt without a mask is continued after an appended [gMASK]. Text that does not end in a mask gets `</s>`; ids do not.
 * - `mask`, `gmask`: one span, as evaluation builds it (section 3.2): for the first [MASK] / [gMASK] of the prompt, appended if there is none; never `</s>`.
 * - `unidirectional`: `[gMASK] <sop>` in front of the prompt, causal attention, the prompt is continued.
 */
export type Mode = 'fill-blanks' | 'mask' | 'gmask' | 'unidirectional';

/** What turns prompts into contexts, and rows back into text. */
export interface PromptModel {
  readonly config: Pick<ModelConfig, 'vocabSize' | 'maxSequenceLength' | 'specialTokens'>;
  /** Null: served by token ids alone. */
  readonly tokenizer: Tokenizer | null;
}

/** The token row of a prompt and how its blanks are to be filled. */
export interface Context {
  /** Without `<sop>`; unidirectional also without the `[gMASK]` in front. */
  readonly row: readonly number[];
  /** The token that blanks are filled in for. */
  readonly maskToken: number;
  /** The prompt had no mask of this kind: it was appended (unidirectional: stands in front). */
  readonly isMaskAppended: boolean;
  /** Position ids of `<sop>` and the generated tokens: all the mask's, or counting on after the context (section 3). */
  readonly positions: 'mask' | 'running';
  readonly bidirectional: boolean;
  /** The prompt is ASCII: decides blanks in the styled answer (section 6.7), nothing else. */
  readonly isEnglish: boolean;
}

/**
 * Model-spec section 6, rules 1 to 3, and section 3.2. Mask words are known in text of every mode. A `<sop>` at the end of given ids is
 * the one that is appended anyway, and dropped; elsewhere it is a token like any other. Text with `MASK]` outside of a mask word is text without a mask: unlike generate.py, which then fills nothing, it is continued.
 *
 * @throws InvalidRequestError text without a tokenizer, an id that is not in the vocabulary, a mask in unidirectional mode
 * @throws PromptTooLongError text of more than 80 characters for each token that the model takes
 */
export function buildContext(prompt: Prompt, mode: Mode, model: PromptModel): Context {
  const { mask, gmask, smask, eos } = model.config.specialTokens;
  const ids =
    prompt.kind === 'ids'
      ? withoutFinalSop(checkIds(prompt.ids, 'prompt', model), model)
      : (prompt.ids ?? checkedTokenizer(prompt.text, 'prompt', model).encodePrompt(prompt.text));
  // Ids that do not fit the model anyway need no text: whoever asks for a context measures it next.
  const fits = ids.length <= model.config.maxSequenceLength;
  const isEnglish = isAscii(prompt.kind === 'text' ? prompt.text : fits ? (model.tokenizer?.detokenize(ids) ?? '') : '');

  if (mode === 'unidirectional') {
    const found = [mask, gmask, smask].find((token) => ids.includes(token));
    if (found !== undefined) {
      throw new InvalidRequestError(
        `a unidirectional prompt is continued and has no masks, this one has token ${found}: use mode fill-blanks`,
        'mode',
      );
    }
    return { row: ids, maskToken: gmask, isMaskAppended: true, positions: 'running', bidirectional: false, isEnglish };
  }

  const firstKind = [mask, smask].find((token) => ids.includes(token)) ?? gmask; // rule 1
  const maskToken = mode === 'fill-blanks' ? firstKind : mode === 'mask' ? mask : gmask;
  const isMaskAppended = !ids.includes(maskToken);
  const row = isMaskAppended ? [...ids, maskToken] : [...ids];
  const endsInMask = isMaskAppended || (prompt.kind === 'text' && prompt.text.endsWith('MASK]'));
  if (mode === 'fill-blanks' && prompt.kind === 'text' && !endsInMask) row.push(eos); // rule 3
  return { row, maskToken, isMaskAppended, positions: maskToken === gmask ? 'running' : 'mask', bidirectional: true, isEnglish };
}

/** Rows of the original code end in `<sop>`; here every blank gets its own. */
function withoutFinalSop(ids: readonly number[], model: PromptModel): readonly number[] {
  return ids.at(-1) === model.config.specialTokens.sop ? ids.slice(0, -1) : ids;
}

/**
 * Ids of a text in which mask words are ordinary text, or given ids, checked. `what` names them in the message.
 * @throws InvalidRequestError, PromptTooLongError as {@link buildContext}
 */
export function encodePlain(prompt: Prompt, what: string, model: PromptModel): readonly number[] {
  if (prompt.kind === 'ids') return checkIds(prompt.ids, what, model);
  return prompt.ids ?? checkedTokenizer(prompt.text, what, model).encode(prompt.text);
}

/** @throws InvalidRequestError an id is no integer or not in the vocabulary, padding rows included */
export function checkIds(ids: readonly number[], what: string, model: PromptModel, field = what): readonly number[] {
  const { vocabSize } = model.config;
  for (const [i, id] of ids.entries()) {
    if (!Number.isInteger(id) || id < 0 || id >= vocabSize) {
      throw new InvalidRequestError(`${what} id ${i} is ${id}, ids of this model are integers from 0 to ${vocabSize - 1}`, field);
    }
  }
  return ids;
}

/** No token stands for more text than the longest run of blanks does. */
const MAX_CHARACTERS_PER_TOKEN = 80;

/**
 * The tokenizer, for a text that can fit the model: what can not is refused before time goes into its tokens.
 * @throws InvalidRequestError, PromptTooLongError as {@link buildContext}
 */
export function checkedTokenizer(text: string, what: string, model: PromptModel): Tokenizer {
  if (model.tokenizer === null) throw new InvalidRequestError('this model has no tokenizer: send token ids', what);
  const { maxSequenceLength } = model.config;
  if (text.length > maxSequenceLength * MAX_CHARACTERS_PER_TOKEN) {
    throw new PromptTooLongError(
      `the text of the ${what} has ${text.length} characters, more than ${maxSequenceLength} tokens can stand for: ` +
        `shorten it to ${maxSequenceLength * MAX_CHARACTERS_PER_TOKEN} or less`,
    );
  }
  return model.tokenizer;
}

function isAscii(text: string): boolean {
  for (let i = 0; i < text.length; i++) if (text.charCodeAt(i) > 0x7f) return false;
  return true;
}
