import { afterEach, expect, test } from 'vitest';
import { EngineError } from '../common/errors.js';
import { createLogger } from '../common/log.js';
import { BLOCK_SIZE, callerNamed, fakeJob, type Shape, wantedSample, turn, turnsUntil } from './fake-job.js';
import type { Sequences, Strategy } from './generation/strategy.js';
import { EpochEndedError, type EngineStep, type EngineStepResult } from './group/engine.js';
import { FakeEngine } from './group/fake-engine.js';
import { DEFAULT_LIMITS } from './limits.js';
import type { Job, Ticket } from './job.js';
import { ServingLoop } from './serving-loop.js';

/** What is preempted, lost or fails at the worst moment. */

const log = createLogger('test', 'silent');
const limits = { ...DEFAULT_LIMITS, stepTokens: 24, maxBatchTokens: 128, maxExtends: 16, contextCacheBlocks: 64 };
const open: ServingLoop[] = [];

afterEach(async () => {
  await Promise.all(open.splice(0).map((loop) => loop.close()));
});

/** Looks at every step before it runs, and may throw instead. */
class WatchedEngine extends FakeEngine {
  /** Steps asked for, from 1. */
  asked = 0;
  watch: (step: EngineStep, number: number) => void = () => {};

  override async step(step: EngineStep): Promise<EngineStepResult> {
    this.asked += 1;
    try {
      this.watch(step, this.asked);
    } catch (error) {
      await turn();
      throw error;
    }
    return super.step(step);
  }
}

function start(kvBlocks = 256, changes: Partial<typeof limits> = {}): { loop: ServingLoop; engine: WatchedEngine } {
  const engine = new WatchedEngine({ kvBlocks, blockSize: BLOCK_SIZE, maxBatchTokens: 128, vocabSize: 997, numLayers: 8 });
  const loop = new ServingLoop(engine, { ...limits, ...changes }, log);
  open.push(loop);
  return { loop, engine };
}

async function alone(shape: Shape, seed: number): Promise<number[][]> {
  return (await start().loop.submit(fakeJob(shape, seed)).done).value;
}

function expectNothingLeft(loop: ServingLoop): void {
  const { kv, running, queued } = loop.snapshot();
  expect({ running, queued, used: kv.usedBlocks }).toEqual({ running: 0, queued: 0, used: 0 });
  expect(kv.freeBlocks + kv.cachedBlocks).toBe(kv.totalBlocks);
}

const isSliced = ({ extends: all }: EngineStep): boolean => all.some(({ firstLayer }) => firstLayer > 0);

test.each(['loss', 'preemption'])(
  'a run broken off by a %s can start from the context that another one has computed meanwhile',
  async (how) => {
    const { loop, engine } = start(40);
    const shape = { prompt: 60, newTokens: 3, samples: 1 };
    const exact = { maxBlocks: 17, caller: callerNamed('a') };
    const first = loop.submit(fakeJob(shape, 5, exact));
    const second = await new Promise<Ticket<number[][]>>((resolve) => {
      engine.watch = (step) => {
        if (!isSliced(step)) return;
        engine.watch = () => {};
        // Of higher priority, so the same context is computed for this one first.
        resolve(loop.submit(fakeJob(shape, 5, { ...exact, priority: 1 })));
        if (how === 'loss') throw new EpochEndedError('rank 0 was lost');
        const large = { prompt: 90, newTokens: 2, samples: 1 };
        loop.submit(fakeJob(large, 9, { maxBlocks: 40, priority: 2, caller: callerNamed('b') })); // takes the memory
      };
    });
    const expected = await alone(shape, 5);
    expect((await first.done).value).toEqual(expected);
    expect((await second.done).value).toEqual(expected);
    expect(loop.snapshot()).toMatchObject({ preemptions: how === 'loss' ? 0 : 1, contextCache: { hits: 1 } });
    expectNothingLeft(loop);
  },
);

