import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { beamSearch, type BeamSearch } from './beam-search.js';
import type { BlankContext } from '../../model/tokenizer/blank-context.js';
import { FakeModel } from './fake-model.js';

const VOCAB = 12;

function contextOf(row: readonly number[], isAtMask: boolean): BlankContext {
  const tokens = [...row, 11];
  const positions = tokens.map((_, i) => (isAtMask && i === row.length ? 0 : i));
  return { tokens, positions, bidirectionalTokens: row.length, positionOf: (i) => (isAtMask ? 0 : tokens.length + i) };
}

function searchOf(changes: Omit<Partial<BeamSearch>, 'params'> & { params?: Partial<BeamSearch['params']> } = {}): BeamSearch {
  const { params, ...rest } = changes;
  return {
    context: contextOf([3, 1, 4], false),
    endTokens: [0, 2],
    bannedTokens: [],
    minNewTokens: 0,
    maxNewTokens: 8,
    vocabSize: VOCAB,
    seed: 7n,
    firstStep: 0,
    ...rest,
    params: { numBeams: 3, lengthPenalty: 1, noRepeatNgramSize: 0, deterministic: true, considerEnd: true, bannedPrefixes: [], ...params },
  };
}

interface Row {
  tokens: number[];
  prev: number;
  bans: Map<string, number[]>;
}

/** Model-spec section 5 line by line, on full logits of whole rows, for deterministic search. */
function transcribed(
  search: BeamSearch,
  model: FakeModel,
): { hypotheses: { tokens: number[]; score: number }[]; isDone: boolean; steps: number } {
  const { context, params, endTokens } = search;
  const { numBeams, noRepeatNgramSize: n } = params;
  const start = [...context.tokens, ...Array<number>(Math.max(0, (params.paddedLength ?? 0) - context.tokens.length)).fill(0)];
  const penalise = (total: number, length: number): number => total / ((5 + length) / 6) ** params.lengthPenalty;
  let running: Row[] = [{ tokens: start, prev: 0, bans: new Map() }];
  const ended: { tokens: number[]; score: number }[] = [];
  const addEnded = (tokens: number[], score: number): void => {
    let i = ended.length;
    while (i > 0 && !(score < ended[i - 1]!.score)) i--;
    ended.splice(i, 0, { tokens: tokens.slice(start.length), score });
    if (ended.length > numBeams) ended.pop();
  };
  let g = 0;
  let done = false;
  while (!done && g < search.maxNewTokens) {
    const len = running[0]!.tokens.length;
    const flat: { beam: number; token: number; total: number }[] = [];
    running.forEach((row, beam) => {
      const logits = logitsOf(row.tokens.slice(start.length), context, model);
      for (const token of search.bannedTokens) logits[token] = -65504;
      for (const prefix of params.bannedPrefixes) {
        if (g !== prefix.length - 1) continue;
        if (prefix.length === 1 || row.tokens.slice(-(prefix.length - 1)).join() === prefix.slice(0, -1).join())
          logits[prefix.at(-1)!] = -65504;
      }
      if (g < search.minNewTokens) for (const token of endTokens) logits[token] = -65504;
      if (n > 1 && len > n) for (const token of row.bans.get(row.tokens.slice(-(n - 1)).join()) ?? []) logits[token] = -65504;
      const max = Math.max(...logits);
      const logSum = max + Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit - max), 0));
      logits.forEach((logit, token) => flat.push({ beam, token, total: Math.fround(row.prev + Math.fround(logit - logSum)) }));
    });
    flat.sort((a, b) => b.total - a.total);
    const next: Row[] = [];
    for (const { beam, token, total } of flat.slice(0, (Math.max(1, endTokens.length) + 1) * numBeams)) {
      const parent = running[beam]!;
      const tokens = [...parent.tokens, token];
      if (endTokens.includes(token)) addEnded(tokens, penalise(total, tokens.length));
      else if (next.length < numBeams) {
        const bans = new Map(parent.bans);
        const key = parent.tokens.slice(-(n - 1)).join();
        if (n > 1) bans.set(key, [...(bans.get(key) ?? []), token]);
        next.push({ tokens, prev: total, bans });
      } else break;
    }
    running = next;
    g += 1;
    done = ended.length === numBeams && ended.at(-1)!.score >= penalise(Math.max(...next.map(({ prev }) => prev)), len + 1);
  }
  if (!params.considerEnd) {
    const rows = running.map(({ tokens, prev }) => ({ tokens: tokens.slice(start.length), score: penalise(prev, tokens.length) }));
    return { hypotheses: rows, isDone: done, steps: g };
  }
  if (!done) for (const { tokens, prev } of running) addEnded(tokens, penalise(prev, tokens.length));
  return { hypotheses: ended, isDone: done, steps: g };
}

/** Logits after a context and generated tokens, computed from nothing. */
function logitsOf(generated: readonly number[], context: BlankContext, model: FakeModel): Float32Array {
  const sequence = model.create();
  const result = model.execute({
    sequence,
    tokens: [...context.tokens, ...generated],
    positions: [...context.positions, ...generated.map((_, i) => context.positionOf(i))],
    bidirectionalTokens: context.bidirectionalTokens,
    want: { kind: 'logits', rows: 1 },
  });
  model.release(sequence);
  if (result.kind !== 'logits') throw new Error('no logits');
  return result.logits;
}

