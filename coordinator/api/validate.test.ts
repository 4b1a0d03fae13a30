import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ForbiddenError, InvalidRequestError } from '../../common/errors.js';
import { Generation, Ops } from '../../common/services.js';
import type { GenerateRequest } from '../../proto/generated/tandem/v1/GenerateRequest.js';
import type { GenerateRequest__Output } from '../../proto/generated/tandem/v1/GenerateRequest.js';
import type { LogitsRequest } from '../../proto/generated/tandem/v1/LogitsRequest.js';
import type { RequestOptions__Output } from '../../proto/generated/tandem/v1/RequestOptions.js';
import type { ScoreRequest } from '../../proto/generated/tandem/v1/ScoreRequest.js';
import { LOCAL_CALLER, type Caller } from '../access/caller.js';
import { DEFAULT_LIMITS, limitsFrom } from '../limits.js';
import {
  MAX_TIMEOUT_MS,
  toAbortId,
  toCallContext,
  toDetokenizeIds,
  toDrainTimeout,
  toGenerationRequest,
  toLogitsRequest,
  toScoreRequest,
  toTokenizeText,
  toWatchInterval,
} from './validate.js';

/** As it comes out of the wire: what is not given has its default. */
function generateWire(request: GenerateRequest): GenerateRequest__Output {
  const { requestSerialize, requestDeserialize } = Generation.service.Generate;
  return requestDeserialize(requestSerialize(request));
}

function scoreWire(request: ScoreRequest) {
  const { requestSerialize, requestDeserialize } = Generation.service.Score;
  return requestDeserialize(requestSerialize(request));
}

function logitsWire(request: LogitsRequest) {
  const { requestSerialize, requestDeserialize } = Generation.service.Logits;
  return requestDeserialize(requestSerialize(request));
}

const toRequest = (request: GenerateRequest, limits = DEFAULT_LIMITS) => toGenerationRequest(generateWire(request), limits);

