import { randomUUID } from 'node:crypto';
import { decodeResultBody, encodeStepBody, type StepExtend, type StepExtendResult } from '../../common/step-codec.js';
import { openStore } from '../../model/store/open-store.js';
import { bidirectionalTokens, positionsOf, type GoldenRow } from './golden-data.js';
import { loadAddon, type NativeEngine, type NativeEngineOptions } from '../../native/binding/addon.js';

export interface EngineRanksOptions {
  readonly store: string;
  readonly worldSize: number;
  readonly engine: Pick<NativeEngineOptions, 'device' | 'activations'> & { readonly kvDtype: NativeEngineOptions['kv']['dtype'] };
}

export interface Run {
  readonly tokens: readonly number[];
  readonly positions: readonly number[];
  readonly bidirectionalTokens: number;
}

/** A golden row that sees its mask's prefix, as one run. */
export function runOf({ tokens, position_ids: positions, mask }: GoldenRow): Run {
  return { tokens, positions: positionsOf(positions, tokens.length), bidirectionalTokens: bidirectionalTokens(mask) };
}

const blockSize = 16;
const numBlocks = 256;
const maxBatchTokens = 1024;

/** All ranks of one model in this process, each on its own thread: the engine without coordinator and workers. */
export class EngineRanks {
  private stepId = 0;

  private constructor(
    private readonly ranks: readonly NativeEngine[],
    private readonly numLayers: number,
  ) {}

  static async load({ store, worldSize, engine }: EngineRanksOptions): Promise<EngineRanks> {
    const { config, tensors } = await openStore(store);
    const name = `test-${randomUUID()}`;
    const ranks = Array.from({ length: worldSize }, (_, rank) =>
      loadAddon().createEngine({
        model: config,
        tensors,
        rank,
        worldSize,
        device: engine.device,
        gpu: 0, // ranks may share one
        threads: 1,
        cpus: [],
        isa: null,
        activations: engine.activations,
        quantizeEmbedding: 'none',
        kv: { numBlocks, blockSize, dtype: engine.kvDtype },
        maxBatchTokens,
        communicator: worldSize === 1 ? null : { name, timeoutMs: 60_000 },
      }),
    );
    return new EngineRanks(await Promise.all(ranks), config.numLayers);
  }

  async step(all: readonly StepExtend[]): Promise<readonly StepExtendResult[]> {
    const body = encodeStepBody({ blockCopies: [], extends: all });
    this.stepId += 1;
    const [first] = await Promise.all(this.ranks.map((rank) => rank.step(this.stepId, body)));
    return decodeResultBody(first!.body);
  }

  /** An Extend of a sequence whose blocks begin at `firstBlock`. */
  extend(run: Run, cachedTokens: number, want: StepExtend['want'], firstBlock = 0): StepExtend {
    const blocks = Math.ceil((cachedTokens + run.tokens.length) / blockSize);
    return {
      tokens: Uint32Array.from(run.tokens),
      positions: Uint32Array.from(run.positions),
      blockTable: Uint32Array.from({ length: blocks }, (_, i) => firstBlock + i),
      cachedTokens,
      bidirectionalTokens: run.bidirectionalTokens,
      firstLayer: 0,
      endLayer: this.numLayers,
      want,
      sampledBy: -1,
    };
  }

  /** Of the last `rows` tokens of a run on an empty sequence. */
  async logits(run: Run, rows = run.tokens.length): Promise<Float32Array[]> {
    const [result] = await this.step([this.extend(run, 0, { kind: 'logits', rows })]);
    if (result?.kind !== 'logits') throw new Error(`logits were wanted, ${JSON.stringify(result)} came`);
    const vocab = result.logits.length / rows;
    return Array.from({ length: rows }, (_, row) => result.logits.slice(row * vocab, (row + 1) * vocab));
  }

  /** All steps under way, and those to come, end. */
  abort(): void {
    for (const rank of this.ranks) rank.abort();
  }

  async dispose(): Promise<void> {
    await Promise.all(this.ranks.map((rank) => rank.dispose()));
  }
}
