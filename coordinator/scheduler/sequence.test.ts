import fc from 'fast-check';
import { expect, test } from 'vitest';
import { BlockManager } from './block-manager.js';
import {
  appendTokens,
  applyRun,
  createSequence,
  forkSequence,
  loseCache,
  prepareRun,
  recomputedBlocks,
  refreshCache,
  releaseSequence,
  type SequenceState,
} from './sequence.js';

const extendBy = (count: number, sequence: SequenceState) => ({
  sequence,
  tokens: Array.from({ length: count }, (_, i) => i),
  positions: Array.from({ length: count }, (_, i) => i),
  bidirectionalTokens: 0,
  want: { kind: 'none' as const },
});

test('a fork copies the last block only when one of the two writes into it', () => {
  const blocks = new BlockManager(8, 4);
  const parent = createSequence(1);
  appendTokens(parent, extendBy(6, parent));
  applyRun(prepareRun(parent, blocks), blocks);
  expect(blocks.usedBlocks).toBe(2);

  const child = forkSequence(2, parent, blocks);
  expect(blocks.usedBlocks).toBe(2);
  const [full, partial] = parent.blocks;

  appendTokens(child, extendBy(1, child));
  const run = prepareRun(child, blocks);
  expect(run.blockCopies).toEqual([partial, child.blocks[1]]);
  expect(child.blocks[0]).toBe(full);
  applyRun(run, blocks);

  appendTokens(parent, extendBy(1, parent));
  expect(prepareRun(parent, blocks).blockCopies).toEqual([]); // the only holder by now
});

test('a fork at a block border copies nothing', () => {
  const blocks = new BlockManager(8, 4);
  const parent = createSequence(1);
  appendTokens(parent, extendBy(4, parent));
  applyRun(prepareRun(parent, blocks), blocks);
  const child = forkSequence(2, parent, blocks);
  appendTokens(child, extendBy(1, child));
  expect(prepareRun(child, blocks).blockCopies).toEqual([]);
});

test('after a lost cache a fork computes only what its sibling has not computed in their shared blocks', () => {
  const blocks = new BlockManager(8, 4);
  const parent = createSequence(1);
  appendTokens(parent, extendBy(6, parent));
  applyRun(prepareRun(parent, blocks), blocks);
  const child = forkSequence(2, parent, blocks);
  appendTokens(child, extendBy(1, child));
  applyRun(prepareRun(child, blocks), blocks);

  blocks.loseContents();
  for (const sequence of [parent, child]) {
    loseCache(sequence, blocks);
    refreshCache(sequence, blocks);
    appendTokens(sequence, extendBy(1, sequence));
  }
  expect(recomputedBlocks(parent, blocks)).toEqual(parent.blocks);
  expect(recomputedBlocks(child, blocks)).toContain(parent.blocks[0]); // not in the same step
  const run = prepareRun(parent, blocks);
  expect(run).toMatchObject({ firstToken: 0, blockCopies: [] });
  applyRun(run, blocks);

  refreshCache(child, blocks);
  expect(child.cachedTokens).toBe(4);
  expect(recomputedBlocks(child, blocks)).toEqual([child.blocks[1]]);
  expect(prepareRun(child, blocks)).toMatchObject({ firstToken: 4, blockCopies: [] });
});

test('running out of blocks names the defect', () => {
  const blocks = new BlockManager(1, 4);
  const sequence = createSequence(1);
  appendTokens(sequence, extendBy(5, sequence));
  expect(() => prepareRun(sequence, blocks)).toThrow('no free KV block of 1');
});

test('whatever is done, used and free blocks make up the total, and released sequences hold none', () => {
  const operation = fc.oneof(
    { arbitrary: fc.record({ kind: fc.constant('extend' as const), which: fc.nat(), count: fc.integer({ min: 1, max: 9 }) }), weight: 4 },
    {
      arbitrary: fc.record({
        kind: fc.constantFrom('fork' as const, 'release' as const, 'lose' as const),
        which: fc.nat(),
        count: fc.constant(0),
      }),
      weight: 3,
    },
  );
  fc.assert(
    fc.property(fc.array(operation, { maxLength: 60 }), (operations) => {
      const blocks = new BlockManager(4096, 4);
      const sequences: SequenceState[] = [createSequence(0)];
      let nextId = 1;
      for (const { kind, which, count } of operations) {
        if (sequences.length === 0) sequences.push(createSequence(nextId++));
        const index = which % sequences.length;
        const sequence = sequences[index]!;
        if (kind === 'extend') {
          appendTokens(sequence, extendBy(count, sequence));
          applyRun(prepareRun(sequence, blocks), blocks);
        } else if (kind === 'fork') sequences.push(forkSequence(nextId++, sequence, blocks));
        else if (kind === 'lose') {
          blocks.loseContents();
          for (const each of sequences) loseCache(each, blocks);
        } else {
          releaseSequence(sequence, blocks);
          sequences.splice(index, 1);
        }
        expect(blocks.freeBlocks + blocks.usedBlocks).toBe(4096);
        expect(blocks.usedBlocks).toBe(new Set(sequences.flatMap((each) => each.blocks)).size);
      }
      for (const sequence of sequences) releaseSequence(sequence, blocks);
      expect(blocks.usedBlocks).toBe(0);
    }),
  );
});