const anySearch = fc.record({
  salt: fc.nat(1000),
  row: fc.array(fc.integer({ min: 3, max: 10 }), { minLength: 1, maxLength: 6 }),
  isAtMask: fc.boolean(),
  numBeams: fc.integer({ min: 1, max: 5 }),
  lengthPenalty: fc.constantFrom(0, 0.7, 1, 2, -1),
  noRepeatNgramSize: fc.integer({ min: 0, max: 4 }),
  considerEnd: fc.boolean(),
  endTokens: fc.constantFrom([], [0], [0, 2], [5, 7, 9]),
  bannedTokens: fc.constantFrom([], [4], [6, 8]),
  bannedPrefixes: fc.constantFrom(
    [],
    [[3]],
    [[3], [4, 5], [4, 4], [6, 7, 8]],
    [
      [1, 1],
      [1, 3],
      [7, 1, 3],
    ],
  ),
  minNewTokens: fc.integer({ min: 0, max: 3 }),
  maxNewTokens: fc.integer({ min: 1, max: 9 }),
  paddedLength: fc.constantFrom(undefined, 4, 16),
});

describe('deterministic search', () => {
  test('is the transcription of the original on full logits', () => {
    let finishedEarly = 0;
    fc.assert(
      fc.property(anySearch, ({ salt, row, isAtMask, endTokens, bannedTokens, minNewTokens, maxNewTokens, paddedLength, ...params }) => {
        const search = searchOf({
          context: contextOf(row, isAtMask),
          endTokens,
          bannedTokens,
          minNewTokens,
          maxNewTokens,
          params: { ...params, ...(paddedLength === undefined ? {} : { paddedLength }) },
        });
        const model = new FakeModel(VOCAB, 4, salt);
        const result = model.run(beamSearch(model, search));
        const expected = transcribed(search, new FakeModel(VOCAB, 4, salt));
        expect(result.hypotheses.map(({ tokens }) => tokens)).toEqual(expected.hypotheses.map(({ tokens }) => tokens));
        for (const [i, { score }] of result.hypotheses.entries()) expect(score).toBeCloseTo(expected.hypotheses[i]!.score, 5);
        expect([result.isDone, result.steps]).toEqual([expected.isDone, expected.steps]);
        expect(model.liveSequences).toBe(0);
        if (result.isDone) finishedEarly++;
      }),
      { seed: 11, numRuns: 400 },
    );
    expect(finishedEarly).toBeGreaterThan(20); // both ends are met
  });

  test('gives as many hypotheses as beams, best first', () => {
    const model = new FakeModel(VOCAB);
    const { hypotheses } = model.run(beamSearch(model, searchOf({ params: { numBeams: 4 } })));
    expect(hypotheses).toHaveLength(4);
    expect(hypotheses.map(({ score }) => score)).toEqual(hypotheses.map(({ score }) => score).sort((a, b) => b - a));
  });

  test('extends each running beam by one token and holds no more sequences than beams', () => {
    const model = new FakeModel(VOCAB);
    model.run(beamSearch(model, searchOf({ endTokens: [], params: { numBeams: 3 } })));
    expect(model.ops.map(({ tokens }) => tokens.length)).toEqual([4, ...Array<number>(7 * 3).fill(1)]); // the last tokens are never extended
    expect(model.ops[1]!.positions).toEqual([4]);
    expect(new Set(model.ops.map(({ want }) => want.kind === 'candidates' && want.count))).toEqual(new Set([6]));
  });
});

describe('stochastic search', () => {
  const stochastic = { deterministic: false, numBeams: 2 };

  test('depends on the seed alone', () => {
    const run = (seed: bigint, firstStep = 0): unknown => {
      const model = new FakeModel(300); // enough tokens of like probability
      return model.run(beamSearch(model, searchOf({ vocabSize: 300, seed, firstStep, params: stochastic })));
    };
    expect(run(1n)).toEqual(run(1n));
    const seeds = Array.from({ length: 30 }, (_, i) => BigInt(i));
    expect(new Set(seeds.map((seed) => JSON.stringify(run(seed)))).size).toBeGreaterThan(3);
    expect(new Set(seeds.map((seed) => JSON.stringify(run(1n, Number(seed))))).size).toBeGreaterThan(3);
  });

  test('keys its noise by beam and step', () => {
    const model = new FakeModel(VOCAB);
    model.run(beamSearch(model, searchOf({ endTokens: [], maxNewTokens: 3, firstStep: 10, params: stochastic })));
    const noise = model.ops.map(({ want }) => (want.kind === 'candidates' && want.noise ? [want.noise.stream, want.noise.position] : null));
    expect(noise).toEqual([[0, 10], [0, 11], [1, 11], [0, 12], [1, 12]]); // prettier-ignore
  });

  test('draws the first token of the best beam as often as drawing without replacement does', () => {
    // One beam, no end token, one step: two candidates are drawn without replacement, and the likelier one is kept.
    const model = new FakeModel(VOCAB);
    const p = Array.from(softmax(logitsOf([], searchOf().context, model)));
    const expected = p.map((pi, i) =>
      p.reduce((sum, pj, j) => (j === i || pj > pi ? sum : sum + pi * (pj / (1 - pi)) + pj * (pi / (1 - pj))), 0),
    );
    const runs = 4000;
    const counts = Array<number>(VOCAB).fill(0);
    for (let seed = 0; seed < runs; seed++) {
      const { hypotheses } = model.run(
        beamSearch(model, searchOf({ seed: BigInt(seed), endTokens: [], maxNewTokens: 1, params: { deterministic: false, numBeams: 1 } })),
      );
      counts[hypotheses[0]!.tokens[0]!]! += 1;
    }
    for (const [i, share] of expected.entries()) {
      const sigma = Math.sqrt((share * (1 - share)) / runs);
      expect(Math.abs(counts[i]! / runs - share)).toBeLessThan(5 * sigma + 1e-3);
    }
  });
});

function softmax(logits: Float32Array): Float32Array {
  const max = Math.max(...logits);
  const sum = logits.reduce((total, logit) => total + Math.exp(logit - max), 0);
  return logits.map((logit) => Math.exp(logit - max) / sum);
}
