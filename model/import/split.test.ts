import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { glmTensors, type SplitKind } from '../store/glm-tensors.js';
import { goldenModels, sha256, type GoldenLayout, type GoldenModel } from './fixtures/golden-checkpoints.js';
import { SatCheckpoint } from './sat-checkpoint.js';
import { mergeTensor, shardShape, splitTensor } from './split.js';

const fp16Layouts = goldenModels.flatMap((model) =>
  model.layouts.filter(({ bits }) => bits === null).map((layout) => ({ name: `${model.name} ${layout.name}`, model, layout })),
);

test('there are golden hashes of fp16 layouts for 1, 2 and 4 ranks', () => {
  expect(new Set(fp16Layouts.map(({ layout }) => layout.numRanks))).toEqual(new Set([1, 2, 4]));
});

describe('against the original', () => {
  test.each(fp16Layouts)('splitting tp1 gives every shard of $name', async ({ model, layout }) => {
    const whole = await readShards(model.layout('tp1'), model);
    for (const tensor of glmTensors(model.config)) {
      const shards = splitTensor(tensor.split, whole.get(tensor.name)![0]!, tensor.shape[0], layout.numRanks);
      const shape = shardShape(tensor.split, tensor.shape, layout.numRanks);
      for (const [rank, shard] of shards.entries()) {
        expect({ shape, dtype: 'float16', sha256: sha256(shard) }, `${tensor.name}, rank ${rank}`).toEqual(
          layout.ranks[rank]!.get(tensor.name),
        );
      }
    }
  });

  test.each(fp16Layouts.filter(({ layout }) => layout.dir !== null))(
    'merging $name gives every tensor of tp1',
    async ({ model, layout }) => {
      const shards = await readShards(layout, model);
      for (const tensor of glmTensors(model.config)) {
        const rows = shardShape(tensor.split, tensor.shape, layout.numRanks)![0]!;
        expect(sha256(mergeTensor(tensor.split, shards.get(tensor.name)!, rows)), tensor.name).toBe(
          model.layout('tp1').ranks[0]!.get(tensor.name)!.sha256,
        );
      }
    },
  );
});

const kinds: readonly SplitKind[] = ['copied', 'rows', 'glu-rows', 'columns'];

describe('for any tensor', () => {
  const anyCase = fc
    .record({
      kind: fc.constantFrom(...kinds),
      from: fc.integer({ min: 1, max: 5 }),
      to: fc.integer({ min: 1, max: 5 }),
      rows: fc.integer({ min: 1, max: 4 }),
      columns: fc.integer({ min: 1, max: 4 }),
    })
    .map(({ kind, from, to, rows, columns }) => ({ kind, from, to, rows: 2 * rows * from * to, columns: columns * from * to }))
    .chain(({ rows, columns, ...rest }) =>
      fc.uint8Array({ minLength: rows * columns, maxLength: rows * columns }).map((whole) => ({ ...rest, rows, columns, whole })),
    );

  test('merging what was split gives it back, and the degree in between does not matter', () => {
    fc.assert(
      fc.property(anyCase, ({ kind, from, to, rows, columns, whole }) => {
        const shards = splitTensor(kind, whole, rows, from);
        const merged = mergeTensor(kind, shards, shardShape(kind, [rows, columns], from)![0]!);
        expect([...merged]).toEqual([...whole]);
        expect(splitTensor(kind, merged, rows, to).map((shard) => [...shard])).toEqual(
          splitTensor(kind, whole, rows, to).map((shard) => [...shard]),
        );
      }),
    );
  });

  test('a shard of a shard is a shard: splitting twice is splitting once', () => {
    fc.assert(
      fc.property(anyCase, ({ kind, from, to, rows, whole }) => {
        if (kind === 'copied') return;
        const shardRows = kind === 'columns' ? rows : rows / from;
        const twice = splitTensor(kind, whole, rows, from).flatMap((shard) => splitTensor(kind, shard, shardRows, to));
        expect(twice.map((shard) => [...shard])).toEqual(splitTensor(kind, whole, rows, from * to).map((shard) => [...shard]));
      }),
    );
  });
});

test('the halves of a GLU are divided each by itself', () => {
  expect(splitTensor('glu-rows', Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8), 8, 2).map((shard) => [...shard])).toEqual([
    [1, 2, 5, 6],
    [3, 4, 7, 8],
  ]);
});

test.each([
  { kind: 'rows' as const, shape: [6, 4], numRanks: 4, shard: null },
  { kind: 'glu-rows' as const, shape: [6, 4], numRanks: 2, shard: null },
  { kind: 'glu-rows' as const, shape: [8, 4], numRanks: 2, shard: [4, 4] },
  { kind: 'columns' as const, shape: [6, 4], numRanks: 4, shard: [6, 1] },
  { kind: 'copied' as const, shape: [5], numRanks: 3, shard: [5] },
])('$kind of $shape over $numRanks ranks: $shard', ({ kind, shape, numRanks, shard }) => {
  expect(shardShape(kind, shape, numRanks)).toEqual(shard);
});

async function readShards(layout: GoldenLayout, model: GoldenModel): Promise<Map<string, Buffer[]>> {
  const checkpoint = await SatCheckpoint.open(layout.dir!);
  const shards = new Map<string, Buffer[]>();
  for (const { name } of glmTensors(model.config)) {
    shards.set(name, []);
    for (const file of checkpoint.ranks) shards.get(name)!.push(await file.readTensor(file.tensors.get(name)!));
  }
  await checkpoint.close();
  return shards;
}
