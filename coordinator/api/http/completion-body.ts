/** The body of POST /v1/completions, and the gRPC requests that it stands for. */
import { z } from 'zod';
import { InvalidRequestError } from '../../../common/errors.js';
import type { SpecialTokens } from '../../../model/model-config.js';
import type { GenerateRequest__Output } from '../../../proto/generated/tandem/v1/GenerateRequest.js';
import type { Limits } from '../../limits.js';
import { optional, parseBody } from './parse-body.js';

export interface CompletionCall {
  readonly model: string;
  /** One for each prompt. All have the same parameters, so what is wrong with one is wrong with all. */
  readonly requests: readonly GenerateRequest__Output[];
  /** Choices of each prompt that are answered. */
  readonly numChoices: number;
  /** More samples are drawn than are answered: the best ones are. */
  readonly isBestOf: boolean;
  readonly isBeamSearch: boolean;
  /** Null: none. */
  readonly logprobs: number | null;
  readonly echo: boolean;
  /** The client's text has masks of its own: a choice has more parts than its text. */
  readonly hasOwnMasks: boolean;
  readonly stream: boolean;
  readonly includeUsage: boolean;
  readonly returnTokenIds: boolean;
  /** Null: not given. */
  readonly requestId: string | null;
}

/** Fields of the validator's errors, as this body calls them; those that are not here have the same name. */
export const COMPLETION_FIELDS: Readonly<Record<string, string>> = {
  'prompt.text': 'prompt',
  max_new_tokens: 'max_tokens',
  min_new_tokens: 'min_tokens',
  end_tokens: 'stop_token_ids',
  'beam_search.num_beams': 'num_beams',
  'beam_search.length_penalty': 'length_penalty',
  'beam_search.no_repeat_ngram_size': 'no_repeat_ngram_size',
  'options.request_id': 'request_id',
  'options.priority': 'priority',
  'options.timeout_ms': 'timeout_ms',
};

type PromptField = string | readonly string[] | readonly number[] | readonly (readonly number[])[];

const MAX_UINT32 = 0xffff_ffff;
const DEFAULT_MAX_TOKENS = 16;

const isString = (value: unknown): value is string => typeof value === 'string';
const isTokenId = (value: unknown): value is number => Number.isInteger(value) && Number(value) >= 0 && Number(value) <= MAX_UINT32;
const isArrayOf =
  <T>(isItem: (value: unknown) => value is T) =>
  (value: unknown): value is readonly T[] =>
    Array.isArray(value) && value.every(isItem);
const isNumber = (value: unknown): value is number => Number.isFinite(value);

// Checked as a whole: a schema of the items would write one issue for each of a million wrong ones.
const prompt = z.custom<PromptField>(
  (value) =>
    isString(value) ||
    (Array.isArray(value) &&
      value.length > 0 &&
      (isArrayOf(isString)(value) || isArrayOf(isTokenId)(value) || isArrayOf(isArrayOf(isTokenId))(value))),
  'expected a string, or an array that is not empty: of strings, of token ids, or of arrays of token ids',
);
const stop = z.custom<string | readonly string[]>(
  (value) => isString(value) || isArrayOf(isString)(value),
  'expected a string or an array of strings',
);
const tokenIds = z.custom<readonly number[]>(isArrayOf(isTokenId), 'expected an array of token ids');
const logitBias = z.custom<Readonly<Record<string, number>>>(
  (value) =>
    typeof value === 'object' &&
    value !== null &&
    !Array.isArray(value) &&
    Object.entries(value).every(([token, bias]) => /^(?:0|[1-9]\d{0,9})$/.test(token) && isTokenId(Number(token)) && isNumber(bias)),
  'expected an object of numbers, whose keys are token ids',
);
const uint32 = z.int().min(0).max(MAX_UINT32);

export const MODES = {
  fill_blanks: 'MODE_FILL_BLANKS',
  mask: 'MODE_MASK',
  gmask: 'MODE_GMASK',
  unidirectional: 'MODE_UNIDIRECTIONAL',
} as const;

