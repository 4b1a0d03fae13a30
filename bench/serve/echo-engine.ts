import { encodeResultBody, type StepExtendResult } from '../../common/step-codec.js';
import type { Engine, EngineCapacity, EngineExtend, EngineStep, EngineStepResult } from '../../coordinator/group/engine.js';
import { decodeResults, encodeStep, linkService } from '../../coordinator/group/wire.js';

export interface EchoOptions {
  readonly kvBlocks: number;
  readonly blockSize: number;
  readonly maxBatchTokens: number;
  readonly numLayers: number;
  readonly vocabSize: number;
  /** Sampled tokens are below it: ordinary pieces with text. */
  readonly numTextPieces: number;
  /** Ranks that a step would be sent to. */
  readonly worldSize: number;
}

/** Milliseconds of one step. */
export interface EchoStep {
  /** When it was asked for, by performance.now(). */
  readonly startMs: number;
  /** The step to the bytes that go to each rank, and the bytes of its results back. */
  readonly codecMs: number;
  /** What the ranks would have done. */
  readonly ranksMs: number;
}

/**
 * An engine whose ranks take no time: it does all that the coordinator does for a step on the wire (encode for each rank, decode and check
 * the results) and answers each sample with a piece that depends on the last token and its position. What the ranks would do is told apart.
 */
export class EchoEngine implements Engine {
  readonly capacity: EngineCapacity;
  readonly steps: EchoStep[] = [];
  private stepId = 0;

  constructor(private readonly options: EchoOptions) {
    const { kvBlocks, blockSize, maxBatchTokens, numLayers } = options;
    this.capacity = { kvBlocks, blockSize, maxBatchTokens, numLayers };
  }

  async step(step: EngineStep): Promise<EngineStepResult> {
    const startMs = performance.now();
    const message = { step: encodeStep(++this.stepId, step) };
    for (let rank = 0; rank < this.options.worldSize; rank++) linkService.Attach.responseSerialize(message);
    const encodedMs = performance.now();
    const body = encodeResultBody(step.extends.map((extend) => this.answer(extend)));
    const answer = linkService.Attach.requestSerialize({ result: { stepId: this.stepId, body } });
    const ranksMs = performance.now() - encodedMs;
    await new Promise((resolve) => setImmediate(resolve)); // clients and the garbage collector have their turn, as with real ranks
    const answeredMs = performance.now();
    const { result } = linkService.Attach.requestDeserialize(answer);
    const results = decodeResults(result!.body, step.extends, this.options);
    const codecMs = encodedMs - startMs + performance.now() - answeredMs;
    this.steps.push({ startMs, codecMs, ranksMs });
    return { results, ranks: [{ computeMs: 0, collectiveMs: 0 }], evaluateMs: 0, codecMs };
  }

  async ready(): Promise<void> {}
  async close(): Promise<void> {}

  private answer({ want, tokens, positions, endLayer }: EngineExtend): StepExtendResult {
    if (want.kind === 'none' || endLayer < this.options.numLayers) return { kind: 'none' };
    if (want.kind !== 'sample') throw new Error(`the echo engine samples, it was asked for ${want.kind}`);
    const last = tokens.length - 1;
    const hash = Math.imul(tokens[last]! + 1, 2654435761) ^ Math.imul(positions[last]! + 1, 40503);
    // `| 0`: an integer also for V8, which else takes the tokens of all results for floating-point numbers, and what lists them with it.
    const token = (FIRST_PIECE + ((hash >>> 0) % (this.options.numTextPieces - FIRST_PIECE))) | 0;
    return { kind: 'sample', token, logprob: -1, topTokens: [], topLogprobs: [] };
  }
}

/** Below are `<unk>`, `<s>` and `</s>`. */
const FIRST_PIECE = 3;
