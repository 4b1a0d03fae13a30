/** What a client asks of the model, already validated, and what comes back: plain values, no wire types. */

import type { Mode, Prompt } from '../../model/tokenizer/prompt.js';

export type { Mode, Prompt };

export interface GenerationRequest {
  readonly prompt: Prompt;
  readonly mode: Mode;
  /** Most new tokens of one blank; null: no limit but the next two. */
  readonly maxNewTokens: number | null;
  /** Most tokens of a row, context and `<sop>` included (`out_seq_length` of generate.py); null: the model's longest sequence. */
  readonly maxRowTokens: number | null;
  /** End tokens are banned for the first minNewTokens tokens of each blank. */
  readonly minNewTokens: number;
  /** Used without beams. Temperature 0 is greedy. */
  readonly sampling: { readonly temperature: number; readonly topK: number; readonly topP: number };
  /** Null: sampling. */
  readonly beams: BeamParams | null;
  /** Independent samples; 1 with beams. */
  readonly n: number;
  readonly seed: bigint;
  /** Null: `<eop>` and `</s>`. Empty: generation ends by length only. */
  readonly endTokens: readonly number[] | null;
  /** Never generated. */
  readonly bannedTokens: readonly number[];
  /** Generation of a blank ends where one of these appears in its text; the text is cut before it. Not with beams. */
  readonly stopStrings: readonly string[];
  /** Changes of the logits before temperature. Not with beams. */
  readonly logitBias: readonly { readonly token: number; readonly bias: number }[];
  readonly penalties: Penalties;
  /** Null: no log-probabilities; k: those of the sampled tokens and of the k best of each step. Not with beams. */
  readonly topLogprobs: number | null;
}

/** Of tokens that are there already. OpenAI's: logit - presence - frequency * count in this output; CTRL's: StepSampling in strategy.ts. */
export interface Penalties {
  readonly presence: number;
  readonly frequency: number;
  /** Counts the prompt, too; 1: off. */
  readonly repetition: number;
}

export const NO_PENALTIES: Penalties = { presence: 0, frequency: 0, repetition: 1 };

/** Section 5 of the model spec. */
export interface BeamParams {
  readonly numBeams: number;
  readonly lengthPenalty: number;
  readonly noRepeatNgramSize: number;
  /** False: candidates are drawn without replacement, as generate.py does. */
  readonly deterministic: boolean;
  readonly considerEnd: boolean;
  /** LAMBADA variant: token sequences that a beam may not begin with. */
  readonly bannedPrefixes: readonly (readonly number[])[];
  /** Evaluation pads its contexts with token 0, and the pads count in the row that beam search measures (section 3.2): length of that row. */
  readonly paddedLength?: number;
}

/** New text of one blank of one output, as soon as it is final. Pieces never split a character; joined, they are `decode` of the blank's tokens. */
export interface GenerationDelta {
  readonly output: number;
  readonly blank: number;
  readonly text: string;
  readonly tokens: readonly number[];
  /** One for each token where the request asks for them, else null. */
  readonly logprobs: readonly TokenLogprob[] | null;
}

export interface TokenLogprob {
  readonly token: number;
  readonly logprob: number;
  readonly top: readonly { readonly token: number; readonly logprob: number }[];
}

export interface GenerationResult {
  /** One for each sample; one with beams. */
  readonly outputs: readonly GenerationOutput[];
  /** The context of the first blank without its `<sop>`: masks and `</s>` that were added count. */
  readonly promptTokens: number;
  /** All generated tokens of all outputs and blanks (of beams: of the best one), end tokens included. */
  readonly generatedTokens: number;
}

/** `end`: an end token; `stop`: a stop string; `length`: a limit. Of the last blank. */
export type FinishReason = 'end' | 'stop' | 'length';

export interface GenerationOutput {
  readonly finish: FinishReason;
  /** The whole answer as generate.py prints it (`detokenize`); empty without a tokenizer. */
  readonly text: string;
  /** The same with filled blanks underlined (`answer_with_style`); empty without a tokenizer. */
  readonly styledText: string;
  /** The whole row, blanks filled in, without `<sop>`, the final `<eos>` and end tokens. */
  readonly ids: readonly number[];
  readonly blanks: readonly Blank[];
  /** With beams: the last blank's beams, best first; else empty. */
  readonly beams: readonly Beam[];
}

export interface Blank {
  /** `detokenize` of the tokens; empty without a tokenizer. After a stop string also the part of the next token that is before it. */
  readonly text: string;
  readonly tokens: readonly number[];
  /** Of which token the blank takes the place, in the row it was filled in; unidirectional: the row's length. */
  readonly maskPosition: number;
  readonly finish: FinishReason;
}

export interface Beam {
  readonly ids: readonly number[];
  readonly text: string;
  /** Every blank's text as this beam has it (model-spec 6.6: only beam 0 is consistent over several blanks). */
  readonly blanks: readonly string[];
  /** Penalised log-probability. */
  readonly score: number;
}

/** Log-probabilities of continuations of one context, which is prefilled once. */
export interface ScoreRequest {
  readonly prompt: Prompt;
  readonly mode: Mode;
  readonly choices: readonly Prompt[];
  /** `use_multitask_encoding` (section 9.2): without a mask in the prompt, the positions of a choice count on from the mask's. Default false. */
  readonly multitaskEncoding?: boolean;
}

export interface ScoreResult {
  /** Without `<sop>`. */
  readonly contextTokens: number;
  readonly choices: readonly { readonly tokens: readonly number[]; readonly tokenLogprobs: readonly number[]; readonly logprob: number }[];
}
