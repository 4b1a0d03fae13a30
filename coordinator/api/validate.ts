/** From wire messages to requests. Every field is checked here, and an error names the field as the client wrote it. */
import { ForbiddenError, InvalidRequestError } from '../../common/errors.js';
import type { AbortRequest__Output } from '../../proto/generated/tandem/v1/AbortRequest.js';
import type { BeamSearch__Output } from '../../proto/generated/tandem/v1/BeamSearch.js';
import type { DetokenizeRequest__Output } from '../../proto/generated/tandem/v1/DetokenizeRequest.js';
import type { DrainRequest__Output } from '../../proto/generated/tandem/v1/DrainRequest.js';
import type { GenerateRequest__Output } from '../../proto/generated/tandem/v1/GenerateRequest.js';
import type { RequestOptions__Output } from '../../proto/generated/tandem/v1/RequestOptions.js';
import type { LogitsRequest__Output } from '../../proto/generated/tandem/v1/LogitsRequest.js';
import type { ScoreRequest__Output } from '../../proto/generated/tandem/v1/ScoreRequest.js';
import type { TokenizeRequest__Output } from '../../proto/generated/tandem/v1/TokenizeRequest.js';
import type { TokenIds__Output } from '../../proto/generated/tandem/v1/TokenIds.js';
import type { WatchStatusRequest__Output } from '../../proto/generated/tandem/v1/WatchStatusRequest.js';
import type { Limits } from '../limits.js';
import { type Caller, MAX_PRIORITY } from '../access/caller.js';
import type { CallContext } from './service.js';
import type { LogitsRequest } from '../generation/logits.js';
import {
  type BeamParams,
  type GenerationRequest,
  type Mode,
  NO_PENALTIES,
  type Penalties,
  type Prompt,
  type ScoreRequest,
} from '../generation/request.js';

const DEFAULT_SEED = 1234n;
const DEFAULT_NEW_TOKENS = 256;
/** The longest that timers take: 24 days. What asks for more has none to fear. */
export const MAX_TIMEOUT_MS = 2 ** 31 - 1;
const UINT32_MAX = 2 ** 32 - 1;
const WATCH_INTERVAL_MS = { default: 1000, min: 100, max: 60_000 };

const MODES: Readonly<Record<string, Mode>> = {
  MODE_FILL_BLANKS: 'fill-blanks',
  MODE_MASK: 'mask',
  MODE_GMASK: 'gmask',
  MODE_UNIDIRECTIONAL: 'unidirectional',
};

/** @throws InvalidRequestError */
export function toGenerationRequest(wire: GenerateRequest__Output, limits: Limits): GenerationRequest {
  const beams = wire.beamSearch ? toBeams(wire.beamSearch, limits) : null;
  const n = wire.n === 0 ? 1 : wholeInRange('n', wire.n, 1, limits.maxSamples);
  const stopStrings = atMost('stop', wire.stop, limits.maxStopStrings).map((text, i) => {
    const bytes = Buffer.byteLength(text);
    if (bytes === 0 || bytes > limits.maxStopStringBytes) {
      throw new InvalidRequestError(`stop[${i}] has ${bytes} bytes, allowed are 1 to ${limits.maxStopStringBytes}`, `stop[${i}]`);
    }
    return wellFormed(`stop[${i}]`, text);
  });
  const logitBias = atMost('logit_bias', wire.logitBias, limits.maxLogitBiases).map(({ token, bias }, i) => ({
    token,
    bias: inRange(`logit_bias[${i}].bias`, bias, -100, 100),
  }));
  const penalties = toPenalties(wire);
  if (beams) {
    if (n > 1) throw new InvalidRequestError(`n is ${n}: beam search gives its beams, set n to 1`, 'n');
    if (stopStrings.length > 0) throw new InvalidRequestError('stop: beam search has no stop strings, use sampling or end_tokens', 'stop');
    if (wire.logprobs !== undefined) throw new InvalidRequestError('logprobs: not given by beam search, use sampling', 'logprobs');
    if (logitBias.length > 0)
      throw new InvalidRequestError('logit_bias: beam search takes none, use sampling or banned_tokens', 'logit_bias');
    if (penalties !== NO_PENALTIES) {
      const field = penalties.presence !== 0 ? 'presence_penalty' : penalties.frequency !== 0 ? 'frequency_penalty' : 'repetition_penalty';
      throw new InvalidRequestError(`${field}: beam search takes none, use sampling or no_repeat_ngram_size`, field);
    }
  }
  const limited = wire.maxNewTokens > 0 || wire.maxRowTokens > 0;
  return {
    prompt: toPrompt(wire, limits),
    mode: toMode(wire.mode, 'fill-blanks'),
    maxNewTokens: limited ? newTokens(wire.maxNewTokens, limits) : Math.min(DEFAULT_NEW_TOKENS, limits.maxNewTokens || Infinity),
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
    endTokens: wire.endTokens ? atMost('end_tokens', wire.endTokens.ids, limits.maxEndTokens) : null,
    bannedTokens: atMost('banned_tokens', wire.bannedTokens, limits.maxBannedTokens),
    stopStrings,
    logitBias,
    penalties,
    topLogprobs: wire.logprobs === undefined ? null : wholeInRange('logprobs', wire.logprobs, 0, limits.maxLogprobs),
  };
}

