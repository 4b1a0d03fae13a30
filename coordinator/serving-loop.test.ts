import fc from 'fast-check';
import { afterEach, expect, test } from 'vitest';
import { CancelledError, EngineError, InvalidRequestError, NotReadyError, WorkerLostError } from '../common/errors.js';
import { createLogger } from '../common/log.js';
import { BLOCK_SIZE, fakeJob as job, type Shape, turn } from './fake-job.js';
import { EpochEndedError, type Engine, type EngineStep, type EngineStepResult } from './group/engine.js';
import { DEFAULT_LIMITS } from './limits.js';
import { FakeEngine } from './group/fake-engine.js';
import type { Ticket } from './job.js';
import { ServingLoop } from './serving-loop.js';

const log = createLogger('test', 'silent');
const limits = {
  ...DEFAULT_LIMITS,
  stepTokens: 24,
  maxBatchTokens: 80,
  maxExtends: 16,
  contextCacheBlocks: 32,
  maxQueuedRequests: 100,
};
const open: ServingLoop[] = [];

afterEach(async () => {
  await Promise.all(open.splice(0).map((loop) => loop.close()));
});

function start({ runAhead = true, ...options }: { kvBlocks?: number; lostSteps?: ReadonlySet<number>; runAhead?: boolean } = {}): {
  loop: ServingLoop;
  engine: FakeEngine;
} {
  const engine = new FakeEngine({ kvBlocks: 256, blockSize: BLOCK_SIZE, maxBatchTokens: 80, vocabSize: 997, ...options });
  const loop = new ServingLoop(engine, { ...limits, runAhead }, log);
  open.push(loop);
  return { loop, engine };
}

async function alone(shape: Shape, seed: number): Promise<number[][]> {
  const { loop } = start({ runAhead: false });
  return (await loop.submit(job(shape, seed)).done).value;
}

const shape = fc.record({
  prompt: fc.constantFrom(1, 5, 18, 24, 33, 45),
  newTokens: fc.integer({ min: 1, max: 12 }),
  samples: fc.integer({ min: 1, max: 4 }),
  foresees: fc.oneof({ weight: 4, arbitrary: fc.constant(true) }, { weight: 1, arbitrary: fc.constant(false) }),
  endsWith: fc.constantFrom(3, 11, 997),
});

/** How a request comes and goes; `seed` from a few, so that some ask the same. */
const arrival = fc.record({
  shape,
  seed: fc.integer({ min: 0, max: 5 }),
  key: fc.constantFrom('a', 'b', 'c'),
  weight: fc.constantFrom(1, 3),
  priority: fc.constantFrom(0, 0, 0, 1, -1),
  /** Turns of the event loop before it comes. */
  delay: fc.integer({ min: 0, max: 12 }),
  /** Turns after which it is cancelled. */
  cancelAfter: fc.option(fc.integer({ min: 0, max: 20 }), { freq: 4, nil: null }),
});

// The longest run goes through its layers in between: what ends three epochs without getting anything done is taken for their cause.
const lostSteps = fc.uniqueArray(
  fc.integer({ min: 0, max: 7 }).map((i) => 6 * i + 1),
  { maxLength: 4 },
);

test('whatever comes and goes, a request gives the tokens that it gives alone, and no block is lost', async () => {
  const seen = { preemptions: 0, hits: 0, sliced: 0, evictions: 0, cancelled: 0, ahead: 0 };
  await fc.assert(
    fc.asyncProperty(
      fc.array(arrival, { minLength: 1, maxLength: 14 }),
      fc.oneof({ weight: 2, arbitrary: fc.constant([]) }, { weight: 1, arbitrary: lostSteps }),
      fc.constantFrom(80, 100, 256),
      async (arrivals, lost, kvBlocks) => {
        const { loop, engine } = start({ kvBlocks, lostSteps: new Set(lost) });
        const outcomes = await Promise.all(
          arrivals.map(async ({ shape: asked, seed, key, weight, priority, delay, cancelAfter }) => {
            for (let i = 0; i < delay; i++) await turn();
            const caller = { name: key, weight, maxStreams: null, maxTokensPerMinute: null };
            const ticket = loop.submit({ ...job(asked, seed), caller, priority });
            if (cancelAfter !== null) {
              void (async () => {
                for (let i = 0; i < cancelAfter; i++) await turn();
                ticket.cancel();
              })();
            }
            return ticket.done.then(
              ({ value }) => value,
              (error: unknown) => {
                expect(error).toBeInstanceOf(CancelledError);
                return null;
              },
            );
          }),
        );
        const { kv, preemptions, contextCache, running, queued, cancelled } = loop.snapshot();
        for (const [i, outcome] of outcomes.entries()) {
          if (outcome) expect(outcome).toEqual(await alone(arrivals[i]!.shape, arrivals[i]!.seed));
        }
        expect({ running, queued, used: kv.usedBlocks }).toEqual({ running: 0, queued: 0, used: 0 });
        expect(kv.freeBlocks + kv.cachedBlocks).toBe(kv.totalBlocks);
        seen.preemptions += preemptions;
        seen.hits += contextCache.hits;
        seen.evictions += contextCache.evictions;
        seen.cancelled += cancelled;
        seen.ahead += engine.history.flat().filter(({ sampledBy }) => sampledBy >= 0).length;
        seen.sliced += engine.history.flat().filter(({ firstLayer }) => firstLayer > 0).length;
      },
    ),
    { numRuns: 150 },
  );
  // The test has seen what it is about.
  for (const count of Object.values(seen)) expect(count).toBeGreaterThan(0);
});

