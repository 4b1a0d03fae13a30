import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { InvalidRequestError, TandemError } from '../../../common/errors.js';
import { LOCAL_CALLER } from '../../access/caller.js';
import { DEFAULT_LIMITS } from '../../limits.js';
import { toCallContext, toGenerationRequest } from '../validate.js';
import { toCompletionCall } from './completion-body.js';
import { toFasterTransformerCall } from './faster-transformer.js';
import { parseJson } from './parse-body.js';

const specialTokens = { mask: 90, gmask: 91, smask: 92, eod: 93, sop: 94, eop: 95, enc: 96, dblock: 97, eos: 2 };
const context = { limits: DEFAULT_LIMITS, specialTokens, seed: () => 77n };
const request = (more: object) => toCompletionCall({ model: 'm', prompt: 'p', ...more }, context);
const wire = (more: object) => request(more).requests[0]!;

describe('what a body stands for', () => {
  test.each([
    {
      name: 'OpenAI’s defaults',
      body: {},
      expected: { text: 'p', maxNewTokens: 16, topK: 0, topP: 0, seed: '77', n: 1, beamSearch: null },
    },
    { name: 'ids', body: { prompt: [1, 2] }, expected: { ids: { ids: [1, 2] }, prompt: 'ids' } },
    { name: 'a suffix', body: { suffix: ' s' }, expected: { text: 'p[MASK] s' } },
    { name: 'an empty suffix is none', body: { suffix: '' }, expected: { text: 'p' } },
    { name: 'top_p 1 is off', body: { top_p: 1 }, expected: { topP: 0 } },
    { name: 'top_p 0 is the best token', body: { top_p: 0, top_k: 9 }, expected: { topP: 0, topK: 1 } },
    { name: 'top_k -1 is off', body: { top_k: -1 }, expected: { topK: 0 } },
    { name: 'a negative seed', body: { seed: -1 }, expected: { seed: '18446744073709551615' } },
    { name: 'one stop string', body: { stop: 'x' }, expected: { stop: ['x'] } },
    { name: 'end tokens besides the model’s', body: { stop_token_ids: [5] }, expected: { endTokens: { ids: [95, 2, 5] } } },
    { name: 'end tokens alone', body: { stop_token_ids: [5], ignore_eos: true }, expected: { endTokens: { ids: [5] } } },
    { name: 'no end but the length', body: { ignore_eos: true }, expected: { endTokens: { ids: [] } } },
    { name: 'the model’s end tokens', body: {}, expected: { endTokens: null } },
    {
      name: 'biases',
      body: { logit_bias: { 7: -100, 8: 1.5 } },
      expected: { logitBias: [7, 8].map((token, i) => ({ token, bias: [-100, 1.5][i] })) },
    },
    { name: 'candidates, and what they are ranked by', body: { n: 2, best_of: 5 }, expected: { n: 5, logprobs: 0 } },
    { name: 'more log-probabilities than the ranking needs', body: { best_of: 5, logprobs: 3 }, expected: { n: 5, logprobs: 3 } },
    { name: 'a mode', body: { mode: 'unidirectional' }, expected: { mode: 'MODE_UNIDIRECTIONAL' } },
    { name: 'one beam is no beam search', body: { num_beams: 1 }, expected: { beamSearch: null } },
  ])('$name', ({ body, expected }) => {
    expect(wire(body)).toMatchObject(expected);
  });

  test('beams', () => {
    expect(wire({ num_beams: 4, n: 2 })).toMatchObject({ n: 1, beamSearch: { numBeams: 4, lengthPenalty: 1, deterministic: true } });
    expect(wire({ use_beam_search: true, best_of: 3, length_penalty: 0.5 })).toMatchObject({
      n: 1,
      beamSearch: { numBeams: 3, lengthPenalty: 0.5 },
    });
  });

  test.each([
    { body: {}, hasOwnMasks: false },
    { body: { prompt: 'a [sMASK]' }, hasOwnMasks: true },
    { body: { prompt: 'a MASK]' }, hasOwnMasks: false },
    { body: { suffix: 'b [MASK]' }, hasOwnMasks: true },
    { body: { prompt: [[1], [2, 91]] }, hasOwnMasks: true },
  ])('masks of the client in $body: $hasOwnMasks', ({ body, hasOwnMasks }) => {
    expect(request(body).hasOwnMasks).toBe(hasOwnMasks);
  });
});

