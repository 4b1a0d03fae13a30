import { afterEach, expect, test, vi } from 'vitest';
import { createLogger } from '../common/log.js';
import { BLOCK_SIZE, fakeJob, type Shape, turn, turnsUntil } from './fake-job.js';
import type { EngineStep, EngineStepResult } from './group/engine.js';
import { FakeEngine } from './group/fake-engine.js';
import { DEFAULT_LIMITS } from './limits.js';
import type { Ticket } from './job.js';
import { type LoopLimits, ServingLoop } from './serving-loop.js';

/** Steps that are sent while others run. */

const limits: LoopLimits = { ...DEFAULT_LIMITS, stepTokens: 24, maxBatchTokens: 80, maxExtends: 16, contextCacheBlocks: 0 };
const SIZE = { kvBlocks: 64, blockSize: BLOCK_SIZE, maxBatchTokens: 80, vocabSize: 997 };
/** Steps take none, so the next one is sent at once. */
const NO_TIME = (): number => 0;
const open: ServingLoop[] = [];
const engines: HeldEngine[] = [];

afterEach(async () => {
  vi.useRealTimers();
  for (const engine of engines.splice(0)) engine.finishAll();
  await Promise.all(open.splice(0).map((loop) => loop.close()));
});

/** Steps end when they are told to. */
class HeldEngine extends FakeEngine {
  readonly sent: EngineStep[] = [];
  private readonly held: (() => void)[] = [];
  private released = 0;

  override async step(step: EngineStep): Promise<EngineStepResult> {
    const result = super.step(step); // it is read now
    const number = this.sent.push(step);
    if (number > this.released) await new Promise<void>((resolve) => this.held.push(resolve));
    return result;
  }

  /** The oldest step under way. */
  finishOne(): void {
    this.released += 1;
    this.held.shift()?.();
  }

  finishAll(): void {
    this.released = Infinity;
    for (const finish of this.held.splice(0)) finish();
  }

  /** What of each step sent so far takes the sample of which Extend before it. */
  get sampledBy(): number[][] {
    return this.sent.map(({ extends: all }) => all.map(({ sampledBy }) => sampledBy));
  }
}

function start<E extends FakeEngine>(engine: E, changes: Partial<LoopLimits> = {}, now?: () => number): { loop: ServingLoop; engine: E } {
  const loop = new ServingLoop(engine, { ...limits, ...changes }, createLogger('test', 'silent'), undefined, now);
  open.push(loop);
  if (engine instanceof HeldEngine) engines.push(engine);
  return { loop, engine };
}

const held = (): { loop: ServingLoop; engine: HeldEngine } => start(new HeldEngine(SIZE), {}, NO_TIME);

async function oneByOne(shape: Shape, seed: number): Promise<number[][]> {
  const { loop } = start(new FakeEngine(SIZE), { runAhead: false });
  return (await loop.submit(fakeJob(shape, seed)).done).value;
}

const submit = (loop: ServingLoop, shape: Shape, seed: number): Ticket<number[][]> => loop.submit(fakeJob(shape, seed));

test('while a step runs the next one is sent, and takes its samples', async () => {
  const { loop, engine } = held();
  const shape = { prompt: 5, newTokens: 3, samples: 2 };
  const ticket = submit(loop, shape, 1);
  await turnsUntil(() => engine.sent.length === 1);
  engine.finishOne(); // the context, of which no sample is wanted: what follows it cannot be foreseen
  await turnsUntil(() => engine.sent.length === 3);
  expect(engine.sampledBy).toEqual([[-1], [-1, -1], [0, 1]]);
  engine.finishOne();
  await turnsUntil(() => engine.sent.length === 4);
  expect(engine.sampledBy[3]).toEqual([0, 1]);
  engine.finishAll();
  expect((await ticket.done).value).toEqual(await oneByOne(shape, 1));
  expect(engine.sent.length).toBe(4); // nothing follows the last one
});

test('what cannot be foreseen is not sent', async () => {
  const { loop, engine } = held();
  const both = [
    submit(loop, { prompt: 5, newTokens: 4, samples: 1 }, 1),
    submit(loop, { prompt: 5, newTokens: 2, samples: 1, foresees: false }, 2),
  ];
  await turnsUntil(() => engine.sent.length === 1);
  engine.finishAll();
  await Promise.all(both.map(({ done }) => done));
  // Until the second one's last sample steps go one by one.
  expect(engine.sampledBy).toEqual([[-1, -1], [-1, -1], [-1, -1], [0], [0]]);
});