describe('generation', () => {
  test('what is not given has the documented defaults', () => {
    expect(toRequest({ text: 'a' })).toEqual({
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
      stopStrings: [],
      logitBias: [],
      penalties: { presence: 0, frequency: 0, repetition: 1 },
      topLogprobs: null,
    });
    expect(toRequest({ text: 'a', maxRowTokens: 100 })).toMatchObject({ maxNewTokens: null, maxRowTokens: 100 });
    expect(toRequest({ text: 'a', endTokens: { ids: [] } }).endTokens).toEqual([]);
    expect(toRequest({ text: 'a', temperature: 0 }).sampling.temperature).toBe(0);
    expect(toRequest({ text: 'a', seed: '18446744073709551615' }).seed).toBe(2n ** 64n - 1n);
    expect(toRequest({ text: 'a', beamSearch: { numBeams: 4 } }).beams).toMatchObject({ numBeams: 4, considerEnd: true });
    expect(toRequest({ ids: { ids: [4] } }).prompt).toEqual({ kind: 'ids', ids: [4] });
  });

  test('bias and penalties', () => {
    const { logitBias, penalties } = toRequest({
      ...{ text: 'a', logitBias: [{ token: 4, bias: -100 }] },
      ...{ presencePenalty: -2, frequencyPenalty: 2, repetitionPenalty: 1.5 },
    });
    expect(logitBias).toEqual([{ token: 4, bias: -100 }]);
    expect(penalties).toEqual({ presence: -2, frequency: 2, repetition: 1.5 });
  });

  test('a limit on new tokens holds for requests that set none', () => {
    const limits = limitsFrom({ maxNewTokens: 100 });
    expect(toRequest({ text: 'a' }, limits).maxNewTokens).toBe(100);
    expect(toRequest({ text: 'a', maxRowTokens: 2000 }, limits).maxNewTokens).toBe(100);
    expect(toRequest({ text: 'a', maxNewTokens: 50 }, limits).maxNewTokens).toBe(50);
    expect(() => toRequest({ text: 'a', maxNewTokens: 101 }, limits)).toThrow('max_new_tokens is 101, this server allows 100');
  });

  const beams = { beamSearch: { numBeams: 2, lengthPenalty: 1 } };
  test.each([
    { name: 'no prompt', change: { text: undefined }, field: 'prompt', message: 'prompt is missing' },
    { name: 'an unknown mode', change: { mode: 77 }, field: 'mode', message: 'mode 77 is unknown' },
    { name: 'NaN', change: { temperature: NaN }, field: 'temperature', message: 'temperature is NaN, allowed are 0 to 1000' },
    { name: 'a negative temperature', change: { temperature: -1 }, field: 'temperature', message: 'temperature is -1' },
    { name: 'top_p above 1', change: { topP: 1.5 }, field: 'top_p', message: 'top_p is 1.5' },
    { name: 'too many samples', change: { n: 65 }, field: 'n', message: 'n is 65, allowed are 1 to 64' },
    { name: 'an empty stop string', change: { stop: ['a', ''] }, field: 'stop[1]', message: 'stop[1] has 0 bytes' },
    { name: 'a long stop string', change: { stop: ['x'.repeat(257)] }, field: 'stop[0]', message: 'stop[0] has 257 bytes' },
    {
      name: 'many stop strings',
      change: { stop: new Array<string>(17).fill('x') },
      field: 'stop',
      message: 'stop has 17 entries, at most 16',
    },
    { name: 'many end tokens', change: { endTokens: { ids: new Array<number>(65).fill(1) } }, field: 'end_tokens', message: '65 entries' },
    { name: 'many bans', change: { bannedTokens: new Array<number>(4097).fill(1) }, field: 'banned_tokens', message: '4097 entries' },
    { name: 'many log-probabilities', change: { logprobs: 21 }, field: 'logprobs', message: 'logprobs is 21, allowed are 0 to 20' },
    { name: 'a bias', change: { logitBias: [{ token: 1, bias: 101 }] }, field: 'logit_bias[0].bias', message: 'is 101' },
    { name: 'a bias of NaN', change: { logitBias: [{ token: 1, bias: NaN }] }, field: 'logit_bias[0].bias', message: 'is NaN' },
    {
      name: 'many biases',
      change: { logitBias: new Array(1025).fill({ token: 1, bias: 1 }) },
      field: 'logit_bias',
      message: '1025 entries',
    },
    { name: 'a presence penalty', change: { presencePenalty: 2.5 }, field: 'presence_penalty', message: 'is 2.5' },
    { name: 'a frequency penalty', change: { frequencyPenalty: -Infinity }, field: 'frequency_penalty', message: 'is -Infinity' },
    {
      name: 'a repetition penalty',
      change: { repetitionPenalty: 0 },
      field: 'repetition_penalty',
      message: 'is 0, allowed are numbers above 0',
    },
    { name: 'no beams', change: { beamSearch: { numBeams: 0 } }, field: 'beam_search.num_beams', message: 'num_beams is 0' },
    {
      ...{ name: 'an infinite length penalty', change: { beamSearch: { numBeams: 2, lengthPenalty: Infinity } } },
      ...{ field: 'beam_search.length_penalty', message: 'length_penalty is Infinity' },
    },
    {
      ...{ name: 'an empty prefix', change: { beamSearch: { numBeams: 2, bannedPrefixes: [{ ids: [] }] } } },
      ...{ field: 'beam_search.banned_prefixes[0]', message: 'banned_prefixes[0] is empty' },
    },
    {
      ...{ name: 'a long prefix', change: { beamSearch: { numBeams: 2, bannedPrefixes: [{ ids: new Array<number>(17).fill(1) }] } } },
      ...{ field: 'beam_search.banned_prefixes[0]', message: '17 entries, at most 16' },
    },
    { name: 'samples of beams', change: { ...beams, n: 2 }, field: 'n', message: 'n is 2: beam search gives its beams' },
    { name: 'stop strings with beams', change: { ...beams, stop: ['x'] }, field: 'stop', message: 'stop: beam search' },
    { name: 'log-probabilities with beams', change: { ...beams, logprobs: 1 }, field: 'logprobs', message: 'not given by beam search' },
    { name: 'bias with beams', change: { ...beams, logitBias: [{ token: 1, bias: 1 }] }, field: 'logit_bias', message: 'takes none' },
    { name: 'penalties with beams', change: { ...beams, presencePenalty: 1 }, field: 'presence_penalty', message: 'takes none' },
    { name: 'a long text', change: { text: 'x'.repeat(1024 * 1024 + 1) }, field: 'prompt.text', message: 'prompt.text has 1048577 bytes' },
  ])('$name is refused by name', ({ change, field, message }) => {
    const error = thrown(() => toRequest({ text: 'a', ...change } as GenerateRequest));
    expect(error).toBeInstanceOf(InvalidRequestError);
    expect(error).toMatchObject({ field, message: expect.stringContaining(message) as string });
  });

  test('half of a character is refused, which JSON can carry', () => {
    const wire = { ...generateWire({ text: 'a' }), text: 'a\ud800' };
    expect(thrown(() => toGenerationRequest(wire, DEFAULT_LIMITS))).toMatchObject({ field: 'prompt.text' });
    const stop = { ...generateWire({ text: 'a' }), stop: ['\udc00b'] };
    expect(thrown(() => toGenerationRequest(stop, DEFAULT_LIMITS))).toMatchObject({ field: 'stop[0]' });
  });
});

