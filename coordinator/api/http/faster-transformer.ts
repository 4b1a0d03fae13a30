/**
 * POST /generate as the GLM server of the FasterTransformer port answers it (examples/pytorch/glm/glm_server.py), for its old clients. Its
 * body has two forms: `prompt` with `max_tokens`, `min_tokens`, `top_k`, `top_p`, and before that `text` with one context in each line and
 * `out_seq_length`, `min_gen_length`, `topk`, `topp`. Defaults are those of its `predict`. Fields that it does not know it ignores.
 */
import type { FastifyInstance } from 'fastify';
import { z } from 'zod';
import { InvalidRequestError } from '../../../common/errors.js';
import type { GenerateRequest__Output } from '../../../proto/generated/tandem/v1/GenerateRequest.js';
import type { Limits } from '../../limits.js';
import { toCallContext, toGenerationRequest } from '../validate.js';
import { EMPTY_REQUEST, inFieldsOf } from './completion-body.js';
import type { HttpApi } from './http-api.js';
import { optional, parseBody } from './parse-body.js';
import type { RequestGroups } from './request-groups.js';
import { endOf, runRequests } from './run-requests.js';

export function addFasterTransformerRoute(app: FastifyInstance, { service }: HttpApi, groups: RequestGroups): void {
  app.post('/generate', async (request, reply) => {
    const { requests, isFlat, endText, fields } = toFasterTransformerCall(request.body, service.limits);
    const jobs = inNamesOf(fields, () =>
      requests.map((wire, i) => ({
        request: toGenerationRequest(wire, service.limits),
        context: toCallContext({ requestId: `${request.id}-${i}`, priority: 0, timeoutMs: 0 }, request.caller),
      })),
    );
    const prepared = await service.prepareAll(
      jobs.map((job) => job.request),
      endOf(reply),
    );
    const ids = jobs.map(({ context }) => context.requestId!);
    const results = await groups.run(request.id, ids, () =>
      runRequests(
        reply,
        jobs.map(
          ({ context }, i) =>
            () =>
              service.generate(prepared[i]!, context, () => {}),
        ),
      ),
    );
    const texts = results.map(({ value }) => {
      const { blanks, beams } = value.outputs[0]!;
      if (beams.length > 0) return beams.map((beam) => throughFirst(endText, beam.blanks[0] ?? ''));
      return [(blanks[0]?.text ?? '') + (blanks[0]?.finish === 'stop' ? endText : '')];
    });
    return { text: isFlat ? texts.flat() : texts };
  });
}

const MAX_UINT32 = 0xffff_ffff;
const uint32 = z.int().min(0).max(MAX_UINT32);

const shared = {
  seed: optional(z.int()),
  sampling_strategy: optional(z.enum(['BaseStrategy', 'BeamSearchStrategy'])),
  num_beams: optional(uint32),
  length_penalty: optional(z.number()),
  no_repeat_ngram_size: optional(uint32),
  temperature: optional(z.number()),
  regix: optional(z.string()),
};
const promptBody = z.object({
  ...shared,
  prompt: z.custom<string | readonly string[]>(
    (value) => typeof value === 'string' || (Array.isArray(value) && value.length > 0 && value.every((each) => typeof each === 'string')),
    'expected a string or an array of strings',
  ),
  max_tokens: optional(uint32.min(1)),
  min_tokens: optional(uint32),
  top_k: optional(uint32),
  top_p: optional(z.number()),
});
const textBody = z.object({
  ...shared,
  text: z.string(),
  out_seq_length: optional(uint32),
  min_gen_length: optional(uint32),
  topk: optional(uint32),
  topp: optional(z.number()),
});

interface FasterTransformerCall {
  readonly requests: readonly GenerateRequest__Output[];
  /** The older form's answer has all texts in one list. */
  readonly isFlat: boolean;
  /** A text goes on to the first of these, and has it; empty: none. */
  readonly endText: string;
  /** Names of the validator's fields in this form. */
  readonly fields: Readonly<Record<string, string>>;
}

const SHARED_FIELDS = {
  'beam_search.num_beams': 'num_beams',
  'beam_search.length_penalty': 'length_penalty',
  'beam_search.no_repeat_ngram_size': 'no_repeat_ngram_size',
  stop: 'regix',
  'stop[0]': 'regix',
};
const PROMPT_FIELDS = { ...SHARED_FIELDS, 'prompt.text': 'prompt', max_new_tokens: 'max_tokens', min_new_tokens: 'min_tokens' };
const TEXT_FIELDS = {
  ...SHARED_FIELDS,
  'prompt.text': 'text',
  max_new_tokens: 'out_seq_length',
  min_new_tokens: 'min_gen_length',
  top_k: 'topk',
  top_p: 'topp',
};