test.each(['cancelled', 'lost', 'preempted'])('a sliced run that is %s between two slices leaves nothing behind', async (how) => {
  const { loop, engine } = start(how === 'preempted' ? 36 : 256);
  const shape = { prompt: 80, newTokens: 4, samples: 2 };
  const sliced = loop.submit(fakeJob(shape, 1, { maxBlocks: 24 }));
  const beside = loop.submit(fakeJob({ prompt: 6, newTokens: 30, samples: 1 }, 2));
  await turnsUntil(() => engine.history.some((all) => isSliced({ blockCopies: [], extends: all })));
  if (how === 'cancelled') {
    sliced.cancel();
    await expect(sliced.done).rejects.toThrow('cancelled');
  } else if (how === 'lost') {
    engine.watch = () => {
      engine.watch = () => {};
      throw new EpochEndedError('rank 0 was lost');
    };
  } else {
    await loop.submit(fakeJob({ prompt: 60, newTokens: 3, samples: 1 }, 3, { maxBlocks: 18, priority: 1 })).done;
    expect(loop.snapshot().preemptions).toBeGreaterThan(0);
  }
  if (how !== 'cancelled') expect((await sliced.done).value).toEqual(await alone(shape, 1));
  // Another sliced run begins at its first layer.
  expect((await loop.submit(fakeJob(shape, 4, { maxBlocks: 24 })).done).value).toEqual(await alone(shape, 4));
  expect((await beside.done).value).toEqual(await alone({ prompt: 6, newTokens: 30, samples: 1 }, 2));
  expectNothingLeft(loop);
});

test('a run that ends every epoch in its later layers fails, and the others go on', async () => {
  const { loop, engine } = start();
  engine.watch = (step) => {
    if (step.extends.some(({ tokens, firstLayer }) => tokens.length === 61 && firstLayer > 0)) throw new EpochEndedError('rank 1: gone');
  };
  const before = loop.submit(fakeJob({ prompt: 5, newTokens: 40, samples: 2 }, 1));
  const poison = loop.submit(fakeJob({ prompt: 61, newTokens: 3, samples: 1 }, 2));
  await expect(poison.done).rejects.toThrow("the workers were lost 3 times in this request's steps, last: rank 1: gone");
  expect((await before.done).value).toEqual(await alone({ prompt: 5, newTokens: 40, samples: 2 }, 1));
  expectNothingLeft(loop);
});

test('a request that runs alone under suspicion gets the blocks of the others, and nobody fails for it', async () => {
  // 24 blocks: both grow to 15.
  const { loop, engine } = start(24);
  const shape = { prompt: 20, newTokens: 40, samples: 1 };
  const tickets = [1, 2].map((seed) => loop.submit(fakeJob(shape, seed, { maxBlocks: 16 })));
  let losses = 0;
  engine.watch = () => {
    const { kv, running } = loop.snapshot();
    if (losses > 0 ? losses < 2 : running === 2 && kv.freeBlocks === 0) {
      losses += 1;
      throw new EpochEndedError('rank 0 was lost');
    }
  };
  for (const [i, { done }] of tickets.entries()) expect((await done).value).toEqual(await alone(shape, i + 1));
  expect(losses).toBe(2);
  expectNothingLeft(loop);
});

/** A prompt of whole blocks, that others can start from, and one more token in one run, as strategies with one sample do it. */
function sampledJob(prompt: number, seed: number): Job<number[]> {
  function* strategy(sequences: Sequences): Strategy<number[]> {
    const sequence = sequences.create();
    const tokens: number[] = [];
    const want = (position: number) => wantedSample(seed, 0, position);
    const row = Array.from({ length: prompt + 1 }, (_, i) => (seed * 31 + i * 7) % 997);
    let [result] = yield [{ sequence, tokens: row, positions: row.map((_, i) => i), bidirectionalTokens: prompt, want: want(0) }];
    for (;;) {
      if (result?.kind !== 'sample') throw new Error(`got ${result?.kind}`);
      tokens.push(result.token);
      if (tokens.length === 3) return tokens;
      const position = prompt + tokens.length;
      [result] = yield [{ sequence, tokens: tokens.slice(-1), positions: [position], bidirectionalTokens: 0, want: want(tokens.length) }];
    }
  }
  const base = fakeJob({ prompt, newTokens: 3, samples: 1 }, seed);
  return { ...base, maxBlocks: Math.ceil((prompt + 3) / BLOCK_SIZE), maxSequences: 1, start: strategy };
}

