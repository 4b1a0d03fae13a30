import fc from 'fast-check';
import { expect, test } from 'vitest';
import { BlockManager } from './block-manager.js';

test('hands out every block once, and those that come back again', () => {
  const blocks = new BlockManager(4, 16);
  const all = [0, 1, 2, 3].map(() => blocks.allocate());
  expect(all.sort()).toEqual([0, 1, 2, 3]);
  expect(() => blocks.allocate()).toThrow('no free KV block of 4');
  blocks.release(2);
  expect(blocks.allocate()).toBe(2);
  expect(blocks.peakUsedBlocks).toBe(4);
});

test('a shared block is free when its last holder has released it', () => {
  const blocks = new BlockManager(2, 16);
  const block = blocks.allocate();
  blocks.share(block);
  expect([blocks.holders(block), blocks.isShared(block)]).toEqual([2, true]);
  blocks.release(block);
  expect([blocks.holders(block), blocks.isShared(block), blocks.freeBlocks]).toEqual([1, false, 1]);
  blocks.release(block);
  expect(blocks.freeBlocks).toBe(2);
  expect(() => blocks.release(block)).toThrow(`KV block ${block} is not in use`);
  expect(() => blocks.share(block)).toThrow(`KV block ${block} is not in use`);
});

test('a block that the context cache alone holds counts as available, not as used', () => {
  const blocks = new BlockManager(3, 16);
  const block = blocks.allocate();
  blocks.giveToCache(block);
  expect([blocks.freeBlocks, blocks.cachedBlocks, blocks.usedBlocks, blocks.availableBlocks]).toEqual([2, 1, 0, 3]);
  expect([blocks.isCached(block), blocks.isCachedOnly(block)]).toEqual([true, true]);
  expect(() => blocks.giveToCache(block)).toThrow(`KV block ${block} is in the context cache already`);

  blocks.share(block);
  expect([blocks.freeBlocks, blocks.cachedBlocks, blocks.usedBlocks]).toEqual([2, 0, 1]);
  expect([blocks.isCached(block), blocks.isCachedOnly(block)]).toEqual([true, false]);

  blocks.takeFromCache(block);
  expect([blocks.freeBlocks, blocks.cachedBlocks, blocks.usedBlocks]).toEqual([2, 0, 1]);
  blocks.release(block);
  expect(blocks.freeBlocks).toBe(3);
});

test('the context cache gives way when nothing else is free, one context at a time', () => {
  const blocks = new BlockManager(3, 16);
  const cached = [blocks.allocate(), blocks.allocate()];
  for (const block of cached) blocks.giveToCache(block);
  blocks.onShortage(() => {
    const block = cached.shift();
    if (block !== undefined) blocks.takeFromCache(block);
    return block !== undefined;
  });
  blocks.allocate();
  expect(cached).toHaveLength(2);
  blocks.allocate();
  expect(cached).toHaveLength(1);
  blocks.allocate();
  expect(() => blocks.allocate()).toThrow('no free KV block of 3');
});

test('a new block is empty, and so are all after a loss', () => {
  const blocks = new BlockManager(2, 16);
  const block = blocks.allocate();
  blocks.markFilled(block);
  expect(blocks.isFilled(block)).toBe(true);
  blocks.loseContents();
  expect(blocks.isFilled(block)).toBe(false);
  blocks.markFilled(block);
  blocks.release(block);
  expect(blocks.allocate()).toBe(block);
  expect(blocks.isFilled(block)).toBe(false);
});

test('counts the blocks of a request once, and those that preempting it would give', () => {
  const blocks = new BlockManager(8, 16);
  const [a, b, c, d] = [0, 1, 2, 3].map(() => blocks.allocate()) as [number, number, number, number];
  blocks.share(a); // by its other fork
  blocks.share(b); // by another request
  blocks.giveToCache(d); // and nobody else
  blocks.share(d);
  expect(
    blocks.countHeld([
      [a, b, c],
      [a, d, -1],
    ]),
  ).toEqual({ blocks: 4, ownBlocks: 3 });
  expect(
    blocks.countHeld([
      [a, b, c],
      [a, d, -1],
    ]),
  ).toEqual({ blocks: 4, ownBlocks: 3 }); // nothing is left over from counting
  expect(blocks.countHeld([[a]])).toEqual({ blocks: 1, ownBlocks: 0 });
  expect(blocks.countHeld([])).toEqual({ blocks: 0, ownBlocks: 0 });
});

test('whatever is done, free, cached and used blocks make up the total', () => {
  const operation = fc.record({ kind: fc.constantFrom('allocate', 'share', 'release', 'give', 'take'), which: fc.nat() });
  fc.assert(
    fc.property(fc.array(operation, { maxLength: 100 }), (operations) => {
      const blocks = new BlockManager(6, 16);
      const held: number[] = [];
      const cached: number[] = [];
      const evict = (): boolean => {
        const block = cached.shift();
        if (block !== undefined) blocks.takeFromCache(block);
        return block !== undefined;
      };
      blocks.onShortage(evict);
      for (const { kind, which } of operations) {
        const index = which % Math.max(1, held.length);
        const block = held[index];
        if (kind === 'allocate' && blocks.availableBlocks > 0) held.push(blocks.allocate());
        else if (kind === 'take') evict();
        else if (block === undefined) continue;
        else if (kind === 'share') {
          blocks.share(block);
          held.push(block);
        } else if (kind === 'release') {
          blocks.release(block);
          held.splice(index, 1);
        } else if (kind === 'give' && !blocks.isCached(block)) {
          blocks.giveToCache(block);
          cached.push(block);
          held.splice(index, 1);
        }
        const onlyCached = cached.filter((each) => !held.includes(each));
        expect(blocks.usedBlocks).toBe(new Set(held).size);
        expect(blocks.cachedBlocks).toBe(onlyCached.length);
        expect(blocks.freeBlocks).toBe(6 - new Set([...held, ...cached]).size);
        for (const each of cached) expect(blocks.isCachedOnly(each)).toBe(!held.includes(each));
      }
    }),
  );
});
