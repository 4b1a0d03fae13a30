import { randomUUID } from 'node:crypto';
import { InvalidRequestError, NotReadyError } from '../../common/errors.js';
import type { ModelConfig } from '../../model/model-config.js';
import type { Tokenizer } from '../../model/tokenizer/tokenizer.js';
import type { Caller } from '../access/caller.js';
import { contextOf, generate } from '../generation/blank-filling.js';
import { checkLogitsRequest, logits, type LogitsRequest } from '../generation/logits.js';
import type { GenerationDelta, GenerationRequest, GenerationResult, ScoreRequest, ScoreResult } from '../generation/request.js';
import { generationRequirements, scoreRequirements } from '../generation/requirements.js';
import { score, scoredTokens } from '../generation/scoring.js';
import type { Limits } from '../limits.js';
import type { ServingLoop, Ticket } from '../serving-loop.js';

export type ServerState = 'loading' | 'ready' | 'recovering' | 'draining' | 'stopping' | 'failed';

/** Whose request it is and how it is to be scheduled. */
export interface CallContext {
  readonly caller: Caller;
  /** Null: one is made. */
  readonly requestId: string | null;
  readonly priority: number;
  /** From now to the end, waiting included. */
  readonly timeoutMs: number | null;
}

export interface ServiceOptions {
  readonly config: ModelConfig;
  readonly modelName: string;
  readonly tokenizer: Tokenizer | null;
  readonly blockSize: number;
  readonly limits: Limits;
  /** Null until the first epoch is ready. */
  readonly loop: () => ServingLoop | null;
  /** Why the state is what it is, for people; empty when ready. */
  readonly health: () => { readonly state: ServerState; readonly reason: string };
}

/** What the APIs can ask of the rest: requests in, tickets out, no wire types. */
export class ServingService {
  constructor(private readonly options: ServiceOptions) {}

  get config(): ModelConfig {
    return this.options.config;
  }

  get modelName(): string {
    return this.options.modelName;
  }

  get limits(): Limits {
    return this.options.limits;
  }

  /** `recovering` takes requests, which wait; everything else but `ready` refuses them. */
  get health(): { readonly state: ServerState; readonly reason: string } {
    return this.options.health();
  }

  /** @param onDelta called as text becomes final, never while the ranks wait for the next step @throws TandemError at once where the request can not be taken */
  generate(request: GenerationRequest, context: CallContext, onDelta: (delta: GenerationDelta) => void): Ticket<GenerationResult> {
    const model = this.model;
    const loop = this.loop();
    const first = contextOf(request, model);
    return loop.submit({
      ...scheduling(context),
      promptTokens: first.row.length,
      maxBlocks: generationRequirements(request, model, this.options.blockSize, first).blocks,
      maxSequences: request.beams?.numBeams ?? request.n,
      start: (sequences) => generate(request, model, sequences, (delta) => loop.defer(() => onDelta(delta)), first),
    });
  }

  score(request: ScoreRequest, context: CallContext): Ticket<ScoreResult> {
    const model = this.model;
    const loop = this.loop();
    const tokens = scoredTokens(request, model);
    return loop.submit({
      ...scheduling(context),
      promptTokens: tokens.context.row.length,
      maxBlocks: scoreRequirements(request, model, this.options.blockSize, tokens).blocks,
      maxSequences: request.choices.length,
      start: (sequences) => score(request, model, sequences, tokens),
    });
  }

  logits(request: LogitsRequest, context: CallContext): Ticket<Float32Array> {
    checkLogitsRequest(request, this.config);
    return this.loop().submit({
      ...scheduling(context),
      promptTokens: request.ids.length,
      maxBlocks: Math.ceil(request.ids.length / this.options.blockSize),
      maxSequences: 1,
      start: (sequences) => logits(request, this.config, sequences),
    });
  }

  /** Ends a request of this caller; with the role `operate`, anybody's. @throws NotFoundError no such request waits or runs */
  abort(requestId: string, caller: Caller): void {
    this.loop().abort(requestId, caller.roles.includes('operate') ? null : caller.name);
  }

  /** No new requests from here on. @returns how many were left when the time was over; 0: none */
  drain(timeoutMs: number | null): Promise<number> {
    return this.loop().drain(timeoutMs);
  }

  /** @throws InvalidRequestError if the model has no tokenizer */
  requireTokenizer(): Tokenizer {
    if (!this.options.tokenizer) throw new InvalidRequestError('this model has no tokenizer: send and read token ids');
    return this.options.tokenizer;
  }

  private get model() {
    return { config: this.options.config, tokenizer: this.options.tokenizer };
  }

  private loop(): ServingLoop {
    const loop = this.options.loop();
    if (!loop) throw new NotReadyError(`the server is ${this.health.state}: ${this.health.reason}`, 1000);
    return loop;
  }
}

function scheduling({ caller, requestId, priority, timeoutMs }: CallContext) {
  return { caller, requestId: requestId ?? randomUUID(), priority, timeoutMs };
}
