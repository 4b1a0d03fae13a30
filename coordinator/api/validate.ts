/** From wire messages to requests. Every field is checked here, and an error names the field as the client wrote it. */
import { InvalidRequestError } from '../../common/errors.js';
import type { BeamSearch__Output } from '../../proto/generated/tandem/v1/BeamSearch.js';
import type { DetokenizeRequest__Output } from '../../proto/generated/tandem/v1/DetokenizeRequest.js';
import type { GenerateRequest__Output } from '../../proto/generated/tandem/v1/GenerateRequest.js';
import type { LogitsRequest__Output } from '../../proto/generated/tandem/v1/LogitsRequest.js';
import type { ScoreRequest__Output } from '../../proto/generated/tandem/v1/ScoreRequest.js';
import type { TokenizeRequest__Output } from '../../proto/generated/tandem/v1/TokenizeRequest.js';
import type { TokenIds__Output } from '../../proto/generated/tandem/v1/TokenIds.js';
import type { LogitsRequest } from '../generation/logits.js';
import type { BeamParams, GenerationRequest, Mode, Prompt, ScoreRequest } from '../generation/request.js';

/** Bounds of what one request may ask for. */
export const REQUEST_LIMITS = {
  textBytes: 1024 * 1024,
  detokenizedIds: 65536,
  samples: 64,
  beams: 64,
  choices: 256,
  stopStrings: 16,
  stopStringBytes: 256,
  bannedTokens: 4096,
  endTokens: 64,
  bannedPrefixes: 256,
  bannedPrefixTokens: 16,
  logprobs: 20,
} as const;

const DEFAULT_SEED = 1234n;
const DEFAULT_NEW_TOKENS = 256;

const MODES: Readonly<Record<string, Mode>> = {
  MODE_FILL_BLANKS: 'fill-blanks',
  MODE_MASK: 'mask',
  MODE_GMASK: 'gmask',
  MODE_UNIDIRECTIONAL: 'unidirectional',
};

/** @throws InvalidRequestError */
export function toGenerationRequest(wire: GenerateRequest__Output): GenerationRequest {
  const beams = wire.beamSearch ? toBeams(wire.beamSearch) : null;
  const n = wire.n === 0 ? 1 : inRange('n', wire.n, 1, REQUEST_LIMITS.samples);
  const stopStrings = atMost('stop', wire.stop, REQUEST_LIMITS.stopStrings).map((text, i) => {
    const bytes = Buffer.byteLength(text);
    if (bytes === 0 || bytes > REQUEST_LIMITS.stopStringBytes) {
      throw new InvalidRequestError(`stop[${i}] has ${bytes} bytes, allowed are 1 to ${REQUEST_LIMITS.stopStringBytes}`);
    }
    return text;
  });
  if (beams) {
    if (n > 1) throw new InvalidRequestError(`n is ${n}: beam search gives its beams, set n to 1`);
    if (stopStrings.length > 0) throw new InvalidRequestError('stop: beam search has no stop strings, use sampling or end_tokens');
    if (wire.logprobs !== undefined) throw new InvalidRequestError('logprobs: not given by beam search, use sampling');
  }
  const limited = wire.maxNewTokens > 0 || wire.maxRowTokens > 0;
  return {
    prompt: toPrompt(wire),
    mode: toMode(wire.mode, 'fill-blanks'),
    maxNewTokens: limited ? zeroIsNull(wire.maxNewTokens) : DEFAULT_NEW_TOKENS,
    maxRowTokens: zeroIsNull(wire.maxRowTokens),
    minNewTokens: wire.minNewTokens,
    sampling: {
      temperature: wire.temperature === undefined ? 1 : inRange('temperature', wire.temperature, 0, 1000),
      topK: wire.topK,
      topP: inRange('top_p', wire.topP, 0, 1),
    },
    beams,
    n,
    seed: wire.seed === undefined ? DEFAULT_SEED : BigInt(wire.seed),
    endTokens: wire.endTokens ? atMost('end_tokens', wire.endTokens.ids, REQUEST_LIMITS.endTokens) : null,
    bannedTokens: atMost('banned_tokens', wire.bannedTokens, REQUEST_LIMITS.bannedTokens),
    stopStrings,
    topLogprobs: wire.logprobs === undefined ? null : inRange('logprobs', wire.logprobs, 0, REQUEST_LIMITS.logprobs),
  };
}

