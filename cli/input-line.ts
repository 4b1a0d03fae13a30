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
    seed: z.union([count.transform(String), z.string().regex(/^\d{1,20}$/)]),
    n: count,
    stop: z.array(z.string()),
    end_tokens: z.array(id),
    banned_tokens: z.array(id),
    logprobs: count.nullable(),
  })
  .partial()
  .refine((line) => (line.text === undefined) !== (line.ids === undefined), { error: 'give either "text" or "ids"' });

/**
 * @param line a text, or a JSON object if it begins with `{` and parses as one
 * @returns the prompt, and the defaults with whatever the line says instead
 * @throws InvalidRequestError naming the field
 */
export function parseInputLine(line: string, defaults: GenerateParams): { prompt: PromptInput; params: GenerateParams } {
  const json = line.startsWith('{') ? tryParse(line) : undefined;
  if (json === undefined) return { prompt: { text: line }, params: defaults };
  const parsed = lineSchema.safeParse(json);
  if (!parsed.success) {
    const [issue] = parsed.error.issues;
    throw new InvalidRequestError(`input line: ${issue!.path.length > 0 ? `${issue!.path.join('.')}: ` : ''}${issue!.message}`);
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

function tryParse(line: string): unknown {
  try {
    return JSON.parse(line);
  } catch {
    return undefined; // a text that happens to begin with a brace
  }
}
