import type { GenerationRequest } from './request.js';
import type { StepSampling } from './strategy.js';

type Changes = Pick<StepSampling, 'biasTokens' | 'biases' | 'repetitionPenalty' | 'repeatedTokens'>;

const NONE: Changes = { biasTokens: [], biases: [], repetitionPenalty: 1, repeatedTokens: [] };

/** Logit bias and penalties of one output as its tokens come: OpenAI's presence and frequency penalties count what was generated, CTRL's repetition penalty the prompt too. */
export class LogitChanges {
  private readonly counts = new Map<number, number>();
  private readonly repeated: Set<number>;
  /** They are the same whatever tokens come. */
  readonly areKnown: boolean;
  /** Nothing is changed, whatever comes. */
  private readonly isOff: boolean;

  constructor(
    private readonly request: Pick<GenerationRequest, 'logitBias' | 'penalties'>,
    prompt: readonly number[],
  ) {
    const { presence, frequency, repetition } = request.penalties;
    this.repeated = new Set(repetition === 1 ? [] : prompt);
    this.areKnown = presence === 0 && frequency === 0 && repetition === 1;
    this.isOff = this.areKnown && request.logitBias.length === 0;
  }

  /** A token was generated. */
  count(token: number): void {
    if (this.areKnown) return;
    this.counts.set(token, (this.counts.get(token) ?? 0) + 1);
    if (this.request.penalties.repetition !== 1) this.repeated.add(token);
  }

  /** For the next token. */
  now(): Changes {
    if (this.isOff) return NONE;
    const { presence, frequency, repetition } = this.request.penalties;
    const biases = new Map(this.request.logitBias.map(({ token, bias }) => [token, bias]));
    if (presence !== 0 || frequency !== 0) {
      for (const [token, count] of this.counts) biases.set(token, (biases.get(token) ?? 0) - presence - frequency * count);
    }
    return {
      biasTokens: [...biases.keys()],
      biases: [...biases.values()],
      repetitionPenalty: repetition,
      repeatedTokens: [...this.repeated],
    };
  }
}
