import fc from 'fast-check';
import { expect, test } from 'vitest';
import { InvalidRequestError } from '../../common/errors.js';
import type { GenerateRequest__Output } from '../../proto/generated/tandem/v1/GenerateRequest.js';
import { REQUEST_LIMITS, toDetokenizeIds, toGenerationRequest, toLogitsRequest, toScoreRequest, toTokenizeText } from './validate.js';

const nothing: GenerateRequest__Output = {
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
  options: null,
  logitBias: [],
  presencePenalty: 0,
  frequencyPenalty: 0,
  stop: [],
};
const text: GenerateRequest__Output = { ...nothing, text: 'a' };
const beamSearch = { numBeams: 4, lengthPenalty: 1, noRepeatNgramSize: 0, deterministic: true, bannedPrefixes: [], paddedLength: 0 };

test('what is not given has the documented defaults', () => {
  expect(toGenerationRequest(text)).toEqual({
    prompt: { kind: 'text', text: 'a' },
    mode: 'fill-blanks',
    maxNewTokens: 256,
    maxRowTokens: null,
    minNewTokens: 0,
    sampling: { temperature: 1, topK: 0, topP: 0 },
    beams: null,
    n: 1,
    seed: 1234n,
    endTokens: null,
    bannedTokens: [],
    options: null,
    logitBias: [],
    presencePenalty: 0,
    frequencyPenalty: 0,
    stopStrings: [],
    topLogprobs: null,
  });
  expect(toGenerationRequest({ ...text, maxRowTokens: 100 })).toMatchObject({ maxNewTokens: null, maxRowTokens: 100 });
  expect(toGenerationRequest({ ...text, endTokens: { ids: [] } }).endTokens).toEqual([]);
  expect(toGenerationRequest({ ...text, temperature: 0 }).sampling.temperature).toBe(0);
  expect(toGenerationRequest({ ...text, seed: '18446744073709551615' }).seed).toBe(2n ** 64n - 1n);
  expect(toGenerationRequest({ ...text, beamSearch }).beams).toMatchObject({ numBeams: 4, considerEnd: true });
});

test.each([
  { name: 'no prompt', change: { text: undefined }, message: 'prompt is missing' },
  { name: 'an unknown mode', change: { mode: 'MODE_X' }, message: 'mode MODE_X is unknown' },
  { name: 'NaN', change: { temperature: NaN }, message: 'temperature is NaN, allowed are 0 to 1000' },
  { name: 'a negative temperature', change: { temperature: -1 }, message: 'temperature is -1' },
  { name: 'top_p above 1', change: { topP: 1.5 }, message: 'top_p is 1.5' },
  { name: 'too many samples', change: { n: REQUEST_LIMITS.samples + 1 }, message: 'n is 65, allowed are 1 to 64' },
  { name: 'an empty stop string', change: { stop: [''] }, message: 'stop[0] has 0 bytes' },
  { name: 'many stop strings', change: { stop: new Array<string>(17).fill('x') }, message: 'stop has 17 entries, at most 16' },
  { name: 'no beams', change: { beamSearch: { ...beamSearch, numBeams: 0 } }, message: 'beam_search.num_beams is 0' },
  {
    name: 'an infinite penalty',
    change: { beamSearch: { ...beamSearch, lengthPenalty: Infinity } },
    message: 'length_penalty is Infinity',
  },
  {
    name: 'an empty prefix',
    change: { beamSearch: { ...beamSearch, bannedPrefixes: [{ ids: [] }] } },
    message: 'banned_prefixes[0] is empty',
  },
  { name: 'samples of beams', change: { beamSearch, n: 2 }, message: 'n is 2: beam search gives its beams' },
  { name: 'stop strings with beams', change: { beamSearch, stop: ['x'] }, message: 'stop: beam search' },
  { name: 'log-probabilities with beams', change: { beamSearch, logprobs: 1 }, message: 'logprobs: not given by beam search' },
  { name: 'a long text', change: { text: 'x'.repeat(REQUEST_LIMITS.textBytes + 1) }, message: 'prompt.text has 1048577 bytes' },
])('$name is refused by name', ({ change, message }) => {
  const wire = { ...text, ...change } as GenerateRequest__Output;
  expect(() => toGenerationRequest(wire)).toThrow(InvalidRequestError);
  expect(() => toGenerationRequest(wire)).toThrow(message);
});

test('whatever numbers come, there is a request within the limits or an InvalidRequestError', () => {
  const uint32 = fc.nat(0xffffffff);
  const float = fc.float({ noDefaultInfinity: false, noNaN: false });
  const change = fc.record({
    temperature: fc.option(float, { nil: undefined }),
    topP: float,
    topK: uint32,
    n: uint32,
    maxNewTokens: uint32,
    minNewTokens: uint32,
    logprobs: fc.option(uint32, { nil: undefined }),
    stop: fc.array(fc.string(), { maxLength: 20 }),
    beamSearch: fc.option(fc.record({ numBeams: uint32, lengthPenalty: float, noRepeatNgramSize: uint32, paddedLength: uint32 }), {
      nil: null,
    }),
  });
  fc.assert(
    fc.property(change, (fields) => {
      const wire = {
        ...text,
        ...fields,
        beamSearch: fields.beamSearch && { ...beamSearch, ...fields.beamSearch },
      } as GenerateRequest__Output;
      try {
        const { sampling, n, beams } = toGenerationRequest(wire);
        expect(sampling.temperature >= 0 && sampling.topP >= 0 && sampling.topP <= 1).toBe(true);
        expect(n >= 1 && n <= REQUEST_LIMITS.samples).toBe(true);
        expect(
          beams === null || (beams.numBeams >= 1 && beams.numBeams <= REQUEST_LIMITS.beams && Number.isFinite(beams.lengthPenalty)),
        ).toBe(true);
      } catch (error) {
        expect(error).toBeInstanceOf(InvalidRequestError);
      }
    }),
  );
});

test('the other requests', () => {
  expect(() => toScoreRequest({ text: 'a', mode: 'MODE_UNSPECIFIED', choices: [], multitaskEncoding: false })).toThrow('choices is empty');
  expect(() => toScoreRequest({ text: 'a', mode: 'MODE_MASK', choices: [{}], multitaskEncoding: false })).toThrow('choices[0] is missing');
  expect(toLogitsRequest({ ids: [4, 5], positions: [], bidirectionalTokens: 1, rows: 0 })).toEqual({
    ids: [4, 5],
    positions: [0, 1],
    bidirectionalTokens: 1,
    rows: 1,
  });
  expect(() => toTokenizeText({ text: 'a', asPrompt: true, noDummyPrefix: true })).toThrow('no_dummy_prefix');
  expect(() => toDetokenizeIds({ ids: new Array<number>(65537).fill(1), showSpecial: false })).toThrow('ids has 65537 entries');
});
