import type { ExtendResult, Want } from '../generation/strategy.js';
import { EpochEndedError, type Engine, type EngineCapacity, type EngineExtend, type EngineStep, type EngineStepResult } from './engine.js';

/**
 * An engine without a model, for tests of what drives engines. It keeps the tokens and positions that a KV cache would hold
 * in real blocks, and answers from a hash of what an Extend can see through its block table: a block that is lost, shared
 * too long or copied too late changes the answers.
 */
export class FakeEngine implements Engine {
  private readonly tokens: Uint32Array;
  private readonly positions: Uint32Array;
  private steps = 0;
  private epoch = 1;
  private underWay: Promise<unknown> = Promise.resolve();
  /** Of the last step. */
  private results: readonly ExtendResult[] = [];
  private carry: { readonly extend: EngineExtend; readonly nextLayer: number } | null = null;
  readonly capacity: EngineCapacity;
  /** The Extends of every step, for tests of what was batched. */
  readonly history: (readonly EngineExtend[])[] = [];

  constructor(
    private readonly options: {
      readonly kvBlocks: number;
      readonly blockSize: number;
      readonly maxBatchTokens: number;
      readonly vocabSize: number;
      readonly numLayers?: number;
      /** Steps (counted from 1) that end the epoch instead of running. */
      readonly lostSteps?: ReadonlySet<number>;
    },
  ) {
    const { kvBlocks, blockSize, maxBatchTokens, numLayers = 4 } = options;
    this.capacity = { kvBlocks, blockSize, maxBatchTokens, numLayers };
    this.tokens = new Uint32Array(kvBlocks * blockSize);
    this.positions = new Uint32Array(kvBlocks * blockSize);
  }

  step(given: EngineStep): Promise<EngineStepResult> {
    const step = copyOf(given); // its owner goes on with what it has of it
    const { epoch } = this;
    const answer = this.underWay.then(() => this.run(step, epoch));
    this.underWay = answer.catch(() => {});
    return answer;
  }

  private async run(step: EngineStep, epoch: number): Promise<EngineStepResult> {
    await new Promise((resolve) => setImmediate(resolve)); // as long as other events take, like a real step
    if (epoch < this.epoch) throw new EpochEndedError('a rank was lost in the step before (fake)');
    this.steps += 1;
    if (this.options.lostSteps?.has(this.steps)) {
      this.tokens.fill(0xdead);
      this.positions.fill(0xdead);
      this.carry = null;
      this.results = [];
      this.epoch += 1;
      throw new EpochEndedError('a rank was lost (fake)');
    }
    const all = step.extends.map((extend) => this.withSample(extend));
    const runTokens = all.reduce((sum, { tokens }) => sum + tokens.length, 0);
    if (runTokens > this.options.maxBatchTokens) throw new Error(`a step of ${runTokens} tokens`);
    this.history.push(all);
    this.refuseSharedWrites(all);
    this.copyBlocks(step.blockCopies);
    const whole = all.map((extend) => this.goesThrough(extend));
    all.forEach((extend, i) => whole[i] && this.write(extend));
    this.results = all.map((extend, i): ExtendResult => (whole[i] ? this.evaluate(extend) : { kind: 'none' }));
    return { results: this.results, ranks: [{ computeMs: 1, collectiveMs: 0 }], evaluateMs: 0, codecMs: 0 };
  }

  async ready(): Promise<void> {}
  async close(): Promise<void> {}

  private withSample(extend: EngineExtend): EngineExtend {
    if (extend.sampledBy < 0) return extend;
    const sample = this.results[extend.sampledBy];
    if (extend.tokens.length !== 1 || sample?.kind !== 'sample') {
      throw new Error(
        `a run of ${extend.tokens.length} tokens goes on from Extend ${extend.sampledBy} of the step before, which gave ${sample?.kind}`,
      );
    }
    return { ...extend, tokens: [sample.token] };
  }

  /** Whether the Extend has now been through all layers; one that goes through them in several steps has to be the same each time. */
  private goesThrough(extend: EngineExtend): boolean {
    const { numLayers } = this.capacity;
    const { firstLayer, endLayer } = extend;
    if (firstLayer >= endLayer || endLayer > numLayers) throw new Error(`layers ${firstLayer} to ${endLayer} of ${numLayers}`);
    if (firstLayer === 0 && endLayer === numLayers) return true;
    if (firstLayer > 0) {
      const same = (field: 'tokens' | 'positions' | 'blockTable') =>
        Array.from(this.carry!.extend[field]).join() === Array.from(extend[field]).join();
      if (this.carry?.nextLayer !== firstLayer || !same('tokens') || !same('positions') || !same('blockTable')) {
        throw new Error(`a run goes on at layer ${firstLayer}, the one under way is at ${this.carry?.nextLayer ?? 'none'}, or another`);
      }
    }
    this.carry = endLayer < numLayers ? { extend: { ...extend, blockTable: Array.from(extend.blockTable) }, nextLayer: endLayer } : null;
    return endLayer === numLayers;
  }

