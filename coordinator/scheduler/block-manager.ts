/**
 * Which KV blocks are in use, and by how many sequences. A block that several sequences share must not be written beyond
 * what they have in common: {@link prepareRun} copies it first.
 */
export class BlockManager {
  /** How many sequences hold each block; 0 is free. */
  private readonly references: Uint32Array;
  private readonly freeList: number[];
  private peak = 0;

  constructor(
    readonly totalBlocks: number,
    /** Tokens in a block. */
    readonly blockSize: number,
  ) {
    this.references = new Uint32Array(totalBlocks);
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

  private assertUsed(block: number): void {
    if (!(this.references[block]! > 0)) throw new Error(`KV block ${block} is not in use`);
  }
}
