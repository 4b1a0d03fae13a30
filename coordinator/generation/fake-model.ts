import type { ExtendOp, ExtendResult, Noise, Sequence, Sequences, Strategy, Want } from './strategy.js';

/**
 * A model without weights, for tests of strategies alone: logits are a hash of what a token may see, so that a wrong token, position,
 * visibility or order changes everything after it. Like a transformer's, a cached token keeps what it saw when it was extended. Counts KV
 * blocks with copy-on-write forks, as the scheduler does.
 */
export class FakeModel implements Sequences {
  /** Most blocks held at once so far. */
  peakBlocks = 0;
  /** All Extends so far, in order. */
  readonly ops: ExtendOp[] = [];
  private readonly live = new Map<number, FakeSequence>();
  private nextId = 1;
  private nextBlock = 1;

  constructor(
    readonly vocabSize: number,
    private readonly blockSize = 4,
    /** Changes the logits of every context. */
    private readonly salt = 0,
  ) {}

  get liveSequences(): number {
    return this.live.size;
  }

  create(): Sequence {
    return this.add([], []);
  }

  fork(parent: Sequence): Sequence {
    const { cache, blocks } = this.get(parent);
    return this.add([...cache], [...blocks]);
  }

  release(sequence: Sequence): void {
    if (!this.live.delete(sequence.id)) throw new Error(`sequence ${sequence.id} is not live`);
  }

  /** Runs a strategy to its end. */
  run<R>(strategy: Strategy<R>): R {
    let state = strategy.next();
    while (!state.done) {
      const ops = state.value;
      if (ops.length === 0) throw new Error('a strategy yielded no Extend');
      if (new Set(ops.map(({ sequence }) => sequence.id)).size !== ops.length) throw new Error('a sequence is extended twice at once');
      state = strategy.next(ops.map((op) => this.execute(op)));
    }
    return state.value;
  }

  execute(op: ExtendOp): ExtendResult {
    const sequence = this.get(op.sequence);
    const { tokens, positions, bidirectionalTokens, want } = op;
    if (tokens.length === 0 || tokens.length !== positions.length || bidirectionalTokens > tokens.length)
      throw new Error('malformed Extend');
    this.ops.push(op);
    const rows = this.append(sequence, op);
    this.allocate(sequence);
    return this.answer(want, rows);
  }

  /** Logits of the run's rows; each token's state enters the cache. */
  private append(sequence: FakeSequence, { tokens, positions, bidirectionalTokens }: ExtendOp): Float32Array[] {
    const cached = sequence.cache.length;
    const run = tokens.map((token, i) => hash([token, positions[i]!]));
    const seen = [...sequence.cache.map(({ input }) => input), ...run];
    const visible = (i: number): number => cached + Math.max(i + 1, bidirectionalTokens);
    run.forEach((input, i) => sequence.cache.push({ input, state: hash([input, ...seen.slice(0, visible(i))]) }));
    return run.map((input, i) => {
      const context = hash([this.salt, input, ...sequence.cache.slice(0, visible(i)).map(({ state }) => state)]);
      return Float32Array.from({ length: this.vocabSize }, (_, v) => 8 * uniform([context, v]) ** 2);
    });
  }

  private allocate(sequence: FakeSequence): void {
    const { blocks, cache } = sequence;
    const firstWritten = Math.floor(sequence.stored / this.blockSize);
    for (let i = firstWritten; i < Math.ceil(cache.length / this.blockSize); i++) {
      const isShared = [...this.live.values()].some((other) => other !== sequence && other.blocks.includes(blocks[i]!));
      if (blocks[i] === undefined || isShared) blocks[i] = this.nextBlock++;
    }
    sequence.stored = cache.length;
    this.peakBlocks = Math.max(this.peakBlocks, new Set([...this.live.values()].flatMap((each) => each.blocks)).size);
  }

  private answer(want: Want, rows: readonly Float32Array[]): ExtendResult {
    const last = rows.at(-1)!;
    switch (want.kind) {
      case 'none':
        return { kind: 'none' };
      case 'logits':
        return { kind: 'logits', logits: Float32Array.from(rows.slice(-want.rows).flatMap((row) => [...row])) };
      case 'targets': {
        const used = rows.slice(rows.length - want.tokens.length);
        return { kind: 'targets', logprobs: want.tokens.map((token, i) => logSoftmax(used[i]!)[token]!) };
      }
      case 'candidates': {
        const logprobs = logSoftmax(banned(last, want.bannedTokens));
        const keys = Array.from(logprobs, (logprob, v) => (want.noise ? Math.fround(logprob + gumbel(want.noise, v)) : logprob));
        const tokens = largest(keys, want.count);
        return { kind: 'candidates', tokens, logprobs: tokens.map((v) => logprobs[v]!), keys: tokens.map((v) => keys[v]!) };
      }
      case 'sample': {
        const { temperature, bannedTokens } = want.params;
        const logits = banned(last, bannedTokens);
        const scores = temperature === 0 ? logits : Array.from(logits, (logit, v) => logit / temperature + gumbel(want.noise, v));
        const token = largest(scores, 1)[0]!;
        const logprobs = logSoftmax(last);
        const topTokens = largest(logprobs, want.topLogprobs);
        return { kind: 'sample', token, logprob: logprobs[token]!, topTokens, topLogprobs: topTokens.map((v) => logprobs[v]!) };
      }
    }
  }

  private add(cache: CachedToken[], blocks: number[]): Sequence {
    const sequence = new FakeSequence(this.nextId++, cache, blocks);
    this.live.set(sequence.id, sequence);
    return sequence;
  }

  private get(sequence: Sequence): FakeSequence {
    const found = this.live.get(sequence.id);
    if (!found) throw new Error(`sequence ${sequence.id} is not live`);
    return found;
  }
}

class FakeSequence implements Sequence {
  stored: number;
  constructor(
    readonly id: number,
    readonly cache: CachedToken[],
    readonly blocks: number[],
  ) {
    this.stored = cache.length;
  }
  get length(): number {
    return this.cache.length;
  }
}

interface CachedToken {
  readonly input: number;
  readonly state: number;
}

const BANNED_LOGIT = -65504;

function banned(logits: Float32Array, tokens: readonly number[]): Float32Array {
  const copy = logits.slice();
  for (const token of tokens) copy[token] = BANNED_LOGIT;
  return copy;
}

export function logSoftmax(logits: Float32Array): Float32Array {
  const max = Math.max(...logits);
  const logSum = max + Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit - max), 0));
  return logits.map((logit) => logit - logSum);
}

/** Indices of the largest values, best first, the lower index among equals. */
function largest(values: ArrayLike<number>, count: number): number[] {
  const order = Array.from(values, (_, i) => i).sort((a, b) => values[b]! - values[a]! || a - b);
  return order.slice(0, count);
}

function gumbel({ seed, stream, position }: Noise, token: number): number {
  return -Math.log(-Math.log(uniform([Number(seed & 0xffffffffn), stream, position, token])));
}

/** In (0, 1). */
function uniform(values: readonly number[]): number {
  return (hash(values) + 0.5) / 2 ** 32;
}

/** FNV-1a over 32-bit words, with a finish that spreads the last one. */
function hash(values: readonly number[]): number {
  let h = 0x811c9dc5;
  for (const value of values) {
    h = Math.imul(h ^ value, 0x01000193);
    h ^= h >>> 15;
    h = Math.imul(h, 0x2c1b3c6d);
    h ^= h >>> 12;
  }
  return (h ^ (h >>> 16)) >>> 0;
}
