import fc from 'fast-check';
import { afterEach, expect, test } from 'vitest';
import { createLogger } from '../common/log.js';
import { callerNamed, turn } from './fake-job.js';
import { generate } from './generation/blank-filling.js';
import { letterModel, LETTERS, requestOf } from './generation/letter-model.js';
import type { GenerationRequest, GenerationResult, Mode, ScoreRequest, ScoreResult } from './generation/request.js';
import { generationRequirements, scoreRequirements } from './generation/requirements.js';
import { score } from './generation/scoring.js';
import { FakeEngine } from './group/fake-engine.js';
import { DEFAULT_LIMITS } from './limits.js';
import type { Job } from './job.js';
import { ServingLoop } from './serving-loop.js';

/** Real strategies in exactly the memory that they were said to need: nothing may fail, and nothing may come out otherwise. */

const { vocabSize, mask, gmask, smask, eop, eos } = LETTERS;
const BLOCK_SIZE = 4;
const open: ServingLoop[] = [];

afterEach(async () => {
  await Promise.all(open.splice(0).map((loop) => loop.close()));
});

function start(kvBlocks: number, options: { lostSteps?: readonly number[]; contextCacheBlocks?: number; stepTokens?: number } = {}) {
  const { lostSteps = [], contextCacheBlocks = kvBlocks, stepTokens = 24 } = options;
  const engine = new FakeEngine({ kvBlocks, blockSize: BLOCK_SIZE, maxBatchTokens: 128, vocabSize, lostSteps: new Set(lostSteps) });
  const limits = { ...DEFAULT_LIMITS, stepTokens, maxBatchTokens: 128, maxExtends: 16, contextCacheBlocks };
  const loop = new ServingLoop(engine, limits, createLogger('test', 'silent'));
  open.push(loop);
  return { loop, engine };
}

const anyGeneration: fc.Arbitrary<GenerationRequest> = fc
  .record({
    parts: fc.array(fc.constantFrom('a', 'bcd', 'efghij', 'abcabcabcabc', '[MASK]', '[gMASK]', '[sMASK]'), { maxLength: 6 }),
    mode: fc.constantFrom<Mode>('fill-blanks', 'fill-blanks', 'mask', 'gmask', 'unidirectional'),
    maxNewTokens: fc.constantFrom(null, 1, 3, 7, 12),
    maxRowTokens: fc.constantFrom(null, 33, 60),
    n: fc.integer({ min: 1, max: 4 }),
    numBeams: fc.constantFrom(0, 0, 1, 3),
    bannedTokens: fc.constantFrom([], [mask, gmask, smask], [mask, gmask, smask, eop, eos]),
    seed: fc.bigInt({ min: 0n, max: 99n }),
  })
  .map(({ parts, mode, n, numBeams, ...rest }) => {
    const text = mode === 'unidirectional' || mode === 'gmask' ? parts.filter((part) => !part.includes('MASK')).join('') : parts.join('');
    const beams =
      numBeams === 0
        ? null
        : { numBeams, lengthPenalty: 1, noRepeatNgramSize: 0, deterministic: true, considerEnd: true, bannedPrefixes: [] };
    return requestOf(text, { mode, n: beams ? 1 : n, beams, sampling: { temperature: 1, topK: 0, topP: 0 }, ...rest });
  })
  .filter((request) => {
    try {
      return generationRequirements(request, letterModel, BLOCK_SIZE).blocks > 0;
    } catch {
      return false; // a prompt that is too long
    }
  });

const anyScoring: fc.Arbitrary<ScoreRequest> = fc
  .record({
    text: fc.string({ unit: fc.constantFrom('a', 'b'), minLength: 1, maxLength: 30 }),
    choices: fc.array(fc.string({ unit: fc.constantFrom('a', 'b', 'c'), minLength: 1, maxLength: 9 }), { minLength: 1, maxLength: 5 }),
  })
  .map(({ text, choices }) => ({
    prompt: { kind: 'text', text },
    mode: 'mask',
    choices: choices.map((choice) => ({ kind: 'text', text: choice })),
  }));

type Asked = { readonly generation: GenerationRequest } | { readonly scoring: ScoreRequest };
const anyAsked: fc.Arbitrary<Asked> = fc.oneof(
  { weight: 4, arbitrary: anyGeneration.map((generation) => ({ generation })) },
  { weight: 1, arbitrary: anyScoring.map((scoring) => ({ scoring })) },
);

let nextRequest = 1;

