import { InvalidRequestError } from '../../common/errors.js';
import { buildContext, checkIds, type Context, type PromptModel } from '../../model/tokenizer/prompt.js';
import { Answer } from './answer.js';
import { beamSearch, type BeamSearchResult, type Hypothesis } from './beam-search.js';
import { type BlankContext, blankContext } from '../../model/tokenizer/blank-context.js';
import { sharedPrefill } from './prefill.js';
import { BlankText } from './blank-text.js';
import { LogitChanges } from './logit-changes.js';
import { parallel } from './parallel.js';
import type { Beam, Blank, FinishReason, GenerationDelta, GenerationOutput, GenerationRequest, GenerationResult } from './request.js';
import { roomFor, rowLimit, type RowLimit } from './row-limit.js';
import { sampleSpan, type SpanResult } from './sampling.js';
import type { Sequence, Sequences, Strategy } from './strategy.js';

/**
 * Answers a request: fills the first blank of the prompt, puts the tokens into the row, and goes on while the row has a mask of that kind
 * (model-spec section 6, rule 5). Modes other than `fill-blanks` have one blank. Samples go on independently after the prefill of their
 * common first context; with beams the next blank goes on from the best one.
 *
 * A later blank that finds no room in the row stays empty, with finish `length`.
 *
 * @param emit called as text becomes final; with beams once for each blank, at its end
 * @param context given by a caller that has it already: tokenising a long prompt takes a while
 * @throws InvalidRequestError, PromptTooLongError at once, before anything is yielded
 */
export function generate(
  request: GenerationRequest,
  model: PromptModel,
  sequences: Sequences,
  emit: (delta: GenerationDelta) => void,
  context: Context = contextOf(request, model),
): Strategy<GenerationResult> {
  const limit = rowLimit(request, context, model.config);
  const job = { request, model, sequences, emit, context, limit };

  // Every generator in between costs time on every token, and most requests have one sample.
  if (request.beams === null && request.n === 1) return sampleOne(job, 0, null, (filled) => resultOf(job, [filled]));
  return generateAll(job);
}

function* generateAll(job: Job): Strategy<GenerationResult> {
  return resultOf(job, job.request.beams ? [yield* searchAll(job)] : yield* sampleAll(job));
}

function resultOf({ limit }: Job, filled: readonly FilledOutput[]): GenerationResult {
  return {
    outputs: filled.map(({ output }) => output),
    promptTokens: limit.contextLength - 1,
    generatedTokens: filled.reduce((sum, { generatedTokens }) => sum + generatedTokens, 0),
  };
}

/**
 * The context of a request, and what of the request only the model can tell to be wrong.
 * @throws InvalidRequestError
 */
export function contextOf(request: GenerationRequest, model: PromptModel): Context {
  const { vocabSize } = model.config;
  checkIds(request.endTokens ?? [], 'end token', model, 'end_tokens');
  checkIds(request.bannedTokens, 'banned token', model, 'banned_tokens');
  checkIds(
    request.logitBias.map(({ token }) => token),
    'logit bias',
    model,
    'logit_bias',
  );
  for (const prefix of request.beams?.bannedPrefixes ?? []) checkIds(prefix, 'banned prefix', model, 'beam_search.banned_prefixes');
  const longestPadded = Math.ceil(model.config.maxSequenceLength / PADDING_MULTIPLE) * PADDING_MULTIPLE;
  if ((request.beams?.paddedLength ?? 0) > longestPadded) {
    throw new InvalidRequestError(
      `padded_length is ${request.beams!.paddedLength}, rows of this model are padded to ${longestPadded} at most`,
      'beam_search.padded_length',
    );
  }
  const neverDrawn = new Set([...request.bannedTokens, ...(request.minNewTokens > 0 ? (request.endTokens ?? []) : [])]);
  if (neverDrawn.size >= vocabSize)
    throw new InvalidRequestError(`all ${vocabSize} tokens are banned: leave at least one`, 'banned_tokens');
  if (request.sampling.topK > vocabSize) {
    throw new InvalidRequestError(`top_k is ${request.sampling.topK}, the model has ${vocabSize} tokens: use 0 for no limit`, 'top_k');
  }
  if ((request.topLogprobs ?? 0) > vocabSize) {
    throw new InvalidRequestError(`log-probabilities of ${request.topLogprobs} tokens, the model has ${vocabSize}`, 'logprobs');
  }
  if (request.stopStrings.length > 0 && model.tokenizer === null) {
    throw new InvalidRequestError('stop strings need a tokenizer, which this model does not have: use end tokens', 'stop');
  }
  const context = buildContext(request.prompt, request.mode, model);
  if (request.mode === 'gmask' && !context.isMaskAppended) {
    // GenerationTaskDataset asserts it (section 3.2).
    throw new InvalidRequestError(
      'mode gmask continues the prompt, which already has a [gMASK]: leave it out, or use mode fill-blanks',
      'mode',
    );
  }
  return context;
}

