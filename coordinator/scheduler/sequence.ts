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
  /** The first tokens of the first run that other sequences may start from: all that see each other, or all but the last one. */
  contextTokens: number;
  /** Equal for equal contexts only; null: not for sharing. */
  contextKey: string | null;
  /** KV blocks in order, `blockSize` tokens each. Of a preempted sequence: placeholders below 0, equal where the block was the same. */
  readonly blocks: number[];
  /** The first tokens whose K and V are in the workers' caches now. */
  cachedTokens: number;
  /** The first tokens that were computed once. Their blocks, perhaps shared with forks, never change, but may have to be computed again. */
  settledTokens: number;
}

/** KV of a whole context that a sequence can start from: identical contexts only, as every context token sees every other. */
export interface ContextSource {
  readonly tokens: number;
  /** In order; the last one may hold tokens of its owner behind the context. */
  readonly blocks: readonly number[];
}

/** One Extend on its way to the workers. */
export interface Run {
  readonly sequence: SequenceState;
  readonly firstToken: number;
  readonly blockCopies: readonly number[];
}

export function createSequence(id: number): SequenceState {
  return new NewSequence(id);
}

/** A class, because objects of a literal with a getter are slow to read. */
class NewSequence implements SequenceState {
  readonly tokens: number[] = [];
  readonly positions: number[] = [];
  bidirectionalTokens = 0;
  contextTokens = 0;
  contextKey: string | null = null;
  readonly blocks: number[] = [];
  cachedTokens = 0;
  settledTokens = 0;

  constructor(readonly id: number) {}

  get length(): number {
    return this.tokens.length;
  }
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
  if (sequence.tokens.length === 0) sequence.contextTokens = op.bidirectionalTokens > 0 ? op.bidirectionalTokens : op.tokens.length - 1;
  for (let i = 0; i < op.tokens.length; i++) {
    sequence.tokens.push(op.tokens[i]!);
    sequence.positions.push(op.positions[i]!);
  }
}

/** What {@link foresee} changed: how much was computed and in the caches. */
export interface BeforeForeseen {
  readonly cachedTokens: number;
  readonly settledTokens: number;
}

/**
 * The run of all that is not cached is under way, and one token more is to follow it, which is not known yet: takes the one for done and adds a
 * token of no meaning in the other's place. {@link forgetForeseen} takes both back.
 */
export function foresee(sequence: SequenceState, position: number): BeforeForeseen {
  const { cachedTokens, settledTokens } = sequence;
  sequence.cachedTokens = sequence.length;
  sequence.settledTokens = sequence.length;
  sequence.tokens.push(0);
  sequence.positions.push(position);
  return { cachedTokens, settledTokens };
}

/** Before the run that was under way is applied (it is the one that says how much is computed). */
export function takeForeseenToken(sequence: SequenceState): void {
  sequence.tokens.pop();
  sequence.positions.pop();
}

/** Blocks that were made ready for the token stay: one of the next tokens needs them, or they go with the sequence. */
export function forgetForeseen(sequence: SequenceState, { cachedTokens, settledTokens }: BeforeForeseen): void {
  takeForeseenToken(sequence);
  sequence.cachedTokens = cachedTokens;
  sequence.settledTokens = settledTokens;
}

/** A sequence with the same history that shares the parent's blocks. */
export function forkSequence(id: number, parent: SequenceState, blocks: BlockManager): SequenceState {
  if (parent.settledTokens !== parent.length) throw new Error('fork of a sequence with an Extend under way');
  const child = createSequence(id);
  for (const token of parent.tokens) child.tokens.push(token);
  for (const position of parent.positions) child.positions.push(position);
  for (const block of parent.blocks) {
    child.blocks.push(block);
    if (block >= 0) blocks.share(block);
  }
  child.bidirectionalTokens = parent.bidirectionalTokens;
  child.contextTokens = parent.contextTokens;
  child.contextKey = parent.contextKey;
  child.cachedTokens = parent.cachedTokens;
  child.settledTokens = parent.settledTokens;
  return child;
}