test('blocks of a context that only the cache holds are not counted as free for somebody else, too', async () => {
  const { loop } = start(40, { stepTokens: 128 });
  const expected = (await loop.submit(sampledJob(64, 1)).done).value;
  expect(loop.snapshot().kv.cachedBlocks).toBe(16);
  // The one takes over 16 and needs 1 more, the other one needs 25.
  const tickets = [loop.submit(sampledJob(64, 1)), loop.submit(sampledJob(96, 2))];
  expect((await tickets[0]!.done).value).toEqual(expected);
  expect((await tickets[1]!.done).value).toEqual((await start().loop.submit(sampledJob(96, 2)).done).value);
  expectNothingLeft(loop);
});

test('a run whose context had to make room for another run of the step comes later, as a run of all its tokens', async () => {
  const { loop, engine } = start(60, { stepTokens: 128 });
  const expected = (await loop.submit(sampledJob(64, 1)).done).value;
  await loop.submit(sampledJob(64, 2)).done;
  expect(loop.snapshot().kv).toMatchObject({ cachedBlocks: 32, freeBlocks: 28 });
  engine.history.length = 0;
  // 30 blocks: the oldest of the contexts goes, which the other one was to start from.
  const large = loop.submit(sampledJob(119, 3));
  const again = loop.submit(sampledJob(64, 1));
  expect((await again.done).value).toEqual(expected);
  expect((await large.done).value).toEqual((await start().loop.submit(sampledJob(119, 3)).done).value);
  expect(engine.history.slice(0, 2).map((all) => all.map(({ tokens }) => tokens.length))).toEqual([[120], [1, 65]]);
  expectNothingLeft(loop);
});

test('a failed step ends its own requests, and leaves nothing behind that others could start from wrongly', async () => {
  // The prompt ends within a block, which is copied for those who start from its context.
  const shape = { prompt: 22, newTokens: 6, samples: 2 };
  const expected = await alone(shape, 3);
  for (let failing = 1; failing < 10; failing++) {
    const { loop, engine } = start();
    engine.watch = (_step, number) => {
      if (number === failing) throw new EngineError('refused');
    };
    const tickets = [loop.submit(fakeJob(shape, 3)), loop.submit(fakeJob(shape, 3))];
    const outcomes = await Promise.allSettled(tickets.map(({ done }) => done));
    for (const outcome of outcomes) if (outcome.status === 'fulfilled') expect(outcome.value.value).toEqual(expected);
    engine.watch = () => {};
    expect((await loop.submit(fakeJob(shape, 3)).done).value).toEqual(expected);
    expectNothingLeft(loop);
  }
});

test("one Extend's error ends its request alone, and its context is not used again", async () => {
  class Erring extends FakeEngine {
    override async step(step: EngineStep): Promise<EngineStepResult> {
      const answer = await super.step(step);
      const results = answer.results.map((result, i) =>
        step.extends[i]!.tokens.length === 33 ? ({ kind: 'error', message: 'the logits are not numbers' } as const) : result,
      );
      return { ...answer, results };
    }
  }
  const loop = new ServingLoop(
    new Erring({ kvBlocks: 256, blockSize: BLOCK_SIZE, maxBatchTokens: 128, vocabSize: 997 }),
    { ...limits, stepTokens: 100 },
    log,
  );
  open.push(loop);
  const other = loop.submit(fakeJob({ prompt: 20, newTokens: 5, samples: 2 }, 1));
  const ill = { prompt: 33, newTokens: 5, samples: 2 };
  await expect(loop.submit(fakeJob(ill, 2)).done).rejects.toThrow(new EngineError('the logits are not numbers'));
  await expect(loop.submit(fakeJob(ill, 2)).done).rejects.toThrow(EngineError);
  expect((await other.done).value).toEqual(await alone({ prompt: 20, newTokens: 5, samples: 2 }, 1));
  expect(loop.snapshot()).toMatchObject({ failed: 2, finished: 1, contextCache: { hits: 0 } });
  expectNothingLeft(loop);
});
