import type { PromptModel } from '../../model/tokenizer/prompt.js';
import type { Tokenizer } from '../../model/tokenizer/tokenizer.js';
import { type GenerationRequest, NO_PENALTIES } from './request.js';

/** For tests: a vocabulary of 20 in which 0..9 are the letters a..j, then the special tokens, 18 and 19 are padding. */
export const LETTERS = { vocabSize: 20, mask: 10, gmask: 11, smask: 12, sop: 13, eop: 14, eos: 15 } as const;

export const letterTokenizer: Tokenizer = {
  numTokens: 18,
  encode: (text) => Array.from(text, (letter) => letter.charCodeAt(0) - 97),
  encodePrompt: (text) =>
    text.split(/(\[[gs]?MASK\])/).flatMap((part, i) => (i % 2 === 1 ? [letterTokenizer.command(part)] : letterTokenizer.encode(part))),
  decode: (ids) => ids.map((id) => (id < 10 ? String.fromCharCode(97 + id) : '')).join(''),
  detokenize: (ids) => ids.map((id) => (id < 10 ? String.fromCharCode(97 + id) : `<${id}>`)).join(''),
  stream: () => ({ isHolding: false, push: (id) => letterTokenizer.decode([id]), flush: () => '' }),
  command: (name) => ({ '[MASK]': LETTERS.mask, '[gMASK]': LETTERS.gmask, '[sMASK]': LETTERS.smask })[name]!,
};

export const letterModel: PromptModel = {
  config: {
    vocabSize: LETTERS.vocabSize,
    maxSequenceLength: 64,
    specialTokens: { ...LETTERS, eod: 16, enc: 17, dblock: 17 },
  },
  tokenizer: letterTokenizer,
};

/** Greedy, one sample, at most 8 new tokens. */
export function requestOf(text: string, changes: Partial<GenerationRequest> = {}): GenerationRequest {
  return {
    prompt: { kind: 'text', text },
    mode: 'fill-blanks',
    maxNewTokens: 8,
    maxRowTokens: null,
    minNewTokens: 0,
    sampling: { temperature: 0, topK: 0, topP: 0 },
    beams: null,
    n: 1,
    seed: 1n,
    endTokens: null,
    bannedTokens: [],
    stopStrings: [],
    logitBias: [],
    penalties: NO_PENALTIES,
    topLogprobs: null,
    ...changes,
  };
}
