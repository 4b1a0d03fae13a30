import type { BlankContext } from '../../model/tokenizer/blank-context.js';
import { prefill } from './prefill.js';
import type { BeamParams } from './request.js';
import type { ExtendOp, ExtendResult, Sequence, Sequences, Strategy, Want } from './strategy.js';

export interface BeamSearch {
  readonly context: BlankContext;
  readonly params: BeamParams;
  readonly endTokens: readonly number[];
  readonly bannedTokens: readonly number[];
  /** min_gen_length */
  readonly minNewTokens: number;
  /** At least 1. */
  readonly maxNewTokens: number;
  readonly vocabSize: number;
  readonly seed: bigint;
  /** Steps of earlier blanks of the request: no noise is used twice. */
  readonly firstStep: number;
}

export interface BeamSearchResult {
  /** Best first; at most `numBeams` (fewer only where the vocabulary gives no more). */
  readonly hypotheses: readonly Hypothesis[];
  /** Stopped because no running beam could become better, not by length. */
  readonly isDone: boolean;
  readonly steps: number;
}

export interface Hypothesis {
  /** Generated tokens, an end token at the end included. */
  readonly tokens: readonly number[];
  /** Penalised log-probability. */
  readonly score: number;
}

/**
 * Beam search as BeamSearchStrategy does it (model-spec section 5; the numbers in the comments are its steps). Sums and scores are float32,
 * as there. Where torch.topk leaves the order of equal totals open, the lower beam and then the lower token come first.
 *
 * Releases all its sequences but has none at its end.
 */
export function* beamSearch(sequences: Sequences, search: BeamSearch): Strategy<BeamSearchResult> {
  const { context, params, endTokens, maxNewTokens } = search;
  const rowStart = paddedRow(context, params);
  const finished: Hypothesis[] = [];
  let beams: readonly Beam[] = [{ sequence: sequences.create(), tokens: [], total: 0 }];
  let isDone = false;
  let step = 0; // g

  while (!isDone && step < maxNewTokens) {
    const results: readonly ExtendResult[] = yield beams.map((beam, i) => extendBeam(beam, i, step, search, rowStart));
    const candidates = bestCandidates(beams, results, search);
    const length = rowStart.length + step; // `len`: before this step

    // 5: end tokens finish rows, others continue them, until numBeams are continued; what comes later is dropped.
    const continued: Candidate[] = [];
    for (const candidate of candidates) {
      if (endTokens.includes(candidate.token)) {
        const tokens = [...beams[candidate.beam]!.tokens, candidate.token];
        insertFinished(finished, { tokens, score: penalised(candidate.total, length + 1, params) }, params.numBeams);
      } else if (continued.length < params.numBeams) continued.push(candidate);
      else break;
    }
    step += 1; // 7
    const best = continued[0];
    const worst = finished[params.numBeams - 1];
    isDone = best === undefined || (worst !== undefined && worst.score >= penalised(best.total, length + 1, params));
    beams = continueBeams(sequences, beams, continued, !isDone && step < maxNewTokens);
  }

  const running = beams.map(({ tokens, total }) => ({ tokens, score: penalised(total, rowStart.length + step, params) }));
  if (!params.considerEnd && running.length > 0) return { hypotheses: running, isDone, steps: step };
  if (!isDone) for (const hypothesis of running) insertFinished(finished, hypothesis, params.numBeams);
  return { hypotheses: finished, isDone, steps: step };
}

/** A running row. */
interface Beam {
  /** Null after the last step: nothing is extended any more. */
  readonly sequence: Sequence | null;
  readonly tokens: readonly number[];
  /** Sum of its log-probabilities, float32. */
  readonly total: number;
}

interface Candidate {
  readonly beam: number;
  readonly token: number;
  readonly total: number;
  /** What candidates are chosen by: the total, or the total plus noise. */
  readonly key: number;
}

/** The context with the pads that evaluation leaves in the row (section 3.2): they change `len` and the n-grams, but no logits. */
function paddedRow(context: BlankContext, params: BeamParams): readonly number[] {
  const pads = Math.max(0, (params.paddedLength ?? 0) - context.tokens.length);
  return [...context.tokens, ...new Array<number>(pads).fill(0)];
}

/** 4: (max(1, end tokens) + 1) * numBeams, so that numBeams of them continue even if each beam offers every end token. */
function candidateCount({ endTokens, params }: BeamSearch): number {
  return (Math.max(1, endTokens.length) + 1) * params.numBeams;
}

