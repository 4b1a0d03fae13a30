import fc from 'fast-check';
import { expect, test } from 'vitest';
import { Generation } from '../../common/services.js';
import { encodeDelta } from './encode-delta.js';

const { responseDeserialize: decode } = Generation.service.Generate;

const token = fc.oneof(fc.nat(0xffffffff), fc.constantFrom(0, 1, 127, 128, 16383, 16384, 2 ** 21, 2 ** 28, 2 ** 31, 2 ** 32 - 1));
const logprob = fc.float({ noNaN: true });
const tokenLogprob = fc.record({ token, logprob, top: fc.array(fc.record({ token, logprob })) });

test('the general decoder reads what was encoded', () => {
  const delta = fc.record({
    output: fc.oneof(fc.constant(0), token),
    blank: fc.oneof(fc.constant(0), token),
    text: fc.string({ unit: 'grapheme' }),
    tokens: fc.array(token),
    logprobs: fc.option(fc.array(tokenLogprob)),
  });
  fc.assert(
    fc.property(delta, (message) => {
      expect(decode(encodeDelta(message))).toEqual({ event: 'delta', delta: { ...message, logprobs: message.logprobs ?? [] } });
    }),
  );
});

test('a message longer than any before it', () => {
  const top = Array.from({ length: 40 }, (_, i) => ({ token: 2 ** 31 + i, logprob: -i }));
  const logprobs = Array.from({ length: 3000 }, (_, i) => ({ token: 2 ** 30 + i, logprob: -0.5, top }));
  const message = { output: 7, blank: 3, text: '\u3042'.repeat(100_000), tokens: logprobs.map((each) => each.token), logprobs };
  expect(decode(encodeDelta(message))).toEqual({ event: 'delta', delta: message });
});