const completionBody = z.strictObject({
  model: z.string(),
  prompt,
  suffix: optional(z.string()),
  max_tokens: optional(uint32.min(1)),
  temperature: optional(z.number()),
  top_p: optional(z.number().min(0).max(1)),
  n: optional(uint32.min(1)),
  best_of: optional(uint32.min(1)),
  stop: optional(stop),
  logprobs: optional(uint32),
  echo: optional(z.boolean()),
  seed: optional(z.int()),
  logit_bias: optional(logitBias),
  presence_penalty: optional(z.number()),
  frequency_penalty: optional(z.number()),
  stream: optional(z.boolean()),
  stream_options: optional(z.strictObject({ include_usage: optional(z.boolean()), include_obfuscation: z.unknown().optional() })),

  top_k: optional(z.int().min(-1).max(MAX_UINT32)), // -1: off, as vLLM writes it
  min_tokens: optional(uint32),
  repetition_penalty: optional(z.number()),
  stop_token_ids: optional(tokenIds),
  ignore_eos: optional(z.boolean()),
  use_beam_search: optional(z.boolean()),
  num_beams: optional(uint32.min(1)),
  length_penalty: optional(z.number()),
  no_repeat_ngram_size: optional(uint32),
  priority: optional(z.int()),
  timeout_ms: optional(uint32),
  request_id: optional(z.string().min(1)),
  mode: optional(z.enum(Object.keys(MODES) as (keyof typeof MODES)[])),
  return_token_ids: optional(z.boolean()),

  // Clients send these to OpenAI; here they mean nothing.
  user: z.unknown().optional(),
  metadata: z.unknown().optional(),
  store: z.unknown().optional(),
  service_tier: z.unknown().optional(),
  safety_identifier: z.unknown().optional(),
  prompt_cache_key: z.unknown().optional(),
});
type CompletionBody = z.infer<typeof completionBody>;

export interface BodyContext {
  readonly limits: Limits;
  readonly specialTokens: SpecialTokens;
  /** Where the body has none. */
  readonly seed: () => bigint;
}

/** @throws InvalidRequestError naming the field */
export function toCompletionCall(body: unknown, context: BodyContext): CompletionCall {
  const parsed = parseBody(completionBody, body);
  const isBeamSearch = parsed.use_beam_search === true || (parsed.num_beams ?? 1) > 1;
  const numChoices = parsed.n ?? 1;
  const candidates = candidatesOf(parsed, isBeamSearch);
  const isBestOf = !isBeamSearch && candidates > numChoices;
  const stream = parsed.stream ?? false;
  if (stream && candidates > numChoices && !isBeamSearch) throw invalid('best_of', 'more candidates than n can not be streamed');
  if (stream && isBeamSearch && numChoices > 1) throw invalid('n', 'of a beam search only the best beam can be streamed: set n to 1');
  if (parsed.best_of !== undefined && isBeamSearch && parsed.num_beams !== undefined) {
    throw invalid('best_of', 'not beside num_beams, which says how many beams there are');
  }
  if (!isBeamSearch && parsed.length_penalty !== undefined) throw invalid('length_penalty', 'only with beam search: set num_beams');
  if (!isBeamSearch && (parsed.no_repeat_ngram_size ?? 0) > 0)
    throw invalid('no_repeat_ngram_size', 'only with beam search: set num_beams');
  if (!stream && parsed.stream_options !== undefined) throw invalid('stream_options', 'only with stream true');

  const suffix = parsed.suffix === '' ? null : (parsed.suffix ?? null);
  const prompts = promptsOf(parsed.prompt);
  if (prompts.length > context.limits.maxBatchedPrompts) {
    throw invalid('prompt', `${prompts.length} prompts, at most ${context.limits.maxBatchedPrompts} are taken: send several requests`);
  }
  if (suffix !== null && prompts.some((each) => typeof each !== 'string')) throw invalid('suffix', 'only with prompts that are text');
  const { mask, gmask, smask } = context.specialTokens;
  const hasOwnMasks = [...prompts, suffix ?? ''].some((each) =>
    typeof each === 'string' ? /\[[gs]?MASK\]/.test(each) : [mask, gmask, smask].some((token) => each.includes(token)),
  );
  const echo = parsed.echo ?? false;
  if (echo && (suffix !== null || hasOwnMasks)) throw invalid('echo', 'not with blanks inside the prompt: they are filled where they are');

  const shared = {
    ...toWire(parsed, context),
    n: isBeamSearch ? 1 : candidates,
    beamSearch: isBeamSearch ? toBeamSearch(parsed, candidates) : null,
  };
  if (isBestOf) shared.logprobs ??= 0; // what they are ranked by
  return {
    model: parsed.model,
    requests: prompts.map((each) =>
      typeof each === 'string'
        ? { ...shared, text: suffix === null ? each : `${each}[MASK]${suffix}`, prompt: 'text' }
        : { ...shared, ids: { ids: [...each] }, prompt: 'ids' },
    ),
    numChoices,
    isBestOf,
    isBeamSearch,
    logprobs: parsed.logprobs ?? null,
    echo,
    hasOwnMasks,
    stream,
    includeUsage: parsed.stream_options?.include_usage ?? false,
    returnTokenIds: parsed.return_token_ids ?? false,
    requestId: parsed.request_id ?? null,
  };
}