function jobOf(asked: Asked, changes: Partial<Job<unknown>> = {}): Job<GenerationResult | ScoreResult> {
  const common = {
    requestId: `request-${nextRequest++}`,
    caller: callerNamed(''),
    priority: 0,
    timeoutMs: null,
    promptTokens: 1,
    maxBlocks: blocksOf(asked),
    ...changes,
  };
  if ('scoring' in asked) {
    return { ...common, maxSequences: asked.scoring.choices.length, start: (sequences) => score(asked.scoring, letterModel, sequences) };
  }
  const { generation } = asked;
  return {
    ...common,
    maxSequences: generation.beams?.numBeams ?? generation.n,
    start: (sequences) => generate(generation, letterModel, sequences, () => {}),
  };
}

function blocksOf(asked: Asked): number {
  return 'scoring' in asked
    ? scoreRequirements(asked.scoring, letterModel, BLOCK_SIZE).blocks
    : generationRequirements(asked.generation, letterModel, BLOCK_SIZE).blocks;
}

async function plenty(asked: Asked): Promise<unknown> {
  const { loop } = start(4096, { contextCacheBlocks: 0, stepTokens: 128 });
  return (await loop.submit(jobOf(asked)).done).value;
}

function expectNothingLeft(loop: ServingLoop): void {
  const { kv, running, queued } = loop.snapshot();
  expect({ running, queued, used: kv.usedBlocks }).toEqual({ running: 0, queued: 0, used: 0 });
  expect(kv.freeBlocks + kv.cachedBlocks).toBe(kv.totalBlocks);
}

// Far enough apart for the longest run to go through its layers.
const lost = fc.uniqueArray(
  fc.integer({ min: 0, max: 9 }).map((i) => 9 * i + 2),
  { maxLength: 4 },
);

test('every request ends alone in exactly the memory that it was said to need, also from a cached context', async () => {
  let hits = 0;
  await fc.assert(
    fc.asyncProperty(anyAsked, fc.constantFrom(24, 128), async (asked, stepTokens) => {
      const expected = await plenty(asked);
      const { loop } = start(blocksOf(asked), { stepTokens });
      for (let i = 0; i < 2; i++) expect((await loop.submit(jobOf(asked)).done).value).toEqual(expected);
      expectNothingLeft(loop);
      hits += loop.snapshot().contextCache.hits;
    }),
    { numRuns: 150 },
  );
  expect(hits).toBeGreaterThan(10);
});

test('and after epochs that were lost', async () => {
  await fc.assert(
    fc.asyncProperty(anyAsked, lost, async (asked, lostSteps) => {
      const { loop } = start(blocksOf(asked), { lostSteps });
      for (let i = 0; i < 2; i++) expect((await loop.submit(jobOf(asked)).done).value).toEqual(await plenty(asked));
      expectNothingLeft(loop);
    }),
    { numRuns: 150 },
  );
});

test('requests that do not fit beside each other take turns, and give what they give alone', async () => {
  const seen = { preemptions: 0, hits: 0 };
  await fc.assert(
    fc.asyncProperty(
      fc.array(
        fc.record({ asked: anyAsked, priority: fc.constantFrom(0, 0, 1), key: fc.constantFrom('a', 'b'), delay: fc.nat({ max: 9 }) }),
        {
          minLength: 2,
          maxLength: 5,
        },
      ),
      fc.oneof({ weight: 2, arbitrary: fc.constant([]) }, { weight: 1, arbitrary: lost }),
      fc.boolean(),
      fc.constantFrom(1, 1.5),
      async (all, lostSteps, areSame, room) => {
        const requests = areSame ? all.map((each) => ({ ...each, asked: all[0]!.asked })) : all;
        const { loop } = start(Math.ceil(room * Math.max(...requests.map(({ asked }) => blocksOf(asked)))), { lostSteps });
        const answers = await Promise.all(
          requests.map(async ({ asked, priority, key, delay }) => {
            for (let i = 0; i < delay; i++) await turn();
            return (await loop.submit(jobOf(asked, { priority, caller: callerNamed(key) })).done).value;
          }),
        );
        for (const [i, answer] of answers.entries()) expect(answer).toEqual(await plenty(requests[i]!.asked));
        expectNothingLeft(loop);
        seen.preemptions += loop.snapshot().preemptions;
        seen.hits += loop.snapshot().contextCache.hits;
      },
    ),
    { numRuns: 200 },
  );
  expect(seen.preemptions).toBeGreaterThan(0);
  expect(seen.hits).toBeGreaterThan(0);
});