  private refuseSharedWrites(extendsOfStep: readonly EngineExtend[]): void {
    const written = new Set<number>();
    for (const { blockTable, cachedTokens, tokens } of extendsOfStep) {
      const { blockSize } = this.options;
      for (const block of Array.from(blockTable).slice(
        Math.floor(cachedTokens / blockSize),
        Math.ceil((cachedTokens + tokens.length) / blockSize),
      )) {
        if (written.has(block)) throw new Error(`block ${block} is written by two Extends of a step`);
        written.add(block);
      }
    }
  }

  private copyBlocks(pairs: readonly number[]): void {
    const { blockSize } = this.options;
    for (let i = 0; i < pairs.length; i += 2) {
      const [from, to] = [pairs[i]! * blockSize, pairs[i + 1]! * blockSize];
      this.tokens.copyWithin(to, from, from + blockSize);
      this.positions.copyWithin(to, from, from + blockSize);
    }
  }

  private slot(extend: EngineExtend, index: number): number {
    const { blockSize } = this.options;
    const block = extend.blockTable[Math.floor(index / blockSize)];
    if (block === undefined) throw new Error(`no block for token ${index}`);
    return block * blockSize + (index % blockSize);
  }

  private write(extend: EngineExtend): void {
    Array.from(extend.tokens).forEach((token, i) => {
      const slot = this.slot(extend, extend.cachedTokens + i);
      this.tokens[slot] = token;
      this.positions[slot] = extend.positions[i]!;
    });
  }

  /** A hash of the first `length` tokens as the cache holds them. */
  private hash(extend: EngineExtend, length: number): number {
    let hash = 2166136261;
    for (let i = 0; i < length; i++) {
      const slot = this.slot(extend, i);
      hash = Math.imul(hash ^ this.tokens[slot]!, 16777619);
      hash = Math.imul(hash ^ this.positions[slot]!, 16777619);
    }
    return hash >>> 0;
  }

  private evaluate(extend: EngineExtend): ExtendResult {
    const { want } = extend;
    const length = extend.cachedTokens + extend.tokens.length;
    return answer(want, (back) => this.hash(extend, length - back), this.options.vocabSize);
  }
}

function copyOf({ blockCopies, extends: all }: EngineStep): EngineStep {
  return {
    blockCopies: [...blockCopies],
    extends: all.map((extend) => ({
      ...extend,
      tokens: Array.from(extend.tokens),
      positions: Array.from(extend.positions),
      blockTable: Array.from(extend.blockTable),
    })),
  };
}

/** @param hashAt hash of what the row `back` rows before the last one sees */
function answer(want: Want, hashAt: (back: number) => number, vocabSize: number): ExtendResult {
  const logprobOf = (hash: number): number => -1 - (hash % 1000) / 100;
  switch (want.kind) {
    case 'none':
      return { kind: 'none' };
    case 'sample': {
      const { seed, stream, position } = want.noise;
      const hash = (hashAt(0) ^ Math.imul(Number(seed & 0xffffn) + 31 * stream + 17 * position, 2654435761)) >>> 0;
      let token = hash % vocabSize;
      while (want.params.bannedTokens.includes(token)) token = (token + 1) % vocabSize;
      return { kind: 'sample', token, logprob: logprobOf(hash), topTokens: [], topLogprobs: [] };
    }
    case 'candidates': {
      const all = Array.from({ length: vocabSize }, (_, token) => ({
        token,
        logprob: logprobOf(Math.imul(hashAt(0) ^ token, 2654435761) >>> 0),
      }));
      const best = all
        .filter(({ token }) => !want.bannedTokens.includes(token))
        .sort((a, b) => b.logprob - a.logprob || a.token - b.token)
        .slice(0, want.count);
      const logprobs = best.map(({ logprob }) => logprob);
      return { kind: 'candidates', tokens: best.map(({ token }) => token), logprobs, keys: logprobs };
    }
    case 'targets':
      return { kind: 'targets', logprobs: want.tokens.map((token, i) => logprobOf(hashAt(want.tokens.length - 1 - i) ^ token)) };
    case 'logits':
      return {
        kind: 'logits',
        logits: Float32Array.from({ length: want.rows * vocabSize }, (_, i) => hashAt(want.rows - 1 - Math.floor(i / vocabSize)) % (i + 7)),
      };
  }
}