describe('the options of a request', () => {
  const caller: Caller = { ...LOCAL_CALLER, name: 'a', maxPriority: 5 };
  const options = (change: Partial<RequestOptions__Output>): RequestOptions__Output => ({
    requestId: '',
    priority: 0,
    timeoutMs: 0,
    ...change,
  });

  test('none, and all', () => {
    expect(toCallContext(null, caller)).toEqual({
      ...{ caller, requestId: null, priority: 0, timeoutMs: null, arrivedMs: expect.any(Number) as number },
    });
    expect(toCallContext(options({ requestId: 'a.b_c:1-2', priority: -100, timeoutMs: 7 }), caller)).toEqual({
      ...{ caller, requestId: 'a.b_c:1-2', priority: -100, timeoutMs: 7, arrivedMs: expect.any(Number) as number },
    });
    expect(toCallContext(options({ timeoutMs: 2 ** 32 - 1 }), caller).timeoutMs).toBe(MAX_TIMEOUT_MS);
  });

  test.each([
    { change: { requestId: 'a b' }, field: 'options.request_id' },
    { change: { requestId: 'a\n' }, field: 'options.request_id' },
    { change: { requestId: 'x'.repeat(129) }, field: 'options.request_id' },
    { change: { priority: -101 }, field: 'options.priority' },
    { change: { priority: 0.5 }, field: 'options.priority' },
    { change: { timeoutMs: -1 }, field: 'options.timeout_ms' },
    { change: { timeoutMs: NaN }, field: 'options.timeout_ms' },
  ])('$change is refused', ({ change, field }) => {
    expect(thrown(() => toCallContext(options(change), caller))).toMatchObject({ code: 'INVALID_REQUEST', field });
  });

  test('a priority above that of the key is forbidden', () => {
    expect(toCallContext(options({ priority: 5 }), caller).priority).toBe(5);
    expect(() => toCallContext(options({ priority: 6 }), caller)).toThrow(ForbiddenError);
  });
});