/** @throws InvalidRequestError naming the field */
export function toFasterTransformerCall(body: unknown, limits: Limits): FasterTransformerCall {
  const isOld = typeof body === 'object' && body !== null && 'text' in body && !('prompt' in body);
  if (!isOld) {
    const parsed = parseBody(promptBody, body);
    const prompts = typeof parsed.prompt === 'string' ? [parsed.prompt] : parsed.prompt;
    const wire = toWire(parsed, {
      seed: parsed.seed ?? 42,
      maxNewTokens: parsed.max_tokens ?? 64,
      minNewTokens: parsed.min_tokens ?? 0,
      topK: parsed.top_k ?? 5,
      topP: parsed.top_p ?? 0,
    });
    return { requests: withTexts(wire, prompts, 'prompt', limits), isFlat: false, endText: literalOf(parsed.regix), fields: PROMPT_FIELDS };
  }
  const parsed = parseBody(textBody, body);
  // This form takes 0 for "not given".
  const wire = toWire(parsed, {
    seed: parsed.seed || 1234,
    maxNewTokens: parsed.out_seq_length || 200,
    minNewTokens: parsed.min_gen_length || 20,
    topK: parsed.topk || 5,
    topP: parsed.topp || 0,
  });
  const lines = parsed.text.split(/\r\n|\n|\r/);
  if (lines.length > 1 && lines.at(-1) === '') lines.pop(); // splitlines() of Python
  return { requests: withTexts(wire, lines, 'text', limits), isFlat: true, endText: literalOf(parsed.regix), fields: TEXT_FIELDS };
}

type Shared = z.infer<z.ZodObject<typeof shared>>;

function toWire(
  body: Shared,
  given: { seed: number; maxNewTokens: number; minNewTokens: number; topK: number; topP: number },
): GenerateRequest__Output {
  const isBeamSearch = body.sampling_strategy === 'BeamSearchStrategy';
  return {
    ...EMPTY_REQUEST,
    ...given,
    seed: String(BigInt.asUintN(64, BigInt(given.seed))),
    minNewTokens: isBeamSearch ? given.minNewTokens : 0, // its sampling knows no least length
    temperature: body.temperature ?? 1,
    stop: body.regix && !isBeamSearch ? [literalOf(body.regix)] : [], // beams are cut when they are there
    beamSearch: isBeamSearch
      ? {
          numBeams: body.num_beams || 1,
          lengthPenalty: body.length_penalty ?? 0.9,
          noRepeatNgramSize: body.no_repeat_ngram_size ?? 3,
          deterministic: false,
          bannedPrefixes: [],
          paddedLength: 0,
        }
      : null,
  };
}

/**
 * The old server ends a generation when its text matches; here expressions of strangers are not run, as one can take for ever. `.*word.*`
 * is what its own client sends, and means a stop string.
 */
function literalOf(regix: string | undefined): string {
  if (!regix) return '';
  const literal = /^\.\*([^\\^$.|?*+()[\]{}]+)(?:\.\*)?$/.exec(regix)?.[1];
  if (literal === undefined)
    throw new InvalidRequestError('regix: only .*text.* is taken, which ends the generation after "text"', 'regix');
  return literal;
}

function throughFirst(end: string, text: string): string {
  const at = end === '' ? -1 : text.indexOf(end);
  return at < 0 ? text : text.slice(0, at + end.length);
}

function withTexts(wire: GenerateRequest__Output, texts: readonly string[], field: string, limits: Limits): GenerateRequest__Output[] {
  if (texts.length > limits.maxBatchedPrompts) {
    throw new InvalidRequestError(
      `${field}: ${texts.length} contexts, at most ${limits.maxBatchedPrompts} are taken: send several requests`,
      field,
    );
  }
  return texts.map((text) => ({ ...wire, text, prompt: 'text' }));
}

function inNamesOf<R>(fields: Readonly<Record<string, string>>, work: () => R): R {
  try {
    return work();
  } catch (error) {
    throw inFieldsOf(fields, error);
  }
}