test('a sequence that ends although more of it is under way takes nothing from the others', async () => {
  const shape = { prompt: 6, newTokens: 12, samples: 3, endsWith: 3 };
  const seeds = [1, 2, 3, 4];
  const { loop, engine } = start(new FakeEngine(SIZE), {}, NO_TIME);
  const results = await Promise.all(seeds.map((seed) => submit(loop, shape, seed).done));
  for (const [i, { value }] of results.entries()) expect(value).toEqual(await oneByOne(shape, seeds[i]!));
  const drawn = results.flatMap(({ value }) => value).reduce((sum, tokens) => sum + tokens.length - 1, 0);
  const run = engine.history.flat().filter(({ want }) => want.kind === 'sample').length;
  expect(run).toBeGreaterThan(drawn); // some ran for nothing
  expect(loop.snapshot().kv).toMatchObject({ usedBlocks: 0, freeBlocks: SIZE.kvBlocks });
});

test('a request that is cancelled while two of its steps are under way leaves its blocks to others, in the order of the steps', async () => {
  const { loop, engine } = start(new HeldEngine({ ...SIZE, kvBlocks: 8 }), {}, NO_TIME);
  const doomed = loop.submit(fakeJob({ prompt: 12, newTokens: 12, samples: 1 }, 1, { maxBlocks: 8 }));
  await turnsUntil(() => engine.sent.length === 1);
  engine.finishOne();
  await turnsUntil(() => engine.sent.length === 3);
  const other = loop.submit(fakeJob({ prompt: 14, newTokens: 10, samples: 1 }, 2, { maxBlocks: 8 })); // has no room beside it
  doomed.cancel();
  const ended = expect(doomed.done).rejects.toThrow('cancelled');
  engine.finishAll();
  await ended;
  expect((await other.done).value).toEqual(await oneByOne({ prompt: 14, newTokens: 10, samples: 1 }, 2));
});

test('both steps under way are lost with a rank, and what they were to give is computed again', async () => {
  const shape = { prompt: 9, newTokens: 8, samples: 2 };
  for (const lost of [2, 3, 4, 5]) {
    const { loop, engine } = start(new FakeEngine({ ...SIZE, lostSteps: new Set([lost]) }), {}, NO_TIME);
    expect((await submit(loop, shape, 5).done).value).toEqual(await oneByOne(shape, 5));
    expect(engine.history.flat().some(({ sampledBy }) => sampledBy >= 0)).toBe(true);
  }
});

test('a long step is followed late, so that who comes meanwhile is in the next one', async () => {
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'performance'] });
  class SlowEngine extends HeldEngine {
    done = 0;
    private endMs = 0;
    override async step(step: EngineStep): Promise<EngineStepResult> {
      const result = super.step(step);
      this.endMs = Math.max(this.endMs, performance.now()) + 300;
      setTimeout(() => this.finishOne(), this.endMs - performance.now());
      return result.finally(() => (this.done += 1));
    }
  }
  const { loop, engine } = start(new SlowEngine(SIZE));
  const until = async (isTrue: () => boolean): Promise<void> => {
    for (let ms = 0; !isTrue(); ms += 10) {
      if (ms > 60_000) throw new Error('it never came to that');
      await vi.advanceTimersByTimeAsync(10);
      for (let i = 0; i < 4; i++) await turn();
    }
  };
  const first = submit(loop, { prompt: 4, newTokens: 6, samples: 1 }, 1);
  await until(() => engine.done === 4); // the times of the first ones were not known yet
  expect(engine.sent.length).toBe(5); // the one that runs now
  const second = submit(loop, { prompt: 4, newTokens: 1, samples: 1 }, 2);
  await until(() => loop.snapshot().finished === 2);
  expect((await first.done).value).toEqual(await oneByOne({ prompt: 4, newTokens: 6, samples: 1 }, 1));
  await second.done;
  expect(engine.sampledBy[5]).toEqual([0, -1]); // it was sent while the fifth ran, and has the newcomer in it
});
