import type { FastifyInstance } from 'fastify';
import { z } from 'zod';
import { toDetokenizeIds, toTokenizeText } from '../validate.js';
import { inFieldsOf } from './completion-body.js';
import type { HttpApi } from './http-api.js';
import { checkModel } from './models.js';
import { optional, parseBody } from './parse-body.js';
import { endOf } from './run-requests.js';

const tokenizeBody = z.strictObject({
  model: optional(z.string()),
  prompt: z.string(),
  add_special_tokens: optional(z.boolean()),
});
const detokenizeBody = z.strictObject({
  model: optional(z.string()),
  // Checked as a whole: a schema of the items would write one issue for each of a million wrong ones.
  tokens: z.custom<readonly number[]>(
    (value) => Array.isArray(value) && value.every((id) => Number.isInteger(id) && id >= 0 && id <= 0xffff_ffff),
    'expected an array of token ids',
  ),
});

/** The bodies are vLLM's. `add_special_tokens`, its default: the words of masks become their tokens, as in a prompt. */
export function addTokenizerRoutes(app: FastifyInstance, api: HttpApi): void {
  const { service } = api;
  app.post('/tokenize', async (request, reply) => {
    const { model, prompt, add_special_tokens } = parseBody(tokenizeBody, request.body);
    if (model !== undefined) checkModel(api, model);
    const asPrompt = add_special_tokens ?? true;
    const text = inNames({ text: 'prompt' }, () => toTokenizeText({ text: prompt, asPrompt, noDummyPrefix: false }, service.limits));
    const tokens = await service.tokenize(text, { asPrompt, dummyPrefix: true }, endOf(reply));
    return { count: tokens.length, max_model_len: service.config.maxSequenceLength, tokens };
  });
  app.post('/detokenize', (request) => {
    const { model, tokens } = parseBody(detokenizeBody, request.body);
    if (model !== undefined) checkModel(api, model);
    const tokenizer = service.requireTokenizer();
    const ids = inNames({ ids: 'tokens' }, () => toDetokenizeIds({ ids: [...tokens], showSpecial: false }, service.limits));
    return { prompt: tokenizer.decode(ids) };
  });
}

function inNames<R>(names: Readonly<Record<string, string>>, check: () => R): R {
  try {
    return check();
  } catch (error) {
    throw inFieldsOf(names, error);
  }
}
