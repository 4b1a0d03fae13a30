import { randomUUID } from 'node:crypto';
import {
  CancelledError,
  EngineError,
  type ErrorCode,
  InvalidRequestError,
  NotReadyError,
  PromptTooLongError,
  TandemError,
} from '../../common/errors.js';
import type { ModelConfig } from '../../model/model-config.js';
import { checkedTokenizer, type Prompt } from '../../model/tokenizer/prompt.js';
import { areLong, encodeText, type ThreadedEncoder } from '../../model/tokenizer/threaded-encoder.js';
import type { Tokenizer } from '../../model/tokenizer/tokenizer.js';
import type { Caller } from '../access/caller.js';
import { contextOf, generate } from '../generation/blank-filling.js';
import { checkLogitsRequest, logits, type LogitsRequest } from '../generation/logits.js';
import type { GenerationDelta, GenerationRequest, GenerationResult, ScoreRequest, ScoreResult } from '../generation/request.js';
import { generationRequirements, scoreRequirements } from '../generation/requirements.js';
import { score, scoredTokens } from '../generation/scoring.js';
import type { Limits } from '../limits.js';
import { notDoneWithin, type Ticket } from '../job.js';
import type { ServingLoop } from '../serving-loop.js';
import { type LoopObserver, NO_OBSERVER, type RejectReason } from '../status/observer.js';

export type ServerState = 'loading' | 'ready' | 'recovering' | 'draining' | 'stopping' | 'failed';

/** Whose request it is and how it is to be scheduled. */
export interface CallContext {
  readonly caller: Caller;
  /** Null: one is made. */
  readonly requestId: string | null;
  readonly priority: number;
  /** From its arrival to the end, waiting included. */
  readonly timeoutMs: number | null;
  /** performance.now() when it came; without it: now. */
  readonly arrivedMs?: number;
  /** W3C trace context of the caller, as it came. */
  readonly traceParent?: string | null;
}

export interface ServiceOptions {
  readonly config: ModelConfig;
  readonly modelName: string;
  readonly tokenizer: Tokenizer | null;
  /** Of the same tokenizer, for long texts. Without it all are encoded in place. */
  readonly encoder?: Pick<ThreadedEncoder, 'encode'> | null;
  readonly blockSize: number;
  readonly limits: Limits;
  /** Null until the first epoch is ready. */
  readonly loop: () => ServingLoop | null;
  /** Why the state is what it is, for people; empty when ready. */
  readonly health: () => { readonly state: ServerState; readonly reason: string };
  readonly observer?: LoopObserver;
}

const REJECT_REASONS: Readonly<Partial<Record<ErrorCode, RejectReason>>> = {
  INVALID_REQUEST: 'invalid',
  PROMPT_TOO_LONG: 'invalid',
  NOT_FOUND: 'invalid',
  TOO_LARGE: 'too_large',
  UNAUTHENTICATED: 'unauthenticated',
  FORBIDDEN: 'forbidden',
  QUEUE_FULL: 'queue_full',
  RATE_LIMITED: 'rate_limited',
  NOT_READY: 'not_ready',
};

/** What the APIs can ask of the rest: requests in, tickets out, no wire types. */
export class ServingService {
  private readonly refusals = new WeakSet<TandemError>();

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

  /**
   * The request as it should come to {@link generate}: a long text encoded, away from the event loop; else it comes back as it is.
   * @throws TandemError what {@link generate} would say of the text's length, and `ThreadedEncoder.encode`'s
   * @throws DeadlineError the call's time is over
   */
  async prepare(request: GenerationRequest, signal?: AbortSignal, timing?: Timing): Promise<GenerationRequest> {
    return (await this.prepareAll([request], signal, timing))[0]!;
  }

  /** `prepare` of requests that belong together: their texts are long if the sum of them is. */
  async prepareAll(requests: readonly GenerationRequest[], signal?: AbortSignal, timing?: Timing): Promise<readonly GenerationRequest[]> {
    const texts = requests.map(({ prompt }) => ({ prompt, what: 'prompt', asPrompt: true }));
    const prompts = await this.encodeLong(texts, signal, timing);
    return prompts ? requests.map((request, i) => ({ ...request, prompt: prompts[i]! })) : requests;
  }

  /** `prepare` for {@link score}. */
  async prepareScore(request: ScoreRequest, signal?: AbortSignal, timing?: Timing): Promise<ScoreRequest> {
    const prompts = await this.encodeLong(
      [
        { prompt: request.prompt, what: 'prompt', asPrompt: true },
        ...request.choices.map((choice, i) => ({ prompt: choice, what: `choice ${i}`, asPrompt: false })),
      ],
      signal,
      timing,
    );
    return prompts ? { ...request, prompt: prompts[0]!, choices: prompts.slice(1) } : request;
  }

  /** Ids of a text of any length. @throws InvalidRequestError if the model has no tokenizer, and `ThreadedEncoder.encode`'s */
  tokenize(text: string, how: { readonly asPrompt: boolean; readonly dummyPrefix: boolean }, signal?: AbortSignal): Promise<number[]> {
    return this.refusing(async () => {
      const { encoder } = this.options;
      const tokenizer = this.requireTokenizer();
      const one = { text, ...how };
      return encoder ? (await encoder.encode([one], signal))[0]! : encodeText(tokenizer, one);
    });
  }

