import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { EngineError } from './errors.js';
import {
  decodeResultBody,
  decodeStepBody,
  encodeResultBody,
  encodeStepBody,
  type StepBody,
  type StepExtend,
  type StepExtendResult,
  type StepWant,
} from './step-codec.js';

const word = fc.nat({ max: 0xffffffff });
const words = fc.array(word, { maxLength: 20 });
const float = fc.float(); // NaN, infinities and -0 among them
const floats = fc.array(float, { maxLength: 20 });
const noise = fc.record({ seed: fc.bigInt({ min: 0n, max: (1n << 64n) - 1n }), stream: word, position: word });
const kind = <Kind extends string>(name: Kind) => fc.constant(name);

const want: fc.Arbitrary<StepWant> = fc.oneof(
  fc.record({ kind: kind('none') }),
  fc.record({
    kind: kind('sample'),
    params: fc.record({
      temperature: float,
      topK: word,
      topP: float,
      bannedTokens: words,
      biasTokens: words,
      biases: floats,
      repetitionPenalty: float,
      repeatedTokens: words,
    }),
    noise,
    topLogprobs: word,
  }),
  fc.record({ kind: kind('candidates'), count: word, bannedTokens: words, noise: fc.option(noise) }),
  fc.record({ kind: kind('targets'), tokens: words }),
  fc.record({ kind: kind('logits'), rows: word }),
);

const extend: fc.Arbitrary<StepExtend> = fc.record({
  tokens: words,
  positions: words,
  blockTable: words,
  cachedTokens: word,
  bidirectionalTokens: word,
  firstLayer: word,
  endLayer: word,
  want,
  sampledBy: word.map((each) => each - 1),
});
const stepBody: fc.Arbitrary<StepBody> = fc.record({ blockCopies: words, extends: fc.array(extend, { maxLength: 6 }) });

const result: fc.Arbitrary<StepExtendResult> = fc.oneof(
  fc.record({ kind: kind('none') }),
  fc.record({ kind: kind('sample'), token: word, logprob: float, topTokens: words, topLogprobs: floats }),
  fc.record({ kind: kind('candidates'), tokens: words, logprobs: floats, keys: floats }),
  fc.record({ kind: kind('targets'), logprobs: floats }),
  fc.record({ kind: kind('logits'), logits: floats.map((values) => Float32Array.from(values)) }),
  fc.record({ kind: kind('error'), message: fc.string({ unit: 'binary', maxLength: 40 }) }),
);
const results = fc.array(result, { maxLength: 8 });

/** Typed arrays as plain ones. */
const plain = (value: unknown): unknown => {
  if (value instanceof Uint32Array || value instanceof Float32Array) return [...value];
  if (Array.isArray(value)) return value.map(plain);
  if (typeof value !== 'object' || value === null) return value;
  return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, plain(inner)]));
};

/** The same bytes at an odd place of a larger buffer, as messages lie in what a stream receives. */
const displaced = (bytes: Uint8Array): Uint8Array => {
  const buffer = Buffer.alloc(bytes.length + 8, 0xa5);
  buffer.set(bytes, 3);
  return buffer.subarray(3, 3 + bytes.length);
};

