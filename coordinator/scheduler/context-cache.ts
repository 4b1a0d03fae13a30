import type { BlockManager } from './block-manager.js';
import type { ContextSource, SequenceState } from './sequence.js';

export interface ContextCacheStats {
  readonly contexts: number;
  readonly maxBlocks: number;
  readonly hits: number;
  readonly misses: number;
  readonly hitTokens: number;
  readonly evictions: number;
}

/**
 * Computed contexts by key: those of sequences that are there (`live`), and, up to `maxBlocks` KV blocks, those that their
 * sequences left behind. The least recently used one goes first, and any of them as soon as somebody needs the blocks.
 */
export class ContextCache {
  private readonly live = new Map<string, SequenceState>();
  /** In the order of their last use. */
  private readonly kept = new Map<string, ContextSource>();
  private keptBlocks = 0;
  private readonly counts = { hits: 0, misses: 0, hitTokens: 0, evictions: 0 };

  constructor(
    private readonly blocks: BlockManager,
    private readonly maxBlocks: number,
  ) {
    blocks.onShortage(() => this.evictOldest());
  }

  get stats(): ContextCacheStats {
    return { contexts: this.kept.size, maxBlocks: this.maxBlocks, ...this.counts };
  }

  find(key: string): ContextSource | null {
    const live = this.live.get(key);
    return live ? { tokens: live.contextTokens, blocks: live.blocks } : (this.kept.get(key) ?? null);
  }

  /** A sequence starts from the source. */
  used(key: string, source: ContextSource): void {
    this.counts.hits += 1;
    this.counts.hitTokens += source.tokens;
    if (this.kept.delete(key)) this.kept.set(key, source);
  }

  missed(): void {
    this.counts.misses += 1;
  }

  /** The sequence's context is computed. */
  add(sequence: SequenceState): void {
    const key = sequence.contextKey;
    if (key !== null && !this.live.has(key) && !this.kept.has(key)) this.live.set(key, sequence);
  }

  /**
   * The sequence is about to give up its blocks: a sibling that goes on from the same context, or the cache, keeps its context.
   *
   * @returns how many of its first blocks the cache has taken over: they are not the sequence's any more
   */
  leave(sequence: SequenceState, siblings: Iterable<SequenceState>): number {
    const key = sequence.contextKey;
    if (key === null || this.live.get(key) !== sequence) return 0;
    this.live.delete(key);
    for (const sibling of siblings) {
      if (sibling !== sequence && sibling.contextKey === key && sibling.cachedTokens >= sibling.contextTokens) {
        this.live.set(key, sibling);
        return 0;
      }
    }
    const count = Math.ceil(sequence.contextTokens / this.blocks.blockSize);
    const kept = sequence.blocks.slice(0, count);
    if (count > this.maxBlocks || kept.some((block) => this.blocks.isCached(block))) return 0;
    while (this.keptBlocks + count > this.maxBlocks) this.evictOldest();
    for (const block of kept) this.blocks.giveToCache(block);
    this.kept.set(key, { tokens: sequence.contextTokens, blocks: kept });
    this.keptBlocks += count;
    return count;
  }

  /** The workers' caches are gone. */
  clear(): void {
    this.live.clear();
    while (this.kept.size > 0) this.evictOldest();
  }

  private evictOldest(): boolean {
    const oldest = this.kept.entries().next();
    if (oldest.done) return false;
    const [key, { blocks }] = oldest.value;
    this.kept.delete(key);
    this.keptBlocks -= blocks.length;
    this.counts.evictions += 1;
    for (const block of blocks) this.blocks.takeFromCache(block);
    return true;
  }
}