/** @param first blocks that somebody else has taken over */
export function releaseSequence(sequence: SequenceState, blocks: BlockManager, first = 0): void {
  for (let i = first; i < sequence.blocks.length; i++) if (sequence.blocks[i]! >= 0) blocks.release(sequence.blocks[i]!);
  sequence.blocks.length = 0;
  sequence.cachedTokens = 0;
  sequence.settledTokens = 0;
}

/** Blocks that {@link prepareRun} appends: none where a token that was foreseen has left one. */
export function newBlocks(sequence: SequenceState, blockSize: number): number {
  return Math.max(0, Math.ceil(sequence.length / blockSize) - sequence.blocks.length);
}

/** The block that the next run writes new tokens into, if other sequences hold it too; else -1. */
export function sharedBoundary(sequence: SequenceState, blocks: BlockManager): number {
  if (sequence.settledTokens === sequence.length) return -1;
  const block = sequence.blocks[Math.floor(sequence.settledTokens / blocks.blockSize)];
  return block !== undefined && block >= 0 && blocks.isShared(block) ? block : -1;
}

/**
 * Gets the blocks for everything that is not cached. A shared block that is about to receive new tokens is replaced by a
 * copy; settled tokens may be computed again in shared blocks, because they come out with the same bits.
 */
export function prepareRun(sequence: SequenceState, blocks: BlockManager): Run {
  const { blockSize } = blocks;
  const firstToken = sequence.cachedTokens;
  const shared = sharedBoundary(sequence, blocks);
  let blockCopies: number[] = NO_COPIES;
  if (shared >= 0) {
    const boundary = Math.floor(sequence.settledTokens / blockSize);
    const own = blocks.allocate();
    if (firstToken > boundary * blockSize) blockCopies = [shared, own];
    blocks.release(shared);
    sequence.blocks[boundary] = own;
  }
  while (sequence.blocks.length * blockSize < sequence.length) sequence.blocks.push(blocks.allocate());
  return { sequence, firstToken, blockCopies };
}

const NO_COPIES: number[] = [];

/**
 * A new sequence starts from a context that is computed: it shares the whole blocks and gets a copy of the last one, which
 * its owner goes on writing.
 *
 * @returns block copies, to be done before the step that it runs in
 */
export function adoptContext(sequence: SequenceState, source: ContextSource, blocks: BlockManager): number[] {
  const whole = Math.floor(source.tokens / blocks.blockSize);
  const last = source.blocks[whole];
  for (let i = 0; i < whole; i++) {
    blocks.share(source.blocks[i]!);
    sequence.blocks.push(source.blocks[i]!);
  }
  sequence.cachedTokens = source.tokens;
  sequence.settledTokens = source.tokens;
  if (source.tokens % blocks.blockSize === 0) return [];
  const own = blocks.allocate();
  blocks.markFilled(own);
  sequence.blocks.push(own);
  return own === last ? [] : [last!, own]; // the cache may have had to give up that very block
}

/** After the step that ran it. */
export function applyRun({ sequence, firstToken }: Pick<Run, 'sequence' | 'firstToken'>, blocks: BlockManager): void {
  sequence.cachedTokens = sequence.length;
  sequence.settledTokens = sequence.length;
  for (let i = Math.floor(firstToken / blocks.blockSize); i < sequence.blocks.length; i++) blocks.markFilled(sequence.blocks[i]!);
}

/** Once {@link BlockManager.loseContents} was called: the next run computes everything again that no other sequence has computed by then. */
export function loseCache(sequence: SequenceState, blocks: BlockManager): void {
  sequence.cachedTokens = 0;
  if (sequence.settledTokens === 0) dropBlocks(sequence, blocks);
}