test('requests that arrive together decode in the same steps', async () => {
  const { loop, engine } = start();
  const tickets = [0, 1, 2].map((seed) => loop.submit(job({ prompt: 5, newTokens: 6, samples: 1 }, seed)));
  await Promise.all(tickets.map(({ done }) => done));
  expect(engine.history.map((step) => step.length)).toEqual([3, 3, 3, 3, 3, 3, 3]);
});

test('a request that waits for blocks starts when they are free', async () => {
  const { loop } = start({ kvBlocks: 8 });
  const tickets = [0, 1, 2].map((seed) => loop.submit(job({ prompt: 8, newTokens: 4, samples: 1 }, seed)));
  await new Promise((resolve) => setTimeout(resolve, 0));
  const results = await Promise.all(tickets.map(({ done }) => done));
  expect(results.map(({ value }) => value[0]!.length)).toEqual([5, 5, 5]);
  expect(loop.snapshot().kv.peakUsedBlocks).toBeLessThanOrEqual(8);
});

test('a request that can never fit is refused at once, with what would fit', () => {
  const { loop } = start({ kvBlocks: 8 });
  expect(() => loop.submit(job({ prompt: 30, newTokens: 4, samples: 2 }, 0))).toThrow(InvalidRequestError);
  expect(() => loop.submit(job({ prompt: 30, newTokens: 4, samples: 2 }, 0))).toThrow('KV blocks of 4 tokens, the server has 8');
});

test('a cancelled request frees its blocks and the others go on', async () => {
  const { loop } = start();
  const doomed = loop.submit(job({ prompt: 20, newTokens: 100, samples: 4 }, 1));
  const other = loop.submit(job({ prompt: 5, newTokens: 10, samples: 1 }, 2));
  setTimeout(() => doomed.cancel(), 1);
  await expect(doomed.done).rejects.toThrow(CancelledError);
  expect((await other.done).value).toEqual(await alone({ prompt: 5, newTokens: 10, samples: 1 }, 2));
  expect(loop.snapshot()).toMatchObject({ cancelled: 1, finished: 1, running: 0, kv: { usedBlocks: 0 } });
});

test('an error of the engine ends the requests of that step with it, not the server', async () => {
  class Failing extends FakeEngine {
    private failed = false;
    override step(step: EngineStep): Promise<EngineStepResult> {
      if (this.failed) return super.step(step);
      this.failed = true;
      return Promise.reject(new EngineError('extends[0].tokens: refused'));
    }
  }
  const engine = new Failing({ kvBlocks: 64, blockSize: BLOCK_SIZE, maxBatchTokens: 80, vocabSize: 997 });
  const loop = new ServingLoop(engine, limits, log);
  open.push(loop);
  await expect(loop.submit(job({ prompt: 5, newTokens: 2, samples: 1 }, 0)).done).rejects.toThrow('extends[0].tokens: refused');
  expect((await loop.submit(job({ prompt: 5, newTokens: 2, samples: 1 }, 0)).done).value).toEqual(
    await alone({ prompt: 5, newTokens: 2, samples: 1 }, 0),
  );
});