describe('whatever comes, there is a request within the limits or an error that names the field', () => {
  const uint32 = fc.oneof(fc.nat(300), fc.nat(0xffffffff));
  const float = fc.float();
  const ids = fc.array(uint32, { maxLength: 20 });
  const text = fc.oneof(fc.string({ unit: 'binary' }), fc.string({ unit: 'binary-ascii' }), fc.constant('[MASK]'));
  const optional = <T>(value: fc.Arbitrary<T>) => fc.option(value, { nil: undefined });
  const options = fc.option(
    fc.record({
      requestId: fc.oneof(fc.string(), fc.string({ minLength: 120, maxLength: 140 }), fc.constant('')),
      priority: fc.oneof(fc.integer({ min: -110, max: 110 }), fc.integer({ min: -(2 ** 31), max: 2 ** 31 - 1 })),
      timeoutMs: uint32,
    }),
    { nil: null },
  );
  const mode = fc.oneof(fc.constantFrom(0, 1, 2, 3, 4), fc.nat(0x7fffffff)) as fc.Arbitrary<never>;
  const prompt = fc.oneof(fc.record({ text }), fc.record({ ids: fc.record({ ids }) }), fc.constant({}));

  /** What is thrown is an error of the client's making, about a field. */
  function expectsOrNames<T>(make: () => T, check: (made: T) => void): void {
    let made: T;
    try {
      made = make();
    } catch (error) {
      if (error instanceof ForbiddenError) return;
      expect(error).toBeInstanceOf(InvalidRequestError);
      const { field, message } = error as InvalidRequestError;
      expect(field).toMatch(/^[a-z_]+(\[\d+\])?(\.[a-z_]+(\[\d+\])?)*$/);
      expect(message).not.toContain('\n');
      return;
    }
    check(made);
  }

  test('generation', () => {
    const request = fc.record({
      mode,
      maxNewTokens: uint32,
      minNewTokens: uint32,
      maxRowTokens: uint32,
      temperature: optional(float),
      topK: uint32,
      topP: float,
      seed: optional(fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }).map(String)),
      n: uint32,
      endTokens: fc.option(fc.record({ ids }), { nil: null }),
      bannedTokens: ids,
      stop: fc.array(text, { maxLength: 20 }),
      logprobs: optional(uint32),
      logitBias: fc.array(fc.record({ token: uint32, bias: float }), { maxLength: 5 }),
      presencePenalty: float,
      frequencyPenalty: float,
      repetitionPenalty: optional(float),
      beamSearch: fc.option(
        fc.record({
          numBeams: uint32,
          lengthPenalty: float,
          noRepeatNgramSize: uint32,
          paddedLength: uint32,
          bannedPrefixes: fc.array(fc.record({ ids }), { maxLength: 5 }),
        }),
        { nil: null },
      ),
    });
    const limits = limitsFrom({ maxNewTokens: 500 });
    fc.assert(
      fc.property(request, prompt, options, (fields, given, opts) => {
        const wire = generateWire({ ...fields, ...given, options: opts } as GenerateRequest);
        expectsOrNames(
          () => toGenerationRequest(wire, limits),
          ({ sampling, n, beams, maxNewTokens, stopStrings, logitBias, penalties, topLogprobs, seed }) => {
            expect(sampling.temperature >= 0 && sampling.temperature <= 1000 && sampling.topP >= 0 && sampling.topP <= 1).toBe(true);
            expect(n >= 1 && n <= limits.maxSamples).toBe(true);
            expect(maxNewTokens! >= 1 && maxNewTokens! <= 500).toBe(true);
            expect(stopStrings.every((stop) => stop !== '' && Buffer.byteLength(stop) <= limits.maxStopStringBytes)).toBe(true);
            expect(logitBias.every(({ bias }) => Math.abs(bias) <= 100)).toBe(true);
            expect(Math.abs(penalties.presence) <= 2 && Math.abs(penalties.frequency) <= 2).toBe(true);
            expect(penalties.repetition > 0 && penalties.repetition <= 10).toBe(true);
            expect(topLogprobs === null || topLogprobs <= limits.maxLogprobs).toBe(true);
            expect(seed >= 0n && seed < 2n ** 64n).toBe(true);
            if (beams === null) return;
            expect(beams.numBeams >= 1 && beams.numBeams <= limits.maxBeams && Math.abs(beams.lengthPenalty) <= 100).toBe(true);
            expect(n === 1 && stopStrings.length === 0 && logitBias.length === 0 && topLogprobs === null).toBe(true);
          },
        );
        expectsOrNames(
          () => toCallContext(wire.options, { ...LOCAL_CALLER, maxPriority: 7 }),
          ({ requestId, priority, timeoutMs }) => {
            expect(requestId === null || /^[A-Za-z0-9._:-]{1,128}$/.test(requestId)).toBe(true);
            expect(priority >= -100 && priority <= 7).toBe(true);
            expect(timeoutMs === null || (timeoutMs > 0 && timeoutMs <= MAX_TIMEOUT_MS)).toBe(true);
          },
        );
      }),
      { numRuns: 500 },
    );
  });

  test('scoring', () => {
    const choice = fc.oneof(fc.record({ text }), fc.record({ ids: fc.record({ ids }) }), fc.constant({}));
    const request = fc.record({ mode, choices: fc.array(choice, { maxLength: 5 }), multitaskEncoding: fc.boolean() });
    const limits = limitsFrom({ maxChoices: 3, maxTextBytes: 16 });
    fc.assert(
      fc.property(request, prompt, (fields, given) =>
        expectsOrNames(
          () => toScoreRequest(scoreWire({ ...fields, ...given }), limits),
          ({ choices, prompt: made }) => {
            expect(choices.length >= 1 && choices.length <= 3).toBe(true);
            for (const each of [made, ...choices]) if (each.kind === 'text') expect(Buffer.byteLength(each.text) <= 16).toBe(true);
          },
        ),
      ),
    );
  });

  test('logits', () => {
    const request = fc.record({ ids, positions: ids, bidirectionalTokens: uint32, rows: uint32 });
    fc.assert(
      fc.property(request, (fields) => {
        const { rows, positions, ids: made } = toLogitsRequest(logitsWire(fields));
        expect(rows >= 1 && made.length === fields.ids.length).toBe(true);
        expect(positions).toEqual(fields.positions.length > 0 ? fields.positions : fields.ids.map((_, i) => i));
      }),
    );
  });

  test('the tokenizer, abort, watch and drain', () => {
    const limits = limitsFrom({ maxTextBytes: 16, maxDetokenizedIds: 10 });
    fc.assert(
      fc.property(text, fc.boolean(), fc.boolean(), ids, fc.string(), uint32, (given, asPrompt, noDummyPrefix, given2, requestId, ms) => {
        expectsOrNames(
          () => toTokenizeText({ text: given, asPrompt, noDummyPrefix }, limits),
          (made) => expect(Buffer.byteLength(made) <= 16 && !(asPrompt && noDummyPrefix)).toBe(true),
        );
        expectsOrNames(
          () => toDetokenizeIds({ ids: given2, showSpecial: false }, limits),
          (made) => expect(made.length <= 10).toBe(true),
        );
        expectsOrNames(
          () => toAbortId({ requestId }),
          (made) => expect(made).toMatch(/^[A-Za-z0-9._:-]{1,128}$/),
        );
        expectsOrNames(
          () => toWatchInterval(watchWire(ms)),
          (made) => expect(made >= 100 && made <= 60_000).toBe(true),
        );
        expect(toDrainTimeout({ timeoutMs: ms })).toBe(ms === 0 ? null : Math.min(ms, MAX_TIMEOUT_MS));
      }),
    );
  });
});

