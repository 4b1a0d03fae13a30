import type { ExtendOp, Sequence } from '../generation/strategy.js';
import type { BlockManager } from './block-manager.js';

/**
 * The state of one sequence: its whole history, and how much of it the workers' KV caches hold. A run is always "what is
 * not cached yet", so decoding, prefill and recomputing after the caches were lost are one and the same Extend.
 */
export interface SequenceState extends Sequence {
  readonly tokens: number[];
  readonly positions: number[];
  /** The first tokens that see each other. */
  bidirectionalTokens: number;
  /** KV blocks in order, `blockSize` tokens each. */
  readonly blocks: number[];
  /** The first tokens whose K and V are in the workers' caches now. */
  cachedTokens: number;
  /** The first tokens that were computed once. Their blocks, perhaps shared with forks, never change, but may have to be computed again. */
  settledTokens: number;
}

/** One Extend on its way to the workers. */
export interface Run {
  readonly sequence: SequenceState;
  readonly firstToken: number;
  readonly blockCopies: readonly number[];
}

export function createSequence(id: number): SequenceState {
  const tokens: number[] = [];
  return {
    id,
    tokens,
    positions: [],
    bidirectionalTokens: 0,
    blocks: [],
    cachedTokens: 0,
    settledTokens: 0,
    get length() {
      return tokens.length;
    },
  };
}

/** Adds the tokens of an Extend to the history; nothing runs yet. */
export function appendTokens(sequence: SequenceState, op: ExtendOp): void {
  if (op.tokens.length === 0 || op.tokens.length !== op.positions.length) {
    throw new Error(`an Extend of ${op.tokens.length} tokens with ${op.positions.length} positions`);
  }
  if (op.bidirectionalTokens > 0) {
    if (sequence.tokens.length > 0) throw new Error('a bidirectional run behind other tokens: they could not see it');
    sequence.bidirectionalTokens = op.bidirectionalTokens;
  }
  for (let i = 0; i < op.tokens.length; i++) {
    sequence.tokens.push(op.tokens[i]!);
    sequence.positions.push(op.positions[i]!);
  }
}

/** A sequence with the same history that shares the parent's blocks. */
export function forkSequence(id: number, parent: SequenceState, blocks: BlockManager): SequenceState {
  if (parent.settledTokens !== parent.length) throw new Error('fork of a sequence with an Extend under way');
  const child = createSequence(id);
  child.tokens.push(...parent.tokens);
  child.positions.push(...parent.positions);
  child.blocks.push(...parent.blocks);
  for (const block of parent.blocks) blocks.share(block);
  child.bidirectionalTokens = parent.bidirectionalTokens;
  child.cachedTokens = parent.cachedTokens;
  child.settledTokens = parent.settledTokens;
  return child;
}

export function releaseSequence(sequence: SequenceState, blocks: BlockManager): void {
  for (const block of sequence.blocks) blocks.release(block);
  sequence.blocks.length = 0;
  sequence.cachedTokens = 0;
  sequence.settledTokens = 0;
}

/**
 * Gets the blocks for everything that is not cached. A shared block that is about to receive new tokens is replaced by a
 * copy; settled tokens may be computed again in shared blocks, because they come out with the same bits.
 */
export function prepareRun(sequence: SequenceState, blocks: BlockManager): Run {
  const { blockSize } = blocks;
  const firstToken = sequence.cachedTokens;
  const blockCopies: number[] = [];
  const boundary = Math.floor(sequence.settledTokens / blockSize);
  const shared = sequence.blocks[boundary];
  if (shared !== undefined && sequence.settledTokens < sequence.length && blocks.isShared(shared)) {
    const own = blocks.allocate();
    if (firstToken > boundary * blockSize) blockCopies.push(shared, own);
    blocks.release(shared);
    sequence.blocks[boundary] = own;
  }
  while (sequence.blocks.length * blockSize < sequence.length) sequence.blocks.push(blocks.allocate());
  return { sequence, firstToken, blockCopies };
}

/** After the step that ran it. */
export function applyRun({ sequence, firstToken }: Run, blocks: BlockManager): void {
  sequence.cachedTokens = sequence.length;
  sequence.settledTokens = sequence.length;
  for (const block of sequence.blocks.slice(Math.floor(firstToken / blocks.blockSize))) blocks.markFilled(block);
}

/** Once {@link BlockManager.loseContents} was called: the next run computes everything again that no other sequence has computed by then. */
export function loseCache(sequence: SequenceState): void {
  sequence.cachedTokens = 0;
}

/** Counts in what other sequences have computed in shared blocks since the caches were lost. */
export function refreshCache(sequence: SequenceState, blocks: BlockManager): void {
  if (sequence.cachedTokens === sequence.settledTokens) return;
  let tokens = sequence.cachedTokens;
  while (tokens < sequence.settledTokens && blocks.isFilled(sequence.blocks[Math.floor(tokens / blocks.blockSize)]!))
    tokens += blocks.blockSize;
  sequence.cachedTokens = Math.min(tokens, sequence.settledTokens);
}

/** Blocks of settled tokens that the next run computes again: no two runs of a step may have one in common. */
export function recomputedBlocks(sequence: SequenceState, blocks: BlockManager): readonly number[] {
  if (sequence.cachedTokens === sequence.settledTokens) return [];
  return sequence.blocks.slice(Math.floor(sequence.cachedTokens / blocks.blockSize));
}