/** Of a sequence of which nothing is computed: by the time that its run begins again it may start from a context. */
function dropBlocks(sequence: SequenceState, blocks: BlockManager): void {
  for (const block of sequence.blocks) if (block >= 0) blocks.release(block);
  sequence.blocks.length = 0;
}

/** Counts in what other sequences have computed in shared blocks since the caches were lost. */
export function refreshCache(sequence: SequenceState, blocks: BlockManager): void {
  if (sequence.cachedTokens === sequence.settledTokens) return;
  let tokens = sequence.cachedTokens;
  while (tokens < sequence.settledTokens && isFilled(sequence.blocks[Math.floor(tokens / blocks.blockSize)]!, blocks))
    tokens += blocks.blockSize;
  sequence.cachedTokens = Math.min(tokens, sequence.settledTokens);
}

function isFilled(block: number, blocks: BlockManager): boolean {
  return block >= 0 && blocks.isFilled(block);
}

/** Blocks of settled tokens that the next run computes again: no two runs of a step may have one in common. */
export function recomputedBlocks(sequence: SequenceState, blocks: BlockManager): readonly number[] {
  if (sequence.cachedTokens === sequence.settledTokens) return NO_COPIES;
  return sequence.blocks.slice(Math.floor(sequence.cachedTokens / blocks.blockSize));
}

/**
 * All sequences of a request give their blocks up; which of them shared what is kept, so that {@link restoreSequences}
 * needs no more blocks than they had.
 *
 * @param takenOver of each sequence, how many of its first blocks the context cache has taken over
 */
export function evictSequences(
  sequences: Iterable<SequenceState>,
  blocks: BlockManager,
  takenOver: (sequence: SequenceState) => number,
): void {
  const placeholders = new Map<number, number>();
  for (const sequence of sequences) {
    const first = takenOver(sequence);
    if (sequence.settledTokens === 0) dropBlocks(sequence, blocks);
    for (const [i, block] of sequence.blocks.entries()) {
      if (block < 0) continue;
      const placeholder = placeholders.get(block) ?? -1 - placeholders.size;
      placeholders.set(block, placeholder);
      sequence.blocks[i] = placeholder;
      if (i >= first) blocks.release(block);
    }
    sequence.cachedTokens = 0;
  }
}

/** How many blocks {@link restoreSequences} allocates. */
export function missingBlocks(sequences: Iterable<SequenceState>): number {
  const placeholders = new Set<number>();
  for (const { blocks } of sequences) for (const block of blocks) if (block < 0) placeholders.add(block);
  return placeholders.size;
}

/** Gives evicted sequences blocks again; what was in them is computed again, but for contexts that `findContext` still has. */
export function restoreSequences(
  sequences: Iterable<SequenceState>,
  blocks: BlockManager,
  findContext: (key: string) => ContextSource | null,
): void {
  const found = new Map<number, number>();
  const all = [...sequences];
  // Contexts first: what is shared can not be evicted to make room for the rest.
  for (const { contextKey, blocks: table } of all) {
    const source = contextKey === null ? null : findContext(contextKey);
    const whole = source ? Math.floor(source.tokens / blocks.blockSize) : 0;
    for (let i = 0; i < Math.min(whole, table.length); i++) {
      if (table[i]! < 0 && !found.has(table[i]!)) found.set(table[i]!, source!.blocks[i]!);
    }
    for (const [i, placeholder] of table.entries()) {
      const block = found.get(placeholder);
      if (placeholder >= 0 || block === undefined) continue;
      blocks.share(block);
      table[i] = block;
    }
  }
  for (const { blocks: table } of all) {
    for (const [i, placeholder] of table.entries()) {
      if (placeholder >= 0) continue;
      const block = found.get(placeholder);
      if (block === undefined) found.set(placeholder, (table[i] = blocks.allocate()));
      else {
        blocks.share(block);
        table[i] = block;
      }
    }
  }
}