function watchWire(intervalMs: number) {
  const { requestSerialize, requestDeserialize } = Ops.service.WatchStatus;
  return requestDeserialize(requestSerialize({ intervalMs }));
}

test('the other requests', () => {
  expect(thrown(() => toScoreRequest(scoreWire({ text: 'a', choices: [] }), DEFAULT_LIMITS))).toMatchObject({ field: 'choices' });
  expect(thrown(() => toScoreRequest(scoreWire({ text: 'a', choices: [{ text: 'b' }, {}] }), DEFAULT_LIMITS))).toMatchObject({
    ...{ field: 'choices[1]', message: 'choices[1] is missing: give text or ids' },
  });
  expect(toLogitsRequest(logitsWire({ ids: [4, 5], bidirectionalTokens: 1 }))).toEqual({
    ...{ ids: [4, 5], positions: [0, 1], bidirectionalTokens: 1, rows: 1 },
  });
  expect(() => toTokenizeText({ text: 'a', asPrompt: true, noDummyPrefix: true }, DEFAULT_LIMITS)).toThrow('no_dummy_prefix');
  expect(() => toDetokenizeIds({ ids: new Array<number>(65537).fill(1), showSpecial: false }, DEFAULT_LIMITS)).toThrow(
    'ids has 65537 entries',
  );
  expect(toWatchInterval(watchWire(0))).toBe(1000);
});

function thrown(make: () => unknown): unknown {
  try {
    make();
  } catch (error) {
    return error;
  }
  return expect.fail('nothing was thrown');
}