test('when no rank comes back all requests end with a WorkerLostError and new ones are refused', async () => {
  class Lost extends FakeEngine implements Engine {
    override ready(): Promise<void> {
      return Promise.reject(new WorkerLostError('worker 1 ended 6 times within a minute'));
    }
  }
  const engine = new Lost({ kvBlocks: 64, blockSize: BLOCK_SIZE, maxBatchTokens: 80, vocabSize: 997, lostSteps: new Set([2]) });
  const loop = new ServingLoop(engine, limits, log);
  open.push(loop);
  const tickets: Ticket<unknown>[] = [0, 1].map((seed) => loop.submit(job({ prompt: 5, newTokens: 4, samples: 1 }, seed)));
  for (const { done } of tickets) await expect(done).rejects.toThrow(WorkerLostError);
  expect(() => loop.submit(job({ prompt: 5, newTokens: 4, samples: 1 }, 0))).toThrow(NotReadyError);
});

test('closing ends what is under way with a NotReadyError', async () => {
  const { loop } = start();
  const ticket = loop.submit(job({ prompt: 5, newTokens: 1000, samples: 1 }, 0));
  const ended = expect(ticket.done).rejects.toThrow(NotReadyError);
  await loop.close();
  await ended;
  expect(() => loop.submit(job({ prompt: 5, newTokens: 1, samples: 1 }, 0))).toThrow(NotReadyError);
});

test('a request that ends every epoch fails alone, and the others go on', async () => {
  class Poisoned extends FakeEngine {
    override step(step: EngineStep): Promise<EngineStepResult> {
      if (step.extends.some(({ tokens }) => tokens.length === 23)) return Promise.reject(new EpochEndedError('rank 1: out of memory'));
      return super.step(step);
    }
  }
  const loop = new ServingLoop(new Poisoned({ kvBlocks: 256, blockSize: BLOCK_SIZE, maxBatchTokens: 80, vocabSize: 997 }), limits, log);
  open.push(loop);
  const before = loop.submit(job({ prompt: 5, newTokens: 30, samples: 2 }, 1));
  const poison = loop.submit(job({ prompt: 23, newTokens: 3, samples: 1 }, 2));
  const after = loop.submit(job({ prompt: 6, newTokens: 3, samples: 1 }, 3));
  await expect(poison.done).rejects.toThrow("the workers were lost 3 times in this request's steps, last: rank 1: out of memory");
  expect((await before.done).value).toEqual(await alone({ prompt: 5, newTokens: 30, samples: 2 }, 1));
  expect((await after.done).value).toEqual(await alone({ prompt: 6, newTokens: 3, samples: 1 }, 3));
});

test('a request can be cancelled while there are no workers', async () => {
  class Absent extends FakeEngine {
    override ready(): Promise<void> {
      return new Promise(() => {});
    }
  }
  const engine = new Absent({ kvBlocks: 64, blockSize: BLOCK_SIZE, maxBatchTokens: 80, vocabSize: 997, lostSteps: new Set([2]) });
  const loop = new ServingLoop(engine, limits, log);
  open.push(loop);
  const ticket = loop.submit(job({ prompt: 5, newTokens: 4, samples: 1 }, 0));
  setTimeout(() => ticket.cancel(), 20);
  await expect(ticket.done).rejects.toThrow(CancelledError);
  expect(loop.snapshot().kv).toMatchObject({ usedBlocks: 0 });
});

test('a request that needs more blocks than it reserved fails, and the loop goes on', async () => {
  const { loop } = start({ kvBlocks: 8 });
  const greedy = loop.submit({ ...job({ prompt: 30, newTokens: 30, samples: 1 }, 1), maxBlocks: 1 });
  await expect(greedy.done).rejects.toThrow('it needs more KV blocks than the 1 that were foreseen');
  const modest = loop.submit(job({ prompt: 4, newTokens: 2, samples: 1 }, 2));
  expect((await modest.done).value).toEqual(await alone({ prompt: 4, newTokens: 2, samples: 1 }, 2));
});

test('a full queue refuses with its limit', () => {
  const { loop } = start({ kvBlocks: 8 });
  for (let i = 0; i < limits.maxQueuedRequests; i++) loop.submit(job({ prompt: 5, newTokens: 4, samples: 1 }, i)).done.catch(() => {});
  expect(() => loop.submit(job({ prompt: 5, newTokens: 4, samples: 1 }, 0))).toThrow('100 requests are waiting, the queue takes 100');
});