describe.each([
  {
    name: 'step',
    bodies: stepBody.map((body) => ({ body: body, bytes: Uint8Array.from(encodeStepBody(body)) })),
    decode: decodeStepBody,
    again: (decoded: unknown) => encodeStepBody(decoded as StepBody),
    greedy: [[0xffffffff], [0, 0xffffffff], [0, 1, 0, 0, 0, 0, 0xffffffff], [0, 1, 0, 0, 0, 0, 0, 0, 0, 3, 0xffffffff]],
  },
  {
    name: 'result',
    bodies: results.map((body) => ({ body: body, bytes: Uint8Array.from(encodeResultBody(body)) })),
    decode: decodeResultBody,
    again: (decoded: unknown) => encodeResultBody(decoded as StepExtendResult[]),
    greedy: [[0xffffffff], [1, 3, 0xffffffff], [1, 4, 0x7fffffff], [1, 5, 0xffffffff], [1, 5, 5, 0x20202020]],
  },
])('a $name body', ({ bodies, decode, again, greedy }) => {
  /** Decodes or throws an EngineError; what it decodes is no larger than the bytes. */
  const survives = (bytes: Uint8Array): void => {
    let decoded: unknown;
    try {
      decoded = decode(bytes);
    } catch (error) {
      expect(error).toBeInstanceOf(EngineError);
      expect((error as Error).message).toMatch(/^a (step|result) body /);
      return;
    }
    expect(plain(decode(displaced(bytes)))).toEqual(plain(decoded));
    expect(plain(decode(again(decoded)))).toEqual(plain(decoded));
  };

  test('comes back as it was, wherever its bytes lie', () => {
    fc.assert(
      fc.property(bodies, ({ body, bytes }) => {
        expect(plain(decode(bytes))).toEqual(plain(body));
        expect(plain(decode(displaced(bytes)))).toEqual(plain(body));
      }),
    );
  });

  test('that ends too early, or has bytes left over, is refused', () => {
    fc.assert(
      fc.property(bodies, fc.nat(), fc.uint8Array({ minLength: 1, maxLength: 40 }), ({ bytes }, length, more) => {
        expect(() => decode(bytes.subarray(0, length % bytes.length))).toThrow(EngineError);
        expect(() => decode(Uint8Array.from([...bytes, ...more]))).toThrow(EngineError);
      }),
    );
  });

  test('with words changed is refused or is another body', () => {
    fc.assert(
      fc.property(
        bodies,
        fc.array(fc.tuple(fc.nat(), fc.oneof(word, fc.nat({ max: 50 }))), { minLength: 1, maxLength: 4 }),
        ({ bytes }, changes) => {
          const changed = new Uint32Array(Uint8Array.from(bytes).buffer);
          for (const [at, value] of changes) changed[at % changed.length] = value;
          survives(new Uint8Array(changed.buffer));
        },
      ),
      { numRuns: 2000 },
    );
  });

  test('of random words is refused or is a body', () => {
    const anyWords = fc.array(fc.oneof(word, fc.nat({ max: 6 })), { maxLength: 60 });
    fc.assert(
      fc.property(anyWords, (values) => survives(new Uint8Array(Uint32Array.from(values).buffer))),
      { numRuns: 2000 },
    );
    fc.assert(fc.property(fc.uint8Array({ maxLength: 60 }), survives));
  });

  test('that claims more elements than it has words is refused before they are read', () => {
    for (const values of greedy) expect(() => decode(new Uint8Array(Uint32Array.from(values).buffer))).toThrow('ends too early');
  });
});

test('bodies larger than the first buffer come back', () => {
  const tokens = Array.from({ length: 5000 }, (_, i) => i);
  const logits = Float32Array.from(tokens);
  const body = { blockCopies: tokens, extends: [] };
  expect(plain(decodeStepBody(encodeStepBody(body)))).toEqual(body);
  const message = 'ü'.repeat(5001);
  const all: StepExtendResult[] = [
    { kind: 'logits', logits },
    { kind: 'error', message },
    { kind: 'error', message: '' },
    { kind: 'none' },
  ];
  expect(plain(decodeResultBody(encodeResultBody(all)))).toEqual(plain(all));
});

test('a want cannot be an error', () => {
  const step = encodeStepBody({
    blockCopies: [],
    extends: [
      {
        tokens: [],
        positions: [],
        blockTable: [],
        cachedTokens: 0,
        bidirectionalTokens: 0,
        firstLayer: 0,
        endLayer: 1,
        want: { kind: 'none' },
        sampledBy: -1,
      },
    ],
  });
  const changed = Uint8Array.from(step);
  changed[changed.length - 4] = 5;
  expect(() => decodeStepBody(changed)).toThrow('a step body with an unknown kind in word 10');
});