const names = 'model prompt suffix max_tokens temperature top_p n best_of stop logprobs echo seed logit_bias presence_penalty frequency_penalty stream stream_options top_k min_tokens repetition_penalty stop_token_ids ignore_eos use_beam_search num_beams length_penalty no_repeat_ngram_size priority timeout_ms request_id mode return_token_ids user text out_seq_length min_gen_length topk topp regix sampling_strategy'.split(' '); // prettier-ignore

/** Values that are near to what is right, and any JSON. */
const value = fc.oneof(
  fc.jsonValue({ maxDepth: 3 }),
  fc.integer({ min: -3, max: 70 }),
  fc.double({ min: -3, max: 3 }),
  fc.constantFrom(Infinity, -Infinity, NaN, 2 ** 32, 2 ** 53, -(2 ** 53), 1e308, '', 'a [MASK]', true, null, undefined),
  fc.array(fc.integer({ min: -1, max: 5000 }), { maxLength: 70 }),
  fc.array(fc.string(), { maxLength: 5 }),
  fc.dictionary(fc.nat().map(String), fc.double(), { maxKeys: 3 }),
);
const body = fc
  .dictionary(fc.oneof({ weight: 9, arbitrary: fc.constantFrom(...names) }, { weight: 1, arbitrary: fc.string() }), value)
  .map((fields) => ({ ...fields, ...(Math.abs(Object.keys(fields).length) % 2 ? { model: 'm', prompt: 'p' } : {}) }));

/** Every body is a request that the rest can take, or an InvalidRequestError of one line. */
function isTakenOrRefused(work: () => void): void {
  try {
    work();
  } catch (error) {
    expect(error).toBeInstanceOf(TandemError);
    expect((error as Error).message).not.toMatch(/\n/);
    expect((error as Error).message.length).toBeLessThan(500);
  }
}

describe('any body', () => {
  test('is a completion or refused', () => {
    fc.assert(
      fc.property(body, (given) =>
        isTakenOrRefused(() => {
          const call = toCompletionCall(given, context);
          expect(call.requests.length).toBeGreaterThan(0);
          for (const each of call.requests) {
            const request = toGenerationRequest(each, DEFAULT_LIMITS);
            toCallContext(each.options, LOCAL_CALLER);
            expect(request.n).toBeGreaterThanOrEqual(call.isBeamSearch ? 1 : call.numChoices);
            expect(Number.isFinite(request.sampling.temperature + request.sampling.topP + request.sampling.topK)).toBe(true);
            expect(request.maxNewTokens).toBeGreaterThan(0);
          }
        }),
      ),
      { numRuns: 3000 },
    );
  });

  test('is an old client’s or refused', () => {
    fc.assert(
      fc.property(body, (given) =>
        isTakenOrRefused(() => {
          for (const each of toFasterTransformerCall(given, DEFAULT_LIMITS).requests) toGenerationRequest(each, DEFAULT_LIMITS);
        }),
      ),
      { numRuns: 3000 },
    );
  });

  test('of any bytes is JSON or refused', () => {
    fc.assert(fc.property(fc.uint8Array({ maxLength: 200 }), (bytes) => isTakenOrRefused(() => parseJson(bytes))));
    fc.assert(
      fc.property(fc.json({ maxDepth: 20 }), (text) =>
        isTakenOrRefused(() => expect(parseJson(Buffer.from(text))).toEqual(JSON.parse(text))),
      ),
    );
  });

  test('with a million wrong items is refused with one message', () => {
    const items = Array.from({ length: 1_000_000 }, () => null);
    for (const more of [{ prompt: items }, { stop: items }, { stop_token_ids: items }]) {
      expect(() => request(more)).toThrow(InvalidRequestError);
    }
  });
});