/** @throws InvalidRequestError */
export function toScoreRequest(wire: ScoreRequest__Output, limits: Limits): ScoreRequest {
  if (wire.choices.length === 0) throw new InvalidRequestError('choices is empty: give at least one continuation', 'choices');
  return {
    prompt: toPrompt(wire, limits),
    mode: toMode(wire.mode, 'mask'),
    multitaskEncoding: wire.multitaskEncoding,
    choices: atMost('choices', wire.choices, limits.maxChoices).map((choice, i) => toPrompt(choice, limits, `choices[${i}]`)),
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
function checkText(field: string, text: string, limits: Limits): string {
  const bytes = Buffer.byteLength(text);
  if (bytes > limits.maxTextBytes)
    throw new InvalidRequestError(`${field} has ${bytes} bytes, at most ${limits.maxTextBytes} are taken`, field);
  return wellFormed(field, text);
}

/** Half a surrogate pair is no character, and has no UTF-8. @throws InvalidRequestError */
function wellFormed(field: string, text: string): string {
  if (!text.isWellFormed()) throw new InvalidRequestError(`${field} has half of a surrogate pair, which is no character`, field);
  return text;
}

/** @throws InvalidRequestError */
export function toTokenizeText(wire: TokenizeRequest__Output, limits: Limits): string {
  if (wire.asPrompt && wire.noDummyPrefix) {
    throw new InvalidRequestError(
      'no_dummy_prefix: the pieces of a prompt always have their prefix, leave out as_prompt',
      'no_dummy_prefix',
    );
  }
  return checkText('text', wire.text, limits);
}

/** @throws InvalidRequestError */
export function toDetokenizeIds(wire: DetokenizeRequest__Output, limits: Limits): number[] {
  return atMost('ids', wire.ids, limits.maxDetokenizedIds);
}

/** @throws InvalidRequestError, ForbiddenError */
export function toCallContext(wire: RequestOptions__Output | null, caller: Caller): CallContext {
  const requestId = toRequestId('options.request_id', wire?.requestId ?? '');
  const priority = wholeInRange('options.priority', wire?.priority ?? 0, -MAX_PRIORITY, MAX_PRIORITY);
  if (priority > caller.maxPriority) {
    throw new ForbiddenError(`the priority ${priority} is above what key ${caller.name} allows, which is up to ${caller.maxPriority}`);
  }
  return {
    caller,
    requestId: requestId === '' ? null : requestId,
    priority,
    timeoutMs: toTimeout('options.timeout_ms', wire?.timeoutMs ?? 0),
    arrivedMs: performance.now(),
  };
}

/** @throws InvalidRequestError */
export function toAbortId(wire: AbortRequest__Output): string {
  if (wire.requestId === '') throw new InvalidRequestError('request_id is missing: give that of the request to end', 'request_id');
  return toRequestId('request_id', wire.requestId);
}

/** Milliseconds. @throws InvalidRequestError */
export function toWatchInterval(wire: WatchStatusRequest__Output): number {
  const { default: usual, min, max } = WATCH_INTERVAL_MS;
  return wire.intervalMs === 0 ? usual : wholeInRange('interval_ms', wire.intervalMs, min, max);
}

/** Milliseconds; null: as long as it takes. @throws InvalidRequestError */
export function toDrainTimeout(wire: DrainRequest__Output): number | null {
  return toTimeout('timeout_ms', wire.timeoutMs);
}

function toTimeout(field: string, ms: number): number | null {
  return ms === 0 ? null : Math.min(MAX_TIMEOUT_MS, wholeInRange(field, ms, 0, UINT32_MAX));
}

function toRequestId(field: string, id: string): string {
  if (/^[A-Za-z0-9._:-]{0,128}$/.test(id)) return id;
  throw new InvalidRequestError(`${field}: up to 128 of the characters A-Z a-z 0-9 . _ : - are taken`, field);
}

function toPenalties(wire: GenerateRequest__Output): Penalties {
  const presence = inRange('presence_penalty', wire.presencePenalty, -2, 2);
  const frequency = inRange('frequency_penalty', wire.frequencyPenalty, -2, 2);
  const repetition = wire.repetitionPenalty ?? 1;
  if (!(repetition > 0 && repetition <= 10)) {
    throw new InvalidRequestError(`repetition_penalty is ${repetition}, allowed are numbers above 0 up to 10`, 'repetition_penalty');
  }
  return presence === 0 && frequency === 0 && repetition === 1 ? NO_PENALTIES : { presence, frequency, repetition };
}

function newTokens(asked: number, limits: Limits): number | null {
  if (limits.maxNewTokens > 0 && asked > limits.maxNewTokens) {
    throw new InvalidRequestError(`max_new_tokens is ${asked}, this server allows ${limits.maxNewTokens}`, 'max_new_tokens');
  }
  return asked > 0 ? asked : zeroIsNull(limits.maxNewTokens);
}

function toPrompt(wire: { readonly text?: string; readonly ids?: TokenIds__Output | null }, limits: Limits, field = 'prompt'): Prompt {
  if (wire.ids) return { kind: 'ids', ids: wire.ids.ids };
  if (wire.text === undefined) throw new InvalidRequestError(`${field} is missing: give text or ids`, field);
  return { kind: 'text', text: checkText(`${field}.text`, wire.text, limits) };
}

function toMode(wire: string, unspecified: Mode): Mode {
  if (wire === 'MODE_UNSPECIFIED') return unspecified;
  const mode = MODES[wire];
  if (!mode) throw new InvalidRequestError(`mode ${wire} is unknown, allowed are ${Object.keys(MODES).join(', ')}`, 'mode');
  return mode;
}

function toBeams(wire: BeamSearch__Output, limits: Limits): BeamParams {
  const prefixes = atMost('beam_search.banned_prefixes', wire.bannedPrefixes, limits.maxBannedPrefixes);
  return {
    numBeams: wholeInRange('beam_search.num_beams', wire.numBeams, 1, limits.maxBeams),
    lengthPenalty: inRange('beam_search.length_penalty', wire.lengthPenalty, -100, 100),
    noRepeatNgramSize: wire.noRepeatNgramSize,
    deterministic: wire.deterministic,
    considerEnd: wire.considerEnd ?? true,
    ...(wire.paddedLength > 0 ? { paddedLength: wire.paddedLength } : {}),
    bannedPrefixes: prefixes.map(({ ids }, i) => {
      if (ids.length === 0)
        throw new InvalidRequestError(`beam_search.banned_prefixes[${i}] is empty`, `beam_search.banned_prefixes[${i}]`);
      return atMost(`beam_search.banned_prefixes[${i}]`, ids, limits.maxBannedPrefixTokens);
    }),
  };
}

function inRange(field: string, value: number, low: number, high: number): number {
  if (!(value >= low && value <= high)) throw new InvalidRequestError(`${field} is ${value}, allowed are ${low} to ${high}`, field);
  return value;
}

function wholeInRange(field: string, value: number, low: number, high: number): number {
  if (!Number.isInteger(value))
    throw new InvalidRequestError(`${field} is ${value}, allowed are whole numbers from ${low} to ${high}`, field);
  return inRange(field, value, low, high);
}

function atMost<T>(field: string, values: T[], most: number): T[] {
  if (values.length > most) throw new InvalidRequestError(`${field} has ${values.length} entries, at most ${most} are taken`, field);
  return values;
}

function zeroIsNull(value: number): number | null {
  return value === 0 ? null : value;
}
