import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { CheckpointError } from '../../common/errors.js';
import { glmTensors } from '../store/glm-tensors.js';
import { floatToHalf, halfToFloat } from './float16.js';
import { goldenModels, sha256 } from './fixtures/golden-checkpoints.js';
import { packInt4, quantizeRows, type QuantizedBits } from './quantize.js';
import { SatCheckpoint } from './sat-checkpoint.js';
import { splitTensor } from './split.js';

const quantised = goldenModels.flatMap((model) =>
  model.layouts.filter(({ bits }) => bits !== null).map((layout) => ({ name: `${model.name} ${layout.name}`, model, layout })),
);

test('there are golden hashes of INT8 and INT4 for 1, 2 and 4 ranks', () => {
  expect(new Set(quantised.map(({ layout }) => `${layout.numRanks} x ${layout.bits}`))).toEqual(
    new Set(['1 x 8', '1 x 4', '2 x 8', '2 x 4', '4 x 8', '4 x 4']),
  );
});

// The whole tensor is quantised in groups and split afterwards: what the original does the other way round.
test.each(quantised)('quantising tp1 gives every weight and scale of $name', async ({ model, layout }) => {
  const checkpoint = await SatCheckpoint.open(model.layout('tp1').dir!);
  const file = checkpoint.ranks[0]!;
  let compared = 0;
  for (const { name, shape, split, isQuantizable } of glmTensors(model.config)) {
    if (!isQuantizable) continue;
    const [rows, columns] = shape as readonly [number, number];
    const groups = split === 'columns' ? layout.numRanks : 1;
    const { qweight, scales } = quantizeRows(toHalves(await file.readTensor(file.tensors.get(name)!)), columns, {
      groups,
      bits: layout.bits!,
      name,
    });
    const weightShards = splitTensor(split, qweight, rows, layout.numRanks);
    const scaleShards = splitTensor(split, new Uint8Array(scales.buffer), rows, layout.numRanks);
    for (const [rank, golden] of layout.ranks.entries()) {
      expect(sha256(weightShards[rank]!), `${name}, rank ${rank}`).toBe(golden.get(name)!.sha256);
      expect(sha256(scaleShards[rank]!), `${name}_scale, rank ${rank}`).toBe(golden.get(`${name}_scale`)!.sha256);
      compared += 2;
    }
  }
  expect(compared).toBe(model.config.numLayers * 4 * layout.numRanks * 2);
  await checkpoint.close();
});

describe('for any row of halves', () => {
  const finiteHalf = fc.integer({ min: 0, max: 0xffff }).filter((bits) => (bits & 0x7c00) !== 0x7c00);
  const smallHalf = fc.integer({ min: 0, max: 0x83ff }).filter((bits) => (bits & 0x7fff) <= 0x3ff); // subnormal ones, which make subnormal scales
  const rows = fc.array(fc.oneof(finiteHalf, smallHalf), { minLength: 8, maxLength: 8 });

  test.each([{ bits: 8 }, { bits: 4 }] as const)('$bits bits are what the definition says, step by step', ({ bits }) => {
    fc.assert(
      fc.property(fc.oneof(rows, fc.array(smallHalf, { minLength: 8, maxLength: 8 })), (row) => {
        const { qweight, scales } = quantizeRows(Uint16Array.from(row), 8, { groups: 2, bits, name: 'w' });
        const expected = [...defineGroup(row.slice(0, 4), bits), ...defineGroup(row.slice(4), bits)];
        const q = Int8Array.from(expected.flatMap((group) => group.q));
        expect([...scales]).toEqual(expected.map((group) => group.scale));
        expect([...qweight]).toEqual([...(bits === 8 ? new Uint8Array(q.buffer) : packInt4(q))]);
      }),
      { numRuns: 2000 },
    );
  });
});

test.each([
  { name: 'a row of zeros', weights: [0, -0, 0, 0], bits: 8, scale: 0, q: [0, 0, 0, 0] },
  { name: 'the largest quotient', weights: [127, -127, 63.5, 1], bits: 8, scale: 1, q: [127, -127, 64, 1] },
  { name: 'ties to even', weights: [127, 0.5, 1.5, 2.5], bits: 8, scale: 1, q: [127, 0, 2, 2] },
  {
    name: 'a scale that is subnormal and too small',
    weights: [190 * 2 ** -24, -190 * 2 ** -24, 2 ** -24, 0],
    bits: 8,
    scale: 2 ** -24,
    q: [190 - 256, 256 - 190, 1, 0],
  },
  { name: 'a scale that vanishes', weights: [2 ** -24, 0, -(2 ** -24), 0], bits: 8, scale: 0, q: [0, 0, 0, 0] },
  { name: 'four bits', weights: [7, -7, 3.5, -1], bits: 4, scale: 1, q: [7, -7, 4, -1] },
] as const)('$name', ({ weights, bits, scale, q }) => {
  const result = quantizeRows(Uint16Array.from(weights, floatToHalf), 4, { groups: 1, bits, name: 'w' });
  expect(halfToFloat[result.scales[0]!]).toBe(scale);
  const expected = Int8Array.from(q);
  expect([...result.qweight]).toEqual([...(bits === 8 ? new Uint8Array(expected.buffer) : packInt4(expected))]);
});

test('INT4 has the even column in the high nibble', () => {
  expect([...packInt4(Int8Array.of(1, 2, -1, -8))]).toEqual([0x12, 0xf8]);
});

test.each([{ bits: 0x7c00 }, { bits: 0xfc00 }, { bits: 0x7e00 }])('a weight with bits $bits is refused', ({ bits }) => {
  const quantize = () => quantizeRows(Uint16Array.of(0x3c00, 0x3c00, bits, 0x3c00), 2, { groups: 1, bits: 8, name: 'layer.weight' });
  expect(quantize).toThrow(CheckpointError);
  expect(quantize).toThrow('tensor layer.weight holds an infinite or NaN weight in row 1: it cannot be quantised');
});

/** model-spec section 1.3 on one group, a rounding at a time, with rounding by comparison instead of bit operations. */
function defineGroup(halves: readonly number[], bits: QuantizedBits): { scale: number; q: number[] }[] {
  const values = halves.map((half) => halfToFloat[half]!);
  const scale = nearestHalf(Math.fround(Math.max(...values.map(Math.abs)) / (2 ** (bits - 1) - 1)));
  if (scale === 0) return [{ scale: 0, q: values.map(() => 0) }];
  const q = values.map((value) => roundHalfEven(nearestHalf(Math.fround(value / scale))));
  return [{ scale: halvesAscending.indexOf(scale), q }];
}

const halvesAscending = Array.from({ length: 0x7c00 }, (_, bits) => halfToFloat[bits]!);

function nearestHalf(value: number): number {
  const magnitude = Math.abs(value);
  let best = 0;
  let low = 0;
  let high = halvesAscending.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (halvesAscending[middle]! <= magnitude) low = middle;
    else high = middle - 1;
  }
  best = low;
  const next = halvesAscending[low + 1];
  if (next !== undefined) {
    const down = magnitude - halvesAscending[low]!;
    const up = next - magnitude;
    if (up < down || (up === down && low % 2 === 1)) best = low + 1;
  }
  return Math.sign(value) * halvesAscending[best]!;
}

function roundHalfEven(value: number): number {
  const floor = Math.floor(value);
  const rest = value - floor;
  if (rest !== 0.5) return Math.round(value);
  return floor % 2 === 0 ? floor : floor + 1;
}

function toHalves(bytes: Buffer): Uint16Array {
  return new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.length / 2);
}