/** @throws InvalidRequestError */
export function toScoreRequest(wire: ScoreRequest__Output): ScoreRequest {
  if (wire.choices.length === 0) throw new InvalidRequestError('choices is empty: give at least one continuation');
  return {
    prompt: toPrompt(wire),
    mode: toMode(wire.mode, 'mask'),
    multitaskEncoding: wire.multitaskEncoding,
    choices: atMost('choices', wire.choices, REQUEST_LIMITS.choices).map((choice, i) => toPrompt(choice, `choices[${i}]`)),
  };
}

/** @throws InvalidRequestError */
export function toLogitsRequest(wire: LogitsRequest__Output): LogitsRequest {
  return {
    ids: wire.ids,
    positions: wire.positions.length > 0 ? wire.positions : wire.ids.map((_, i) => i),
    bidirectionalTokens: wire.bidirectionalTokens,
    rows: wire.rows === 0 ? 1 : wire.rows,
  };
}

/** @throws InvalidRequestError */
function checkText(field: string, text: string): string {
  const bytes = Buffer.byteLength(text);
  if (bytes > REQUEST_LIMITS.textBytes)
    throw new InvalidRequestError(`${field} has ${bytes} bytes, at most ${REQUEST_LIMITS.textBytes} are taken`);
  return text;
}

/** @throws InvalidRequestError */
export function toTokenizeText(wire: TokenizeRequest__Output): string {
  if (wire.asPrompt && wire.noDummyPrefix) {
    throw new InvalidRequestError('no_dummy_prefix: the pieces of a prompt always have their prefix, leave out as_prompt');
  }
  return checkText('text', wire.text);
}

/** @throws InvalidRequestError */
export function toDetokenizeIds(wire: DetokenizeRequest__Output): number[] {
  return atMost('ids', wire.ids, REQUEST_LIMITS.detokenizedIds);
}

function toPrompt(wire: { readonly text?: string; readonly ids?: TokenIds__Output | null }, field = 'prompt'): Prompt {
  if (wire.ids) return { kind: 'ids', ids: wire.ids.ids };
  if (wire.text === undefined) throw new InvalidRequestError(`${field} is missing: give text or ids`);
  return { kind: 'text', text: checkText(`${field}.text`, wire.text) };
}

function toMode(wire: string, unspecified: Mode): Mode {
  if (wire === 'MODE_UNSPECIFIED') return unspecified;
  const mode = MODES[wire];
  if (!mode) throw new InvalidRequestError(`mode ${wire} is unknown, allowed are ${Object.keys(MODES).join(', ')}`);
  return mode;
}

function toBeams(wire: BeamSearch__Output): BeamParams {
  const prefixes = atMost('beam_search.banned_prefixes', wire.bannedPrefixes, REQUEST_LIMITS.bannedPrefixes);
  return {
    numBeams: inRange('beam_search.num_beams', wire.numBeams, 1, REQUEST_LIMITS.beams),
    lengthPenalty: inRange('beam_search.length_penalty', wire.lengthPenalty, -100, 100),
    noRepeatNgramSize: wire.noRepeatNgramSize,
    deterministic: wire.deterministic,
    considerEnd: wire.considerEnd ?? true,
    ...(wire.paddedLength > 0 ? { paddedLength: wire.paddedLength } : {}),
    bannedPrefixes: prefixes.map(({ ids }, i) => {
      if (ids.length === 0) throw new InvalidRequestError(`beam_search.banned_prefixes[${i}] is empty`);
      return atMost(`beam_search.banned_prefixes[${i}]`, ids, REQUEST_LIMITS.bannedPrefixTokens);
    }),
  };
}

function inRange(field: string, value: number, low: number, high: number): number {
  if (!(value >= low && value <= high)) throw new InvalidRequestError(`${field} is ${value}, allowed are ${low} to ${high}`);
  return value;
}

function atMost<T>(field: string, values: T[], most: number): T[] {
  if (values.length > most) throw new InvalidRequestError(`${field} has ${values.length} entries, at most ${most} are taken`);
  return values;
}

function zeroIsNull(value: number): number | null {
  return value === 0 ? null : value;
}
