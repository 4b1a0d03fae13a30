import fc from 'fast-check';
import { expect, test } from 'vitest';
import { InvalidRequestError } from '../../../common/errors.js';
import { Generation } from '../../../common/services.js';
import type { GenerateRequest } from '../../../proto/generated/tandem/v1/GenerateRequest.js';
import { strictly } from './strict-message.js';

const { requestSerialize: encode, requestDeserialize: decode } = Generation.service.Generate;
const strict = strictly(decode);

const text = fc.string({ unit: 'grapheme' });
const request: fc.Arbitrary<GenerateRequest> = fc.record({
  text: fc.oneof(
    text,
    fc.constant('a\ufffd'),
    text.map((some) => `${some}\ufffd`),
  ),
  stop: fc.array(text),
  bannedTokens: fc.array(fc.nat(0xffffffff)),
  temperature: fc.float(),
  seed: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }).map(String),
  beamSearch: fc.record({ numBeams: fc.nat(), bannedPrefixes: fc.array(fc.record({ ids: fc.array(fc.nat()) })) }),
  options: fc.record({ requestId: text, priority: fc.integer({ min: -100, max: 100 }) }),
});

test('what a client encoded is decoded as ever', () => {
  fc.assert(
    fc.property(request, (message) => {
      const bytes = encode(message);
      expect(strict(bytes)).toEqual(decode(bytes));
    }),
  );
});

test('no field of a message that is cut off is shorter than it was', () => {
  fc.assert(
    fc.property(request, fc.nat(), (message, at) => {
      const bytes = encode(message);
      const cut = bytes.subarray(0, at % (bytes.length + 1));
      const result = strict(cut);
      if (result instanceof InvalidRequestError) return;
      const whole = decode(bytes);
      expect([undefined, whole.text]).toContain(result.text);
      expect(result.stop).toEqual(whole.stop.slice(0, result.stop.length));
      expect([null, whole.options]).toContainEqual(result.options);
      expect([null, whole.beamSearch]).toContainEqual(result.beamSearch);
    }),
  );
});

test('any bytes give a message or an InvalidRequestError', () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 64 }), (bytes) => {
      expect(strict(Buffer.from(bytes))).toBeTypeOf('object');
    }),
    { numRuns: 2000 },
  );
});

test.each([
  { hex: '0a01ff', field: 'text' },
  { hex: '0a03eda080', field: 'text' }, // half of a surrogate pair
  { hex: '7a0161' + '7a02c3' + '28', field: 'stop[1]' },
  { hex: '8a01' + '03' + '0a01ff', field: 'options.request_id' },
])('$hex is not UTF-8 in $field', ({ hex, field }) => {
  expect(strict(Buffer.from(hex, 'hex'))).toMatchObject({ field, message: `${field} is not valid UTF-8` });
});

test('texts with replacement characters that the sender wrote are found wherever they stand', () => {
  const field = (number: number, value: string): Buffer => {
    const bytes = Buffer.from(value);
    return Buffer.concat([Buffer.from([number * 8 + 2, bytes.length]), bytes]);
  };
  const stop = 15;
  const message = strict(Buffer.concat([field(stop, '\ufffd1'), field(stop, '\ufffd0'), field(stop, '\ufffd1'), field(1, '\ufffd0')]));
  expect(message).toMatchObject({ text: '\ufffd0', stop: ['\ufffd1', '\ufffd0', '\ufffd1'] });
  const wrong = Buffer.from('7a0261ff', 'hex');
  expect(strict(Buffer.concat([field(1, '\ufffd'), field(stop, '\ufffd'), wrong]))).toMatchObject({ field: 'stop[1]' });
});

test('a message of very many texts takes time by its length, not by the square of it', () => {
  const stop = Array.from({ length: 200_000 }, (_, i) => `\ufffd${i}`); // by the square: minutes
  expect((strict(encode({ stop })) as { stop: string[] }).stop).toEqual(stop);
});
