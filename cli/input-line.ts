/** One line of input for `tandem generate`: a text, or a JSON object with a prompt and any per-request parameter. */
import { z } from 'zod';
import { InvalidRequestError } from '../common/errors.js';
import type { GenerateRequest } from '../proto/generated/tandem/v1/GenerateRequest.js';

/** Parameters of the generate script of GLM-130B, under its names, and those that this server has besides. */
export interface GenerateParams {
  readonly mode: 'fill-blanks' | 'mask' | 'gmask' | 'unidirectional';
  readonly outSeqLength: number;
  readonly maxNewTokens: number;
  readonly minGenLength: number;
  readonly samplingStrategy: 'BaseStrategy' | 'BeamSearchStrategy';
  readonly numBeams: number;
  readonly lengthPenalty: number;
  readonly noRepeatNgramSize: number;
  readonly deterministic: boolean;
  readonly considerEnd: boolean;
  readonly bannedPrefixes: readonly (readonly number[])[];
  readonly topK: number;
  readonly topP: number;
  readonly temperature: number;
  readonly seed: string;
  readonly n: number;
  readonly stop: readonly string[];
  /** Null: `<eop>` and `</s>`. */
  readonly endTokens: readonly number[] | null;
  readonly bannedTokens: readonly number[];
  /** Null: none. */
  readonly logprobs: number | null;
}

export type PromptInput = { readonly text: string } | { readonly ids: readonly number[] };

const id = z.int().min(0).max(0xffffffff);
const count = z.int().min(0).max(0xffffffff);
const seed = z
  .union([z.number(), z.string()])
  .refine(isSeed, { error: 'a whole number from 0 to 2^64 - 1 is needed, from 2^53 on as a string' })
  .transform(String);

const lineSchema = z
  .strictObject({
    text: z.string(),
    ids: z.array(id),
    mode: z.enum(['fill-blanks', 'mask', 'gmask', 'unidirectional']),
    out_seq_length: count,
    max_new_tokens: count,
    min_gen_length: count,
    sampling_strategy: z.enum(['BaseStrategy', 'BeamSearchStrategy']),
    num_beams: count,
    length_penalty: z.number(),
    no_repeat_ngram_size: count,
    deterministic: z.boolean(),
    consider_end: z.boolean(),
    banned_prefixes: z.array(z.array(id)),
    top_k: count,
    top_p: z.number(),
    temperature: z.number(),
    seed,
    n: count,
    stop: z.array(z.string()),
    end_tokens: z.array(id),
    banned_tokens: z.array(id),
    logprobs: count.nullable(),
  })
  .partial()
  .refine((line) => (line.text === undefined) !== (line.ids === undefined), { error: 'give either "text" or "ids"' });

/**
 * @param line a text, or a JSON object: what begins like one, with `{"` or `{}`, has to be one
 * @returns the prompt, and the defaults with whatever the line says instead
 * @throws InvalidRequestError naming the field
 */
export function parseInputLine(line: string, defaults: GenerateParams): { prompt: PromptInput; params: GenerateParams } {
  if (!/^\{\s*["}]/.test(line)) return { prompt: { text: line }, params: defaults };
  const parsed = lineSchema.safeParse(parseJson(line));
  if (!parsed.success) {
    const [issue] = parsed.error.issues;
    throw new InvalidRequestError(`${issue!.path.length > 0 ? `${issue!.path.join('.')}: ` : ''}${issue!.message}`);
  }
  const { text, ids, ...given } = parsed.data;
  const camel = Object.fromEntries(
    Object.entries(given).map(([key, value]) => [key.replaceAll(/_(.)/g, (_, letter: string) => letter.toUpperCase()), value]),
  ) as Partial<GenerateParams>;
  return { prompt: ids !== undefined ? { ids } : { text: text! }, params: { ...defaults, ...camel } };
}

export function toWireRequest(prompt: PromptInput, params: GenerateParams): GenerateRequest {
  const modes = {
    'fill-blanks': 'MODE_FILL_BLANKS',
    mask: 'MODE_MASK',
    gmask: 'MODE_GMASK',
    unidirectional: 'MODE_UNIDIRECTIONAL',
  } as const;
  const { numBeams, lengthPenalty, noRepeatNgramSize, deterministic, considerEnd } = params;
  return {
    ...('ids' in prompt ? { ids: { ids: [...prompt.ids] } } : { text: prompt.text }),
    mode: modes[params.mode],
    maxRowTokens: params.outSeqLength,
    maxNewTokens: params.maxNewTokens,
    minNewTokens: params.minGenLength,
    temperature: params.temperature,
    topK: params.topK,
    topP: params.topP,
    seed: params.seed,
    n: params.n,
    stop: [...params.stop],
    bannedTokens: [...params.bannedTokens],
    ...(params.endTokens ? { endTokens: { ids: [...params.endTokens] } } : {}),
    ...(params.logprobs === null ? {} : { logprobs: params.logprobs }),
    ...(params.samplingStrategy === 'BeamSearchStrategy'
      ? {
          beamSearch: {
            ...{ numBeams, lengthPenalty, noRepeatNgramSize, deterministic, considerEnd },
            bannedPrefixes: params.bannedPrefixes.map((ids) => ({ ids: [...ids] })),
          },
        }
      : {}),
  };
}

/** A server's message about a request, in the words of the command line. */
export function inLineTerms(message: string): string {
  return message
    .replaceAll('max_row_tokens', 'out_seq_length')
    .replaceAll('min_new_tokens', 'min_gen_length')
    .replaceAll(/\bbeam_search\.(?=[a-z])/g, '');
}

/** The text may be any uint64; numbers of JSON are exact below 2^53. */
export function isSeed(given: number | string): boolean {
  return typeof given === 'number' ? Number.isSafeInteger(given) && given >= 0 : /^\d{1,20}$/.test(given) && BigInt(given) < 2n ** 64n;
}

function parseJson(line: string): unknown {
  try {
    return JSON.parse(line);
  } catch (error) {
    throw new InvalidRequestError(
      `not JSON (${(error as Error).message}); a text that begins so is written as {"text": "..."} with its quotes escaped`,
    );
  }
}
