import { expect, test } from 'vitest';
import { linkService } from './wire.js';

const { responseSerialize: encode, responseDeserialize: decode } = linkService.Attach;

test('a message for several ranks is encoded once, and the next one again', () => {
  const step = { step: { stepId: 1, body: Buffer.of(1, 2, 3, 4) } };
  const bytes = encode(step);
  expect(encode(step)).toBe(bytes);
  expect(decode(bytes)).toMatchObject(step);
  const next = { step: { stepId: 2 ** 31, body: Buffer.of(1, 2, 3, 4, 5) } };
  expect(decode(encode(next))).toMatchObject(next);
});

test('messages that are no steps are encoded, too', () => {
  expect(decode(encode({ abort: { epoch: 3 } }))).toMatchObject({ abort: { epoch: 3 } });
});