/** Evaluation pads its batches to a multiple of this (section 3.2). */
const PADDING_MULTIPLE = 32;

interface Job {
  readonly request: GenerationRequest;
  readonly model: PromptModel;
  readonly sequences: Sequences;
  readonly emit: (delta: GenerationDelta) => void;
  readonly context: Context;
  readonly limit: RowLimit;
}

interface FilledOutput {
  readonly output: GenerationOutput;
  readonly generatedTokens: number;
}

/** `n` samples: one prefill of the first context for all, then each on its own. */
function* sampleAll(job: Job): Strategy<FilledOutput[]> {
  const { request, sequences, context } = job;
  const samples = Array.from({ length: request.n }, (_, sample) => sample);
  const first = blankAt(context.row, job);
  if (roomAt(first, job) === 0) return yield* parallel(samples.map((sample) => sampleOne(job, sample, null, asIs)));
  const forks = yield* sharedPrefill(sequences, first.context, request.n);
  return yield* parallel(samples.map((sample) => sampleOne(job, sample, forks[sample]!, asIs)));
}

function asIs(filled: FilledOutput): FilledOutput {
  return filled;
}

/** One sample through all blanks. @param prefilled holds the first blank's context but for its last token @returns `finish` of it */
function* sampleOne<R>(job: Job, sample: number, prefilled: Sequence | null, finish: (filled: FilledOutput) => R): Strategy<R> {
  const answer = new Answer(job.context, job.model);
  const logitChanges = new LogitChanges(job.request, job.context.row);
  let row = job.context.row;
  let draws = 0;
  while (hasNextBlank(row, answer.blanks.length, job)) {
    const { context, maskPosition } = blankAt(row, job);
    const cached = answer.blanks.length === 0 && prefilled !== null ? context.tokens.length - 1 : 0;
    const span = yield* sampleBlank(job, context, {
      sample,
      blank: answer.blanks.length,
      draws,
      logitChanges,
      sequence: cached > 0 ? prefilled : null,
      cached,
    });
    draws += span.draws;
    row = answer.fill(row, { text: span.text, tokens: span.tokens, maskPosition, finish: span.finish });
  }
  const output = { ...answer.complete(row), finish: lastFinish(row, answer.blanks, job), blanks: answer.blanks, beams: [] };
  return finish({ output, generatedTokens: draws });
}

function* noSpan(): Strategy<SpanResult> {
  return { tokens: [], text: '', finish: 'length', draws: 0 };
}

function sampleBlank(
  job: Job,
  context: BlankContext,
  at: { sample: number; blank: number; draws: number; logitChanges: LogitChanges; sequence: Sequence | null; cached: number },
): Strategy<SpanResult> {
  const { request, model, sequences } = job;
  const maxNewTokens = roomFor(context.tokens.length, job.limit, request.maxNewTokens);
  if (maxNewTokens === 0) return noSpan();
  return sampleSpan(sequences, at.sequence ?? sequences.create(), at.cached, {
    context,
    sampling: request.sampling,
    logitChanges: at.logitChanges,
    endTokens: endTokensOf(job),
    bannedTokens: request.bannedTokens,
    minNewTokens: request.minNewTokens,
    maxNewTokens,
    stopStrings: request.stopStrings,
    topLogprobs: request.topLogprobs,
    seed: request.seed,
    stream: at.sample,
    firstDraw: at.draws,
    tokenizer: model.tokenizer,
    emit: ({ text, tokens }, logprobs) => job.emit({ output: at.sample, blank: at.blank, text, tokens, logprobs }),
  });
}

/**
 * Beams through all blanks. Every beam of a blank is put into the row it was searched from, so the blanks of beams other than the best
 * mix different histories (rule 6).
 */