  /** @param onDelta called as text becomes final, never while the ranks wait for the next step @throws TandemError at once where the request can not be taken */
  generate(request: GenerationRequest, context: CallContext, onDelta: (delta: GenerationDelta) => void): Ticket<GenerationResult> {
    return this.admit((loop) => {
      const { model } = this;
      const first = contextOf(request, model);
      this.checkPromptLength(first.row.length);
      return loop.submit({
        ...scheduling(context),
        promptTokens: first.row.length,
        maxBlocks: generationRequirements(request, model, this.options.blockSize, first).blocks,
        maxSequences: request.beams?.numBeams ?? request.n,
        start: (sequences) => generate(request, model, sequences, (delta) => loop.defer(onDelta, delta), first),
      });
    });
  }

  score(request: ScoreRequest, context: CallContext): Ticket<ScoreResult> {
    return this.admit((loop) => {
      const { model } = this;
      const tokens = scoredTokens(request, model);
      this.checkPromptLength(tokens.context.row.length);
      return loop.submit({
        ...scheduling(context),
        promptTokens: tokens.context.row.length,
        maxBlocks: scoreRequirements(request, model, this.options.blockSize, tokens).blocks,
        maxSequences: request.choices.length,
        start: (sequences) => score(request, model, sequences, tokens),
      });
    });
  }

  logits(request: LogitsRequest, context: CallContext): Ticket<Float32Array> {
    return this.admit((loop) => {
      checkLogitsRequest(request, this.config);
      this.checkPromptLength(request.ids.length);
      return loop.submit({
        ...scheduling(context),
        promptTokens: request.ids.length,
        maxBlocks: Math.ceil(request.ids.length / this.options.blockSize),
        maxSequences: 1,
        start: (sequences) => logits(request, this.config, sequences),
      });
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

  /** For the metrics: a call was refused with this error. Counts once, whoever sees it first. */
  refused(error: unknown): void {
    if (!(error instanceof TandemError) || this.refusals.has(error)) return;
    if (error instanceof CancelledError || error instanceof EngineError) return; // nobody refused
    this.refusals.add(error);
    (this.options.observer ?? NO_OBSERVER).rejected(REJECT_REASONS[error.code] ?? 'other');
  }

  private admit<R>(submit: (loop: ServingLoop) => Ticket<R>): Ticket<R> {
    try {
      return submit(this.loop());
    } catch (error) {
      this.refused(error);
      throw error;
    }
  }

  /** The prompts with the ids of their texts; null: they are short, and encoded where they are used. */
  private encodeLong(
    prompts: readonly { readonly prompt: Prompt; readonly what: string; readonly asPrompt: boolean }[],
    signal: AbortSignal | undefined,
    timing: Timing | undefined,
  ): Promise<readonly Prompt[] | null> {
    return this.refusing(async () => {
      this.loop(); // who can not be served needs no ids
      const texts = prompts.flatMap(({ prompt, what, asPrompt }) => {
        if (prompt.kind === 'ids') return [];
        checkedTokenizer(prompt.text, what, this.model);
        return [{ text: prompt.text, asPrompt, dummyPrefix: true }];
      });
      const { encoder } = this.options;
      if (!encoder || !areLong(texts)) return null;
      const ids = (await inTime(timing, signal, (until) => encoder.encode(texts, until))).values();
      return prompts.map(({ prompt }) => (prompt.kind === 'ids' ? prompt : { ...prompt, ids: ids.next().value! }));
    });
  }

  private async refusing<R>(work: () => Promise<R>): Promise<R> {
    try {
      return await work();
    } catch (error) {
      this.refused(error);
      throw error;
    }
  }

  private checkPromptLength(tokens: number): void {
    const { maxPromptTokens } = this.options.limits;
    if (maxPromptTokens > 0 && tokens > maxPromptTokens) {
      throw new PromptTooLongError(`the prompt has ${tokens} tokens, this server allows ${maxPromptTokens}: shorten it`);
    }
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

function scheduling({ caller, requestId, priority, timeoutMs, arrivedMs, traceParent = null }: CallContext) {
  const elapsedMs = arrivedMs === undefined ? 0 : performance.now() - arrivedMs;
  return { caller, requestId: requestId ?? randomUUID(), priority, timeoutMs, elapsedMs, traceParent };
}

type Timing = Pick<CallContext, 'timeoutMs' | 'arrivedMs'>;

/** @param work ends when its signal says so: the caller's, or because the call's time is over */
async function inTime<R>(
  { timeoutMs, arrivedMs = performance.now() }: Timing = { timeoutMs: null },
  signal: AbortSignal | undefined,
  work: (signal?: AbortSignal) => Promise<R>,
): Promise<R> {
  if (timeoutMs === null) return work(signal);
  const clock = new AbortController();
  const timer = setTimeout(() => clock.abort(notDoneWithin(timeoutMs)), arrivedMs + timeoutMs - performance.now());
  try {
    return await work(signal ? AbortSignal.any([signal, clock.signal]) : clock.signal);
  } finally {
    clearTimeout(timer);
  }
}
