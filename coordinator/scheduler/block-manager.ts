/**
 * Which KV blocks are in use, and by how many sequences. A block that several sequences share must not be written beyond
 * what they have in common: {@link prepareRun} copies it first. The context cache holds blocks too, but those that nobody
 * else holds are free for whoever needs them.
 */
export class BlockManager {
  /** How many sequences hold each block, the context cache included; 0 is free. */
  private readonly references: Uint32Array;
  private readonly freeList: number[];
  /** 1 where the workers' caches hold what the block is for; 0 after the caches were lost, until it is computed again. */
  private readonly filled: Uint8Array;
  /** 1 where the context cache is one of the holders. */
  private readonly cached: Uint8Array;
  /** For {@link countHeld}, 0 in between. */
  private readonly tally: Uint32Array;
  /** Blocks that the context cache alone holds. */
  private cachedOnly = 0;
  private peak = 0;
  private evict: () => boolean = () => false;

  constructor(
    readonly totalBlocks: number,
    /** Tokens in a block. */
    readonly blockSize: number,
  ) {
    this.references = new Uint32Array(totalBlocks);
    this.filled = new Uint8Array(totalBlocks);
    this.cached = new Uint8Array(totalBlocks);
    this.tally = new Uint32Array(totalBlocks);
    this.freeList = Array.from({ length: totalBlocks }, (_, i) => totalBlocks - 1 - i);
  }

  /** @param evict gives up a cached context, false if there is none */
  onShortage(evict: () => boolean): void {
    this.evict = evict;
  }

  /** What {@link allocate} can give. */
  get availableBlocks(): number {
    return this.freeList.length + this.cachedOnly;
  }

  get freeBlocks(): number {
    return this.freeList.length;
  }

  /** Held by the context cache alone. */
  get cachedBlocks(): number {
    return this.cachedOnly;
  }

  /** Held by sequences. */
  get usedBlocks(): number {
    return this.totalBlocks - this.availableBlocks;
  }

  get peakUsedBlocks(): number {
    return this.peak;
  }

  /** The scheduler plans with {@link availableBlocks}, so running out is a defect, not a condition. */
  allocate(): number {
    while (this.freeList.length === 0) {
      if (!this.evict()) throw new Error(`no free KV block of ${this.totalBlocks}: a step was planned with more than there are`);
    }
    const block = this.freeList.pop()!;
    this.references[block] = 1;
    this.filled[block] = 0;
    this.peak = Math.max(this.peak, this.usedBlocks);
    return block;
  }

  share(block: number): void {
    this.assertUsed(block);
    if (this.cached[block] === 1 && this.references[block] === 1) this.cachedOnly -= 1;
    this.references[block]! += 1;
    this.peak = Math.max(this.peak, this.usedBlocks);
  }

  isShared(block: number): boolean {
    return this.references[block]! > 1;
  }

  /** How many hold it. */
  holders(block: number): number {
    return this.references[block]!;
  }

  /** {@link allocate} could give it to somebody else: nobody but the context cache holds it. */
  isCachedOnly(block: number): boolean {
    return this.cached[block] === 1 && this.references[block] === 1;
  }

  /** Different blocks in tables of one request, and of them those that no other request holds. Negative ones are placeholders. */
  countHeld(tables: Iterable<readonly number[]>): { readonly blocks: number; readonly ownBlocks: number } {
    const { tally } = this;
    const seen: number[] = [];
    for (const table of tables) {
      for (const block of table) if (block >= 0 && tally[block]!++ === 0) seen.push(block);
    }
    let ownBlocks = 0;
    for (const block of seen) {
      if (this.references[block]! - this.cached[block]! === tally[block]!) ownBlocks += 1;
      tally[block] = 0;
    }
    return { blocks: seen.length, ownBlocks };
  }

  release(block: number): void {
    this.assertUsed(block);
    const left = --this.references[block]!;
    if (left === 0) this.freeList.push(block);
    else if (left === 1 && this.cached[block] === 1) this.cachedOnly += 1;
  }

  /** The context cache takes a sequence's hold over: the sequence must not release the block any more. */
  giveToCache(block: number): void {
    this.assertUsed(block);
    if (this.cached[block] === 1) throw new Error(`KV block ${block} is in the context cache already`);
    this.cached[block] = 1;
    if (this.references[block] === 1) this.cachedOnly += 1;
  }

  /** The context cache gives its hold up. */
  takeFromCache(block: number): void {
    if (this.references[block] === 1) this.cachedOnly -= 1;
    this.cached[block] = 0;
    this.release(block);
  }

  isCached(block: number): boolean {
    return this.cached[block] === 1;
  }

  markFilled(block: number): void {
    this.filled[block] = 1;
  }

  isFilled(block: number): boolean {
    return this.filled[block] === 1;
  }

  /** The workers' caches are gone; who holds which block stays as it is. */
  loseContents(): void {
    this.filled.fill(0);
  }

  private assertUsed(block: number): void {
    if (!(this.references[block]! > 0)) throw new Error(`KV block ${block} is not in use`);
  }
}
