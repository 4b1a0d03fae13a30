import { InvalidRequestError } from '../../common/errors.js';
import type { ModelConfig } from '../../model/model-config.js';
import type { Tokenizer } from '../../model/tokenizer/tokenizer.js';
import { contextOf, generate } from '../generation/blank-filling.js';
import { checkLogitsRequest, logits, type LogitsRequest } from '../generation/logits.js';
import type { GenerationDelta, GenerationRequest, GenerationResult, ScoreRequest, ScoreResult } from '../generation/request.js';
import { generationRequirements, scoreRequirements } from '../generation/requirements.js';
import { score, scoredTokens } from '../generation/scoring.js';
import type { ServingLoop, Ticket } from '../serving-loop.js';

/** What the APIs can ask of the loop: requests in, tickets out, no wire types. */
export class ServingService {
  constructor(
    private readonly loop: ServingLoop,
    readonly config: ModelConfig,
    private readonly tokenizer: Tokenizer | null,
    private readonly blockSize: number,
  ) {}

  /** @throws TandemError at once where the request can not be taken */
  generate(request: GenerationRequest, onDelta: (delta: GenerationDelta) => void): Ticket<GenerationResult> {
    const model = { config: this.config, tokenizer: this.tokenizer };
    const context = contextOf(request, model);
    return this.counted(
      this.loop.submit({
        reserveBlocks: generationRequirements(request, model, this.blockSize, context).blocks,
        start: (sequences) => generate(request, model, sequences, onDelta, context),
      }),
      (result) => this.loop.countTokens(result.promptTokens, result.generatedTokens),
    );
  }

  score(request: ScoreRequest): Ticket<ScoreResult> {
    const model = { config: this.config, tokenizer: this.tokenizer };
    const tokens = scoredTokens(request, model);
    return this.counted(
      this.loop.submit({
        reserveBlocks: scoreRequirements(request, model, this.blockSize, tokens).blocks,
        start: (sequences) => score(request, model, sequences, tokens),
      }),
      (result) => this.loop.countTokens(result.contextTokens, 0),
    );
  }

  logits(request: LogitsRequest): Ticket<Float32Array> {
    checkLogitsRequest(request, this.config);
    return this.loop.submit({
      reserveBlocks: Math.ceil(request.ids.length / this.blockSize),
      start: (sequences) => logits(request, this.config, sequences),
    });
  }

  /** @throws InvalidRequestError if the model has no tokenizer */
  requireTokenizer(): Tokenizer {
    if (!this.tokenizer) throw new InvalidRequestError('this model has no tokenizer: send and read token ids');
    return this.tokenizer;
  }

  private counted<R>(ticket: Ticket<R>, count: (result: R) => void): Ticket<R> {
    ticket.done.then(
      ({ value }) => count(value),
      () => {},
    );
    return ticket;
  }
}