/** The Extend of one beam: the whole context at first, then its newest token. */
function extendBeam(beam: Beam, index: number, step: number, search: BeamSearch, rowStart: readonly number[]): ExtendOp {
  const noise = search.params.deterministic ? null : { seed: search.seed, stream: index, position: search.firstStep + step };
  const bannedTokens = bannedNow(beam, step, search, rowStart);
  const want: Want = { kind: 'candidates', count: Math.min(search.vocabSize, candidateCount(search)), bannedTokens, noise };
  if (step === 0) return prefill(beam.sequence!, search.context, want);
  const tokens = [beam.tokens.at(-1)!];
  return { sequence: beam.sequence!, tokens, positions: [search.context.positionOf(step - 1)], bidirectionalTokens: 0, want };
}

/** 1, 2 and the LAMBADA variant. */
function bannedNow(beam: Beam, step: number, search: BeamSearch, rowStart: readonly number[]): number[] {
  const banned = new Set(search.bannedTokens);
  if (step < search.minNewTokens) for (const token of search.endTokens) banned.add(token);
  for (const token of repeatedNgramTokens(rowStart, beam.tokens, search.params.noRepeatNgramSize)) banned.add(token);
  for (const prefix of search.params.bannedPrefixes) {
    const isBegun = step === prefix.length - 1 && prefix.slice(0, -1).every((token, i) => token === beam.tokens[i]);
    if (isBegun) banned.add(prefix.at(-1)!);
  }
  return [...banned];
}

/**
 * 2 and 6: tokens that would repeat an n-gram of the row which ends in a generated token, that is which does not lie wholly in the
 * context. n = 1 bans nothing, as in the original.
 */
function repeatedNgramTokens(rowStart: readonly number[], generated: readonly number[], n: number): number[] {
  const row = [...rowStart, ...generated];
  if (n < 2 || row.length <= n) return [];
  const prefix = row.slice(row.length - (n - 1));
  const repeated: number[] = [];
  for (let end = Math.max(rowStart.length, n - 1); end < row.length; end++) {
    if (prefix.every((token, i) => token === row[end - (n - 1) + i])) repeated.push(row[end]!);
  }
  return repeated;
}

/**
 * 3 and 4: the K best of all beams, in the order of their totals. Each beam's own K best hold them all. With noise, the keys
 * are Gumbel ones: the K largest of (log-probability + noise) are draws without replacement from the softmax of the totals.
 */
function bestCandidates(beams: readonly Beam[], results: readonly ExtendResult[], search: BeamSearch): Candidate[] {
  const candidates = results.flatMap((result, beam) => {
    if (result.kind !== 'candidates') throw new Error(`an Extend that wanted candidates gave ${result.kind}`);
    const previous = beams[beam]!.total;
    return Array.from(result.tokens, (token, i) => {
      const total = Math.fround(previous + result.logprobs[i]!);
      return { beam, token, total, key: search.params.deterministic ? total : previous + result.keys[i]! };
    });
  });
  const flatOrder = (a: Candidate, b: Candidate): number => a.beam - b.beam || a.token - b.token;
  return candidates
    .sort((a, b) => b.key - a.key || flatOrder(a, b))
    .slice(0, candidateCount(search))
    .sort((a, b) => b.total - a.total || flatOrder(a, b));
}

/** A finished row goes before the first one that is not better; only the best numBeams are kept. */
function insertFinished(finished: Hypothesis[], hypothesis: Hypothesis, numBeams: number): void {
  const at = finished.findIndex(({ score }) => score <= hypothesis.score);
  finished.splice(at < 0 ? finished.length : at, 0, hypothesis);
  finished.splice(numBeams);
}

/** total / ((5 + length) / 6) ^ lengthPenalty; `length` counts context, pads and end token. */
function penalised(total: number, length: number, { lengthPenalty }: BeamParams): number {
  return Math.fround(total / Math.fround(((5 + length) / 6) ** lengthPenalty));
}

/** The next beams: every child but a parent's last gets a fork, the last takes the parent's sequence over. */
function continueBeams(sequences: Sequences, parents: readonly Beam[], continued: readonly Candidate[], goesOn: boolean): Beam[] {
  const children = parents.map(() => 0);
  if (goesOn) for (const { beam } of continued) children[beam]! += 1;
  parents.forEach(({ sequence }, i) => {
    if (children[i] === 0) sequences.release(sequence!);
  });
  return continued.map(({ beam, token, total }) => {
    const parent = parents[beam]!;
    const isLastChild = goesOn && --children[beam]! === 0;
    const sequence = !goesOn ? null : isLastChild ? parent.sequence : sequences.fork(parent.sequence!);
    return { sequence, tokens: [...parent.tokens, token], total };
  });
}