/** Samples that are drawn for each prompt, or beams. */
function candidatesOf({ n, best_of, num_beams }: CompletionBody, isBeamSearch: boolean): number {
  const numChoices = n ?? 1;
  const name = isBeamSearch && num_beams !== undefined ? 'num_beams' : 'best_of';
  const candidates = (name === 'num_beams' ? num_beams : best_of) ?? numChoices;
  if (candidates < numChoices) throw invalid(name, `${candidates} is less than n, which is ${numChoices}`);
  return candidates;
}

function promptsOf(field: PromptField): readonly (string | readonly number[])[] {
  if (typeof field === 'string') return [field];
  return typeof field[0] === 'number' ? [field as readonly number[]] : (field as readonly (string | readonly number[])[]);
}

function toWire(body: CompletionBody, { specialTokens, seed }: BodyContext): GenerateRequest__Output {
  const own = body.stop_token_ids ?? [];
  const isDefaultEnd = body.stop_token_ids === undefined && body.ignore_eos !== true;
  return {
    ...EMPTY_REQUEST,
    mode: body.mode === undefined ? 'MODE_UNSPECIFIED' : MODES[body.mode],
    maxNewTokens: body.max_tokens ?? DEFAULT_MAX_TOKENS,
    minNewTokens: body.min_tokens ?? 0,
    ...(body.temperature === undefined ? {} : { temperature: body.temperature }),
    // The wire's 0 means "off"; the best token alone is what OpenAI's 0 comes to.
    topK: body.top_p === 0 ? 1 : Math.max(0, body.top_k ?? 0),
    topP: body.top_p === undefined || body.top_p === 1 ? 0 : body.top_p,
    seed: String(body.seed === undefined ? seed() : BigInt.asUintN(64, BigInt(body.seed))),
    endTokens: isDefaultEnd ? null : { ids: body.ignore_eos === true ? [...own] : [specialTokens.eop, specialTokens.eos, ...own] },
    stop: body.stop === undefined ? [] : typeof body.stop === 'string' ? [body.stop] : [...body.stop],
    ...(body.logprobs === undefined ? {} : { logprobs: body.logprobs }),
    logitBias: Object.entries(body.logit_bias ?? {}).map(([token, bias]) => ({ token: Number(token), bias })),
    presencePenalty: body.presence_penalty ?? 0,
    frequencyPenalty: body.frequency_penalty ?? 0,
    ...(body.repetition_penalty === undefined ? {} : { repetitionPenalty: body.repetition_penalty }),
    options: { requestId: '', priority: body.priority ?? 0, timeoutMs: body.timeout_ms ?? 0 },
  };
}

function toBeamSearch(body: CompletionBody, numBeams: number): GenerateRequest__Output['beamSearch'] {
  return {
    numBeams,
    lengthPenalty: body.length_penalty ?? 1,
    noRepeatNgramSize: body.no_repeat_ngram_size ?? 0,
    deterministic: true,
    bannedPrefixes: [],
    paddedLength: 0,
  };
}

/** A request with nothing given. */
export const EMPTY_REQUEST: GenerateRequest__Output = {
  mode: 'MODE_UNSPECIFIED',
  maxNewTokens: 0,
  minNewTokens: 0,
  maxRowTokens: 0,
  topK: 0,
  topP: 0,
  n: 0,
  beamSearch: null,
  endTokens: null,
  bannedTokens: [],
  stop: [],
  options: null,
  logitBias: [],
  presencePenalty: 0,
  frequencyPenalty: 0,
};

/** Does what may be refused, in the words of an HTTP body. @param names of its fields, by the validator's */
export function inNames<R>(names: Readonly<Record<string, string>>, work: () => R): R {
  try {
    return work();
  } catch (error) {
    throw inFieldsOf(names, error);
  }
}

function inFieldsOf(names: Readonly<Record<string, string>>, error: unknown): unknown {
  if (!(error instanceof InvalidRequestError) || error.field === null) return error;
  // There a list with places, here an object.
  const field = error.field.startsWith('logit_bias[') ? 'logit_bias' : (names[error.field] ?? error.field);
  return new InvalidRequestError(
    error.message.replace(error.field, () => field),
    field,
  );
}

function invalid(field: string, message: string): InvalidRequestError {
  return new InvalidRequestError(`${field}: ${message}`, field);
}