function* searchAll(job: Job): Strategy<FilledOutput> {
  const answers: Answer[] = [];
  let rows: readonly (readonly number[])[] = [job.context.row];
  let hypotheses: readonly Hypothesis[] = [];
  let steps = 0;
  let generatedTokens = 0;
  for (let blank = 0; hasNextBlank(rows[0]!, blank, job); blank++) {
    const row = rows[0]!;
    const { context, maskPosition } = blankAt(row, job);
    const searched = yield* searchBlank(job, context, steps);
    hypotheses = searched.hypotheses;
    steps += searched.steps;
    generatedTokens += hypotheses[0]!.tokens.length;
    rows = hypotheses.map((hypothesis, i) =>
      (answers[i] ??= new Answer(job.context, job.model)).fill(row, beamBlank(hypothesis, maskPosition, job)),
    );
    emitBlank(job, blank, answers[0]!.blanks.at(-1)!.tokens);
  }
  const completed = rows.map((row, i) => (answers[i] ?? new Answer(job.context, job.model)).complete(row));
  const beams = hypotheses.map(({ score }, i): Beam => {
    const { ids, text } = completed[i]!;
    return { ids, text, blanks: answers[i]!.blanks.map((blank) => blank.text), score };
  });
  const blanks = answers[0]?.blanks ?? [];
  return { output: { ...completed[0]!, finish: lastFinish(rows[0]!, blanks, job), blanks, beams }, generatedTokens };
}

function* searchBlank(job: Job, context: BlankContext, firstStep: number): Strategy<BeamSearchResult> {
  const { request, model, sequences } = job;
  const maxNewTokens = roomFor(context.tokens.length, job.limit, request.maxNewTokens);
  if (maxNewTokens === 0) return { hypotheses: [{ tokens: [], score: 0 }], isDone: false, steps: 0 };
  return yield* beamSearch(sequences, {
    context,
    params: request.beams!,
    endTokens: endTokensOf(job),
    bannedTokens: request.bannedTokens,
    minNewTokens: request.minNewTokens,
    maxNewTokens,
    vocabSize: model.config.vocabSize,
    seed: request.seed,
    firstStep,
  });
}

/** A beam's blank: what it generated, without a trailing end token. */
function beamBlank({ tokens }: Hypothesis, maskPosition: number, job: Job): Blank {
  const isEnded = tokens.length > 0 && endTokensOf(job).includes(tokens.at(-1)!);
  const kept = isEnded ? tokens.slice(0, -1) : tokens;
  return { text: job.model.tokenizer?.detokenize(kept) ?? '', tokens: kept, maskPosition, finish: isEnded ? 'end' : 'length' };
}

/** The whole of a blank that was searched for, in one piece. */
function emitBlank(job: Job, blank: number, tokens: readonly number[]): void {
  const text = new BlankText(job.model.tokenizer, []);
  const parts = [...tokens.map((token) => text.push(token)), text.finish()];
  if (tokens.length > 0) job.emit({ output: 0, blank, text: parts.map((each) => each.text).join(''), tokens, logprobs: null });
}

/** The first mask of the row is filled next. */
function blankAt(row: readonly number[], { context, model }: Job): { context: BlankContext; maskPosition: number } {
  const maskPosition = context.bidirectional ? row.indexOf(context.maskToken) : row.length;
  return { context: blankContext(row, maskPosition, context, model.config.specialTokens.sop), maskPosition };
}

function roomAt(blank: { context: BlankContext }, job: Job): number {
  return roomFor(blank.context.tokens.length, job.limit, job.request.maxNewTokens);
}

function hasNextBlank(row: readonly number[], filled: number, { request, context, limit }: Job): boolean {
  if (filled === 0) return true;
  return request.mode === 'fill-blanks' && filled < limit.maxBlanks && row.includes(context.maskToken);
}

/** A mask that is left over means that the blanks of generated masks reached their limit. */
function lastFinish(row: readonly number[], blanks: readonly Blank[], { request, context }: Job): FinishReason {
  const isLeftOver = request.mode === 'fill-blanks' && row.includes(context.maskToken);
  return isLeftOver ? 'length' : blanks.at(-1)!.finish;
}

function endTokensOf({ request, model }: Job): readonly number[] {
  return request.endTokens ?? [model.config.specialTokens.eop, model.config.specialTokens.eos];
}
