import fc from 'fast-check';
import { expect, test } from 'vitest';
import { BlockManager } from './block-manager.js';
import { ContextCache } from './context-cache.js';
import {
  adoptContext,
  appendTokens,
  applyRun,
  createSequence,
  evictSequences,
  forkSequence,
  loseCache,
  missingBlocks,
  prepareRun,
  recomputedBlocks,
  refreshCache,
  releaseSequence,
  restoreSequences,
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

/** A new sequence of so many tokens, all computed. */
function computed(count: number, blocks: BlockManager): SequenceState {
  const sequence = createSequence(1);
  appendTokens(sequence, extendBy(count, sequence));
  applyRun(prepareRun(sequence, blocks), blocks);
  return sequence;
}

const nothingTaken = (): number => 0;
const nothingFound = (): null => null;

test('who starts from a context of whole blocks shares them all', () => {
  const blocks = new BlockManager(8, 4);
  const owner = computed(11, blocks);
  const adopter = createSequence(2);
  expect(adoptContext(adopter, { tokens: 8, blocks: owner.blocks }, blocks)).toEqual([]);
  expect(adopter).toMatchObject({ blocks: owner.blocks.slice(0, 2), cachedTokens: 8, settledTokens: 8 });
  expect([blocks.usedBlocks, blocks.holders(owner.blocks[0]!), blocks.holders(owner.blocks[2]!)]).toEqual([3, 2, 1]);
});

test('of a context that ends within a block he gets a copy of that one, which both then write', () => {
  const blocks = new BlockManager(8, 4);
  const owner = computed(11, blocks);
  const adopter = createSequence(2);
  const copies = adoptContext(adopter, { tokens: 10, blocks: owner.blocks }, blocks);
  expect(copies).toEqual([owner.blocks[2], adopter.blocks[2]]);
  expect(adopter.blocks.slice(0, 2)).toEqual(owner.blocks.slice(0, 2));
  expect(adopter.blocks[2]).not.toBe(owner.blocks[2]);
  expect([blocks.usedBlocks, adopter.cachedTokens]).toEqual([4, 10]);
  appendTokens(adopter, extendBy(11, adopter)); // its own first run: one more token than the context
  expect(prepareRun(adopter, blocks)).toMatchObject({ firstToken: 10, blockCopies: [] });
});

test('where no other block is left he takes the last one of the cached context itself', () => {
  const blocks = new BlockManager(3, 4);
  const cache = new ContextCache(blocks, 3);
  const owner = computed(10, blocks);
  Object.assign(owner, { contextKey: 'k', contextTokens: 10 });
  cache.add(owner);
  releaseSequence(owner, blocks, cache.leave(owner, []));
  expect([blocks.freeBlocks, blocks.cachedBlocks]).toEqual([0, 3]);
  const source = cache.find('k')!;
  const adopter = createSequence(2);
  expect(adoptContext(adopter, source, blocks)).toEqual([]);
  expect(adopter.blocks).toEqual(source.blocks);
  expect([blocks.usedBlocks, blocks.availableBlocks, cache.find('k')]).toEqual([3, 0, null]);
});

test('evicted and restored, forks share what they shared, in no more blocks', () => {
  const blocks = new BlockManager(16, 4);
  const parent = computed(10, blocks);
  const forks = [forkSequence(2, parent, blocks), forkSequence(3, parent, blocks)];
  for (const fork of forks) appendTokens(fork, extendBy(3, fork));
  applyRun(prepareRun(forks[0]!, blocks), blocks);
  const all = [parent, ...forks];
  const before = blocks.usedBlocks;
  const shape = (): number[][] => {
    const names = [...new Set(all.flatMap((sequence) => sequence.blocks))];
    return all.map((sequence) => sequence.blocks.map((block) => names.indexOf(block)));
  };
  const shapeBefore = shape();

  evictSequences(all, blocks, nothingTaken);
  expect(blocks.freeBlocks).toBe(16);
  expect(all.map(({ cachedTokens, settledTokens }) => [cachedTokens, settledTokens])).toEqual([
    [0, 10],
    [0, 13],
    [0, 10],
  ]);
  expect(missingBlocks(all)).toBe(before);
  blocks.allocate(); // others get other blocks meanwhile

  restoreSequences(all, blocks, nothingFound);
  expect(shape()).toEqual(shapeBefore);
  expect(blocks.usedBlocks).toBe(before + 1);
  // One computes the shared blocks, the others start behind them.
  const run = prepareRun(forks[0]!, blocks);
  expect(run.firstToken).toBe(0);
  applyRun(run, blocks);
  refreshCache(parent, blocks);
  expect(parent.cachedTokens).toBe(8);
  for (const sequence of all) releaseSequence(sequence, blocks);
  expect(blocks.usedBlocks).toBe(1);
});

test('what the context cache has taken over is not released again', () => {
  const blocks = new BlockManager(16, 4);
  const sequence = computed(10, blocks);
  for (const block of sequence.blocks.slice(0, 2)) blocks.giveToCache(block);
  evictSequences([sequence], blocks, () => 2);
  expect([blocks.usedBlocks, blocks.cachedBlocks, blocks.freeBlocks]).toEqual([0, 2, 14]);
});

test('restored sequences start from a context that is still computed', () => {
  const blocks = new BlockManager(16, 4);
  const cache = new ContextCache(blocks, 16);
  const owner = computed(10, blocks);
  Object.assign(owner, { contextKey: 'k', contextTokens: 9 });
  cache.add(owner);
  const fork = forkSequence(2, owner, blocks);
  appendTokens(fork, extendBy(5, fork));
  applyRun(prepareRun(fork, blocks), blocks);
  const all = [owner, fork];
  evictSequences(all, blocks, (sequence) => cache.leave(sequence, all));
  const kept = cache.find('k')!.blocks;

  const { usedBlocks } = blocks;
  restoreSequences(all, blocks, (key) => cache.find(key));
  expect(usedBlocks).toBe(0);
  for (const sequence of all) {
    expect(sequence.blocks.slice(0, 2)).toEqual(kept.slice(0, 2)); // whole blocks: the third has tokens of its owner
    expect(sequence.blocks[2]).not.toBe(kept[2]);
    refreshCache(sequence, blocks);
    expect(sequence.cachedTokens).toBe(8);
  }
});

test('a sequence of which nothing is computed keeps no blocks when it loses them', () => {
  const blocks = new BlockManager(16, 4);
  const begin = (id: number): SequenceState => {
    const sequence = createSequence(id);
    appendTokens(sequence, extendBy(10, sequence));
    prepareRun(sequence, blocks); // and the step does not come to its end
    return sequence;
  };
  const [lost, evicted] = [begin(1), begin(2)];
  expect(blocks.usedBlocks).toBe(6);
  loseCache(lost, blocks);
  expect([lost.blocks, blocks.usedBlocks]).toEqual([[], 3]);
  evictSequences([evicted], blocks, nothingTaken);
  expect([evicted.blocks, blocks.usedBlocks, missingBlocks([evicted])]).toEqual([[], 0, 0]);
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
