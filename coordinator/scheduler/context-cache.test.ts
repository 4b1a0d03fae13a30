import { expect, test } from 'vitest';
import { BlockManager } from './block-manager.js';
import { ContextCache } from './context-cache.js';
import {
  adoptContext,
  appendTokens,
  applyRun,
  createSequence,
  forkSequence,
  prepareRun,
  releaseSequence,
  type SequenceState,
} from './sequence.js';

const BLOCK_SIZE = 4;
let nextId = 1;

function setUp(totalBlocks = 16, maxBlocks = totalBlocks): { blocks: BlockManager; cache: ContextCache } {
  const blocks = new BlockManager(totalBlocks, BLOCK_SIZE);
  return { blocks, cache: new ContextCache(blocks, maxBlocks) };
}

/** A sequence whose first run is computed: a context, and as many tokens behind it. */
function computed(key: string | null, contextTokens: number, blocks: BlockManager, more = 1): SequenceState {
  const sequence = createSequence(nextId++);
  const tokens = Array.from({ length: contextTokens + more }, (_, i) => i);
  appendTokens(sequence, { sequence, tokens, positions: tokens, bidirectionalTokens: contextTokens, want: { kind: 'none' } });
  sequence.contextKey = key;
  applyRun(prepareRun(sequence, blocks), blocks);
  return sequence;
}

function leave(
  sequence: SequenceState,
  { blocks, cache }: { blocks: BlockManager; cache: ContextCache },
  siblings: SequenceState[] = [],
): void {
  releaseSequence(sequence, blocks, cache.leave(sequence, siblings));
}

test('finds the context of a sequence that is there, without what comes behind it', () => {
  const { blocks, cache } = setUp();
  const sequence = computed('k', 9, blocks, 5);
  expect(cache.find('k')).toBeNull();
  cache.add(sequence);
  expect(cache.find('k')).toEqual({ tokens: 9, blocks: sequence.blocks });
  expect(cache.find('l')).toBeNull();
});

test('keeps the blocks of a context whose sequence leaves, and no more of them', () => {
  const { blocks, cache } = setUp();
  const sequence = computed('k', 9, blocks, 8); // 5 blocks, 3 of the context
  cache.add(sequence);
  const kept = sequence.blocks.slice(0, 3);
  leave(sequence, { blocks, cache });
  expect(cache.find('k')).toEqual({ tokens: 9, blocks: kept });
  expect([blocks.usedBlocks, blocks.cachedBlocks, blocks.freeBlocks]).toEqual([0, 3, 13]);
});

test('a sibling that goes on from the same context takes it over', () => {
  const { blocks, cache } = setUp();
  const parent = computed('k', 9, blocks);
  cache.add(parent);
  const fork = forkSequence(nextId++, parent, blocks);
  const lost = forkSequence(nextId++, parent, blocks);
  lost.cachedTokens = 4; // its context is not computed at the moment
  leave(parent, { blocks, cache }, [parent, lost, fork]);
  expect(cache.find('k')!.blocks).toBe(fork.blocks);
  expect(blocks.cachedBlocks).toBe(0);
  leave(fork, { blocks, cache }, [fork, lost]);
  expect(cache.find('k')).not.toBeNull();
  leave(lost, { blocks, cache }, [lost]);
  expect([blocks.usedBlocks, blocks.cachedBlocks]).toEqual([0, 3]);
});

test('a context is known once: the second sequence that has computed it leaves nothing behind', () => {
  const { blocks, cache } = setUp();
  const [first, second] = [computed('k', 8, blocks), computed('k', 8, blocks)];
  cache.add(first);
  cache.add(second);
  leave(second, { blocks, cache });
  expect(blocks.cachedBlocks).toBe(0);
  expect(cache.find('k')!.blocks).toBe(first.blocks);
  leave(first, { blocks, cache });
  const third = computed('k', 8, blocks);
  cache.add(third); // it is kept already
  leave(third, { blocks, cache });
  expect([blocks.usedBlocks, blocks.cachedBlocks]).toEqual([0, 2]);
});

test('sequences without a key are none of its business', () => {
  const { blocks, cache } = setUp();
  const sequence = computed(null, 9, blocks);
  cache.add(sequence);
  leave(sequence, { blocks, cache });
  expect(blocks.freeBlocks).toBe(16);
});

test('beyond its bound the context that was not used for the longest time goes', () => {
  const { blocks, cache } = setUp(32, 6);
  for (const key of ['a', 'b', 'c']) {
    const sequence = computed(key, 8, blocks);
    cache.add(sequence);
    leave(sequence, { blocks, cache });
  }
  cache.used('a', cache.find('a')!);
  const sequence = computed('d', 8, blocks);
  cache.add(sequence);
  leave(sequence, { blocks, cache });
  expect(['a', 'b', 'c', 'd'].map((key) => cache.find(key) !== null)).toEqual([true, false, true, true]);
  expect(blocks.cachedBlocks).toBe(6);
  expect(cache.stats).toEqual({ contexts: 3, maxBlocks: 6, hits: 1, misses: 0, hitTokens: 8, evictions: 1 });

  const large = computed('large', 28, blocks); // more than the bound: it is not kept, and nobody has to go for it
  cache.add(large);
  leave(large, { blocks, cache });
  expect([cache.find('large'), blocks.cachedBlocks]).toEqual([null, 6]);
});

test('contexts make room for whoever needs blocks, the oldest first', () => {
  const { blocks, cache } = setUp(6);
  for (const key of ['a', 'b']) {
    const sequence = computed(key, 8, blocks);
    cache.add(sequence);
    leave(sequence, { blocks, cache });
  }
  expect(blocks.availableBlocks).toBe(6);
  computed(null, 11, blocks);
  expect([cache.find('a'), cache.find('b') !== null]).toEqual([null, true]);
  computed(null, 11, blocks);
  expect([cache.find('b'), blocks.availableBlocks]).toEqual([null, 0]);
});

test('a context that somebody has started from can go: its blocks stay with him', () => {
  const { blocks, cache } = setUp(6);
  const sequence = computed('k', 8, blocks);
  cache.add(sequence);
  leave(sequence, { blocks, cache });
  const next = createSequence(nextId++);
  adoptContext(next, cache.find('k')!, blocks);
  expect([blocks.usedBlocks, blocks.cachedBlocks, blocks.availableBlocks]).toEqual([2, 0, 4]);
  for (let i = 0; i < 4; i++) blocks.allocate();
  expect(() => blocks.allocate()).toThrow('no free KV block');
  expect(cache.find('k')).toBeNull();
  expect([blocks.holders(next.blocks[0]!), blocks.usedBlocks]).toEqual([1, 6]);
});

test('after a loss nothing is found, and nothing is held', () => {
  const { blocks, cache } = setUp();
  const [there, gone] = [computed('there', 8, blocks), computed('gone', 8, blocks)];
  cache.add(there);
  cache.add(gone);
  leave(gone, { blocks, cache });
  cache.clear();
  expect([cache.find('there'), cache.find('gone')]).toEqual([null, null]);
  expect([blocks.usedBlocks, blocks.cachedBlocks]).toEqual([3, 0]);
  leave(there, { blocks, cache }); // what it had is not worth keeping
  expect(blocks.freeBlocks).toBe(16);
});
