/**
 * Which KV blocks are in use, and by how many sequences. A block that several sequences share must not be written beyond
 * what they have in common: {@link prepareRun} copies it first.
 */
export class BlockManager {
  /** How many sequences hold each block; 0 is free. */
  private readonly references: Uint32Array;
  private readonly freeList: number[];
  /** 1 where the workers' caches hold what the block is for; 0 after the caches were lost, until it is computed again. */
  private readonly filled: Uint8Array;
  private peak = 0;

  constructor(
    readonly totalBlocks: number,
    /** Tokens in a block. */
    readonly blockSize: number,
  ) {
    this.references = new Uint32Array(totalBlocks);
    this.filled = new Uint8Array(totalBlocks);
    this.freeList = Array.from({ length: totalBlocks }, (_, i) => totalBlocks - 1 - i);
  }

  get freeBlocks(): number {
    return this.freeList.length;
  }

  get usedBlocks(): number {
    return this.totalBlocks - this.freeList.length;
  }

  get peakUsedBlocks(): number {
    return this.peak;
  }

  /** Admission reserves what a request can come to need, so running out is a defect, not a condition. */
  allocate(): number {
    const block = this.freeList.pop();
    if (block === undefined) throw new Error(`no free KV block of ${this.totalBlocks}: a request holds more than it reserved`);
    this.references[block] = 1;
    this.filled[block] = 0;
    this.peak = Math.max(this.peak, this.usedBlocks);
    return block;
  }

  share(block: number): void {
    this.assertUsed(block);
    this.references[block]! += 1;
  }

  isShared(block: number): boolean {
    return this.references[block]! > 1;
  }

  release(block: number): void {
    this.assertUsed(block);
    if (--this.references[block]! === 0) this.freeList.push(block);
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
