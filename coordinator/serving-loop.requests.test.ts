import { afterEach, expect, test } from 'vitest';
import {
  CancelledError,
  DeadlineError,
  InvalidRequestError,
  NotFoundError,
  NotReadyError,
  QueueFullError,
  RateLimitedError,
} from '../common/errors.js';
import { createLogger } from '../common/log.js';
import { BLOCK_SIZE, callerNamed, fakeJob, type Shape, turn, turnsUntil } from './fake-job.js';
import { EpochEndedError, type EngineStep, type EngineStepResult } from './group/engine.js';
import { FakeEngine } from './group/fake-engine.js';
import { DEFAULT_LIMITS } from './limits.js';
import type { Ticket } from './job.js';
import { type LoopLimits, ServingLoop } from './serving-loop.js';
import { type LoopObserver, NO_OBSERVER, type RequestStats, type StepStats } from './status/observer.js';

/** How requests come, are told apart, and end. */

const limits: LoopLimits = { ...DEFAULT_LIMITS, stepTokens: 64, maxBatchTokens: 128, maxExtends: 16, contextCacheBlocks: 0 };
const open: ServingLoop[] = [];

afterEach(async () => {
  await Promise.all(open.splice(0).map((loop) => loop.close()));
});

/** A step takes 10 ms of virtual time. */
class TimedEngine extends FakeEngine {
  nowMs = 0;
  stepsDone = 0;
  override async step(step: EngineStep): Promise<EngineStepResult> {
    const result = await super.step(step);
    this.stepsDone += 1;
    this.nowMs += 10;
    return result;
  }
}

interface Options {
  kvBlocks?: number;
  limits?: Partial<LoopLimits>;
  observer?: Partial<LoopObserver>;
  lostSteps?: readonly number[];
  engine?: TimedEngine;
}

function start(options: Options = {}): { loop: ServingLoop; engine: TimedEngine } {
  const { kvBlocks = 256, lostSteps = [] } = options;
  const engine =
    options.engine ??
    new TimedEngine({ kvBlocks, blockSize: BLOCK_SIZE, maxBatchTokens: 128, vocabSize: 997, lostSteps: new Set(lostSteps) });
  const observer = { ...NO_OBSERVER, ...options.observer };
  const loop = new ServingLoop(engine, { ...limits, ...options.limits }, createLogger('test', 'silent'), observer, () => engine.nowMs);
  open.push(loop);
  return { loop, engine };
}

async function alone(shape: Shape, seed: number): Promise<number[][]> {
  return (await start().loop.submit(fakeJob(shape, seed)).done).value;
}

const SMALL: Shape = { prompt: 6, newTokens: 4, samples: 1 };
/** It would take 10 s of virtual time. */
const ENDLESS: Shape = { prompt: 6, newTokens: 100, samples: 1 };

/** The request ids in the order in which they ended. */
async function orderOf(tickets: readonly Ticket<unknown>[]): Promise<string[]> {
  const order: string[] = [];
  await Promise.all(tickets.map(({ done, requestId }) => done.then(() => order.push(requestId))));
  return order;
}

test('higher priorities go first, equal ones in the order of their arrival', async () => {
  const { loop } = start({ kvBlocks: 4 }); // one at a time
  const tickets = [
    { requestId: 'low', priority: -1 },
    { requestId: 'first', priority: 0 },
    { requestId: 'second', priority: 0 },
    { requestId: 'high', priority: 5 },
  ].map((asked) => loop.submit(fakeJob(SMALL, 1, { ...asked, maxBlocks: 4 })));
  expect(await orderOf(tickets)).toEqual(['high', 'first', 'second', 'low']);
});

test('a preempted request gives the same tokens, and its times add up', async () => {
  const ended: RequestStats[] = [];
  let preempted = 0;
  const { loop, engine } = start({ kvBlocks: 10, observer: { ended: (stats) => ended.push(stats), preempted: () => (preempted += 1) } });
  const long = { prompt: 16, newTokens: 20, samples: 1 };
  const low = loop.submit(fakeJob(long, 1, { requestId: 'low', maxBlocks: 10 }));
  await turnsUntil(() => engine.stepsDone === 6);
  const high = loop.submit(fakeJob(long, 2, { requestId: 'high', maxBlocks: 10, priority: 1 }));
  expect((await high.done).value).toEqual(await alone(long, 2));
  const { value, timings } = await low.done;
  expect(value).toEqual(await alone(long, 1));
  expect(preempted).toBe(1);
  expect(loop.snapshot().preemptions).toBe(1);
  const stats = ended.find(({ requestId }) => requestId === 'low')!;
  expect(stats).toMatchObject({ outcome: 'finished', preemptions: 1, generatedTokens: 20, promptTokens: 16, errorCode: null, timings });
  // Its first step and 20 tokens, of which the one that it was preempted before took a longer run; the other request's 21 steps are the stall.
  expect(timings).toEqual({ queueMs: 0, prefillMs: 20, decodeMs: 190 + 210, stallMs: 210 });
  expect(stats.arrivalMs + timings.queueMs + timings.prefillMs + timings.decodeMs).toBe(engine.nowMs);
});

test('the time in the queue ends with the first step', async () => {
  const { loop } = start({ kvBlocks: 4 });
  const [first, second] = [0, 1].map((seed) => loop.submit(fakeJob(SMALL, seed, { maxBlocks: 4 })));
  expect((await first!.done).timings).toEqual({ queueMs: 0, prefillMs: 20, decodeMs: 30, stallMs: 0 });
  expect((await second!.done).timings).toEqual({ queueMs: 50, prefillMs: 20, decodeMs: 30, stallMs: 0 });
});

test.each(['runs', 'waits'])('a deadline ends a request that %s before the next step', async (state) => {
  class Slow extends TimedEngine {
    override async step(step: EngineStep): Promise<EngineStepResult> {
      if (this.stepsDone === 3) await new Promise((resolve) => setTimeout(resolve, 30)); // longer than the deadline
      return super.step(step);
    }
  }
  const engine = new Slow({ kvBlocks: 28, blockSize: BLOCK_SIZE, maxBatchTokens: 128, vocabSize: 997 });
  const { loop } = start({ engine });
  const timeoutMs = (which: string): number | null => (which === state ? 5 : null);
  const running = loop.submit(fakeJob(ENDLESS, 1, { maxBlocks: 28, timeoutMs: timeoutMs('runs') }));
  const waiting = loop.submit(fakeJob({ ...SMALL, prompt: 100 }, 2, { maxBlocks: 28, timeoutMs: timeoutMs('waits') }));
  const [expired, other] = state === 'runs' ? [running, waiting] : [waiting, running];
  await expect(expired.done).rejects.toThrow(new DeadlineError('not done within its 5 ms'));
  expect(engine.stepsDone).toBeLessThanOrEqual(6); // it ended after the fourth, and hears of it with the next two under way
  await other.done;
  expect(loop.snapshot()).toMatchObject({ expired: 1, finished: 1, queued: 0, kv: { usedBlocks: 0 } });
});

test('a deadline that is far away keeps nobody waiting and expires nothing', async () => {
  const { loop } = start();
  expect((await loop.submit(fakeJob(SMALL, 1, { timeoutMs: 2 ** 40 })).done).value).toEqual(await alone(SMALL, 1));
  expect(loop.snapshot()).toMatchObject({ expired: 0, finished: 1 });
});

test('abort ends what the caller may end, and nothing else', async () => {
  const { loop } = start();
  const [mine, other, any] = ['mine', 'other', 'any'].map((requestId) =>
    loop.submit(fakeJob(ENDLESS, 1, { requestId, caller: callerNamed(requestId === 'mine' ? 'me' : 'you') })),
  );
  expect(() => loop.abort('other', 'me')).toThrow(new NotFoundError('no request other waits or runs for key me: it may have ended'));
  expect(() => loop.abort('nobody', null)).toThrow('no request nobody waits or runs: it may have ended');
  loop.abort('mine', 'me');
  loop.abort('any', null);
  await expect(mine!.done).rejects.toThrow(new CancelledError('the request was aborted'));
  await expect(any!.done).rejects.toThrow(CancelledError);
  expect(loop.snapshot()).toMatchObject({ cancelled: 2, running: 1 });
  expect(() => loop.abort('mine', 'me')).toThrow(NotFoundError);
  other!.cancel();
  await expect(other!.done).rejects.toThrow('the client cancelled the request');
  other!.cancel(); // no effect
  expect(loop.snapshot()).toMatchObject({ cancelled: 3, running: 0, queued: 0 });
});

test('draining refuses new requests and waits for those there are', async () => {
  const { loop } = start();
  const ticket = loop.submit(fakeJob(SMALL, 1));
  const drained = loop.drain(null);
  expect(loop.isDraining).toBe(true);
  expect(() => loop.submit(fakeJob(SMALL, 2))).toThrow(
    new NotReadyError('the server is draining and takes no new requests: ask another one'),
  );
  expect(await drained).toBe(0);
  expect((await ticket.done).value).toEqual(await alone(SMALL, 1));
  expect(await loop.drain(null)).toBe(0); // nothing there
});

test('draining with a time-out says how many are left', async () => {
  const { loop } = start({ kvBlocks: 28 });
  const tickets = [1, 2].map((seed) => loop.submit(fakeJob(ENDLESS, seed, { maxBlocks: 28 })));
  expect(await loop.drain(1)).toBe(2);
  for (const ticket of tickets) ticket.cancel();
  for (const { done } of tickets) await expect(done).rejects.toThrow(CancelledError);
  expect(await loop.drain(1)).toBe(0);
});

test('a key has only so many requests under way, another one has its own', async () => {
  const { loop } = start({ limits: { maxStreamsPerKey: 3 } });
  const few = callerNamed('few', { maxStreams: 2 });
  const tickets = [1, 2].map((seed) => loop.submit(fakeJob(SMALL, seed, { caller: few })));
  expect(() => loop.submit(fakeJob(SMALL, 3, { caller: few }))).toThrow(
    'key few has 2 requests under way, allowed are 2: wait for one to end',
  );
  const many = callerNamed('many', { maxStreams: 100 });
  for (let seed = 4; seed < 7; seed++) tickets.push(loop.submit(fakeJob(SMALL, seed, { caller: many })));
  expect(() => loop.submit(fakeJob(SMALL, 8, { caller: many }))).toThrow(RateLimitedError); // the server's limit holds, too
  await Promise.all(tickets.map(({ done }) => done));
  await loop.submit(fakeJob(SMALL, 3, { caller: few })).done;
  expect(loop.snapshot()).toMatchObject({ finished: 6 });
});

test('a key that has used up its tokens is told when to come back', async () => {
  const { loop, engine } = start();
  const caller = callerNamed('slow', { maxTokensPerMinute: 60 });
  await loop.submit(fakeJob({ prompt: 40, newTokens: 10, samples: 2 }, 1, { caller })).done; // 40 and 20
  const busyMs = engine.nowMs; // a token flows in each second, so this is nothing
  let refusal: unknown;
  try {
    loop.submit(fakeJob(SMALL, 2, { caller }));
  } catch (error) {
    refusal = error;
  }
  expect(refusal).toBeInstanceOf(RateLimitedError);
  expect(refusal).toMatchObject({ message: 'key slow has used up its 60 tokens per minute, the prompt has 6: try again in 6 s' });
  const { retryAfterMs } = refusal as RateLimitedError;
  expect(retryAfterMs).toBeCloseTo(6000 - busyMs, 0);
  loop.submit(fakeJob(SMALL, 2, { caller: callerNamed('other') }));
  engine.nowMs += retryAfterMs!;
  await loop.submit(fakeJob(SMALL, 2, { caller })).done;
});

test('the queue is bounded in requests and in tokens, and always takes one', async () => {
  const { loop } = start({ kvBlocks: 32, limits: { maxQueuedRequests: 3, maxQueuedTokens: 20 } });
  const tickets = [loop.submit(fakeJob({ prompt: 100, newTokens: 2, samples: 1 }, 1, { maxBlocks: 32 }))]; // alone it may be larger
  await turnsUntil(() => loop.snapshot().running === 1);
  tickets.push(loop.submit(fakeJob({ prompt: 14, newTokens: 2, samples: 1 }, 2, { maxBlocks: 32 })));
  expect(() => loop.submit(fakeJob({ prompt: 7, newTokens: 2, samples: 1 }, 3))).toThrow(
    'prompts of 14 tokens are waiting, the queue takes 20 and this one has 7',
  );
  for (const seed of [4, 5]) tickets.push(loop.submit(fakeJob({ prompt: 3, newTokens: 2, samples: 1 }, seed)));
  expect(() => loop.submit(fakeJob({ prompt: 1, newTokens: 2, samples: 1 }, 6))).toThrow(QueueFullError);
  expect(() => loop.submit(fakeJob({ prompt: 1, newTokens: 2, samples: 1 }, 6))).toThrow('3 requests are waiting, the queue takes 3');
  await Promise.all(tickets.map(({ done }) => done));
  expect(loop.snapshot()).toMatchObject({ queued: 0, queuedTokens: 0 });
});

test('Retry-After follows how fast requests end, also where they end together', async () => {
  // Sixteen at a time, and each batch takes 1000 steps of 10 ms: 1.6 requests a second.
  const { loop, engine } = start({ kvBlocks: 5000, limits: { maxQueuedRequests: 32 } });
  const submit = (seed: number) => loop.submit(fakeJob({ prompt: 2, newTokens: 100, samples: 1 }, seed, { maxSequences: 1 }));
  const tickets = Array.from({ length: 32 }, (_, i) => submit(i));
  await turnsUntil(() => loop.snapshot().finished >= 32);
  const perSecond = 32 / (engine.nowMs / 1000);
  tickets.push(...Array.from({ length: 32 }, (_, i) => submit(100 + i)));
  let refusal: unknown;
  try {
    submit(999);
  } catch (error) {
    refusal = error;
  }
  const seconds = (refusal as QueueFullError).retryAfterMs! / 1000;
  expect(seconds).toBeGreaterThan(32 / perSecond / 2);
  expect(seconds).toBeLessThan((32 / perSecond) * 2);
  for (const ticket of tickets) ticket.cancel();
});

test('an id is taken until its request has ended', async () => {
  const { loop } = start();
  const ticket = loop.submit(fakeJob(SMALL, 1, { requestId: 'mine' }));
  const again = (): Ticket<unknown> => loop.submit(fakeJob(SMALL, 1, { requestId: 'mine', caller: callerNamed('other') }));
  expect(again).toThrow(InvalidRequestError);
  expect(again).toThrow('a request with the id mine waits or runs already: give another');
  await ticket.done;
  await again().done;
});

test('what a strategy refuses at once is thrown, and nothing of it stays', () => {
  const { loop } = start();
  const refusing = fakeJob(SMALL, 1, {
    *start(sequences) {
      sequences.create();
      throw new InvalidRequestError('no');
    },
  });
  expect(() => loop.submit(refusing)).toThrow('no');
  expect(loop.snapshot()).toMatchObject({ failed: 0, running: 0, queued: 0, active: [] });
});

test('a strategy that needs no Extend ends where it is submitted', async () => {
  const { loop } = start();
  const ticket = loop.submit(
    fakeJob(SMALL, 1, {
      *start() {
        return [[7]];
      },
    }),
  );
  expect(loop.snapshot()).toMatchObject({ finished: 1, queued: 0, queuedTokens: 0 });
  expect(await ticket.done).toMatchObject({ value: [[7]], timings: { queueMs: 0, prefillMs: 0, decodeMs: 0, stallMs: 0 } });
});

test('observers get numbers that agree with one another', async () => {
  const steps: StepStats[] = [];
  const ended: RequestStats[] = [];
  const firsts: number[] = [];
  const gaps: number[] = [];
  const { loop, engine } = start({
    observer: {
      step: (stats) => steps.push(stats),
      ended: (stats) => ended.push(stats),
      firstToken: (ms) => firsts.push(ms),
      interToken: (ms) => gaps.push(ms),
    },
  });
  const shapes = [
    { prompt: 30, newTokens: 5, samples: 3 },
    { prompt: 90, newTokens: 7, samples: 1 },
    { prompt: 2, newTokens: 100, samples: 1 },
  ];
  const tickets = shapes.map((shape, i) => loop.submit(fakeJob(shape, i)));
  await tickets[0]!.done;
  await tickets[1]!.done;
  tickets[2]!.cancel();
  await expect(tickets[2]!.done).rejects.toThrow(CancelledError);

  const { totals, prompts } = { totals: loop.snapshot(), prompts: 30 + 90 + 2 };
  expect(ended.map(({ outcome, errorCode }) => [outcome, errorCode])).toEqual([
    ['finished', null],
    ['finished', null],
    ['cancelled', 'CANCELLED'],
  ]);
  expect(totals).toMatchObject({ finished: 2, cancelled: 1, failed: 0, expired: 0, promptTokens: prompts, steps: engine.stepsDone });
  const generated = ended.reduce((sum, stats) => sum + stats.generatedTokens, 0);
  expect(totals.generatedTokens).toBe(generated);
  expect(steps.reduce((sum, stats) => sum + stats.generatedTokens, 0)).toBe(generated);
  // Nothing was computed again; two tokens of the cancelled one were under way.
  expect(steps.reduce((sum, stats) => sum + stats.decodeTokens, 0) - generated).toBeOneOf([0, 1, 2]);
  expect(steps.reduce((sum, stats) => sum + stats.prefillTokens, 0)).toBeCloseTo(prompts);
  expect(steps.length).toBe(engine.stepsDone);
  expect(firsts).toHaveLength(3);
  expect(gaps).toHaveLength(4 + 6 + ended[2]!.generatedTokens - 1);
  for (const { timings, arrivalMs } of ended.slice(0, 2)) {
    expect(arrivalMs + timings.queueMs + timings.prefillMs + timings.decodeMs).toBeLessThanOrEqual(engine.nowMs);
  }
  expect(ended.map(({ timings }) => timings.queueMs + timings.prefillMs)).toEqual(expect.arrayContaining(firsts));
});

/** A job that hands every token to `emit`. */
function emitting(loop: ServingLoop, seed: number, emit: (i: number) => void): ReturnType<typeof fakeJob> {
  const job = fakeJob({ prompt: 4, newTokens: 5, samples: 1 }, seed);
  return {
    ...job,
    *start(sequences) {
      const inner = job.start(sequences);
      let state = inner.next();
      for (let i = 0; !state.done; i++) {
        const results = yield state.value;
        loop.defer(emit, i);
        state = inner.next(results);
      }
      return state.value;
    },
  };
}

test('clients get their tokens once the next step is on its way, and all of them before the end', async () => {
  let sent = 0;
  class Counting extends TimedEngine {
    override step(step: EngineStep): Promise<EngineStepResult> {
      sent += 1;
      return super.step(step);
    }
  }
  const engine = new Counting({ kvBlocks: 64, blockSize: BLOCK_SIZE, maxBatchTokens: 128, vocabSize: 997 });
  const { loop } = start({ engine, limits: { runAhead: false } });
  const sentBefore: number[] = [];
  const ticket = loop.submit(emitting(loop, 1, (i) => sentBefore.push(sent - i)));
  await ticket.done;
  // The results of step i + 1 are handed over when step i + 2 has been sent; after the last one there is none.
  expect(sentBefore).toEqual([2, 2, 2, 2, 2, 1]);
});

test.each([
  { name: 'before the results are there', turns: 1 },
  { name: 'after that', turns: 0 },
])('what it takes to hand tokens to clients is counted once: $name', async ({ turns }) => {
  class Slow extends TimedEngine {
    override async step(step: EngineStep): Promise<EngineStepResult> {
      const result = await super.step(step);
      for (let i = 0; i < turns; i++) await turn();
      return result;
    }
  }
  const engine = new Slow({ kvBlocks: 64, blockSize: BLOCK_SIZE, maxBatchTokens: 128, vocabSize: 997 });
  const emitMs: number[] = [];
  const { loop } = start({ engine, observer: { step: (step) => emitMs.push(step.emitMs) } });
  await loop.submit(emitting(loop, 1, () => (engine.nowMs += 3))).done;
  expect(emitMs).toEqual([0, 3, 3, 3, 3, 3]); // the last ones go without a step
});

test("a client's callback that throws ends neither the loop nor the request", async () => {
  const { loop } = start();
  const ticket = loop.submit(
    emitting(loop, 1, () => {
      throw new Error('the stream is gone');
    }),
  );
  expect((await ticket.done).value).toEqual(await alone({ prompt: 4, newTokens: 5, samples: 1 }, 1));
});

test('a callback may submit and cancel, also when the loop is about to sleep', async () => {
  const { loop } = start();
  let next: Ticket<unknown> | null = null;
  const ticket = loop.submit(
    emitting(loop, 1, (i) => {
      if (i === 5) next = loop.submit(fakeJob(SMALL, 2)); // with the last token: nothing else is there to do
    }),
  );
  await ticket.done;
  await next!.done;
});

test('a callback may cancel while there are no workers', async () => {
  class Absent extends TimedEngine {
    override ready(): Promise<void> {
      return new Promise(() => {});
    }
    override async step(step: EngineStep): Promise<EngineStepResult> {
      if (this.stepsDone < 3) return super.step(step);
      await turn();
      throw new EpochEndedError('rank 0 was lost');
    }
  }
  const { loop } = start({ engine: new Absent({ kvBlocks: 64, blockSize: BLOCK_SIZE, maxBatchTokens: 128, vocabSize: 997 }) });
  let tokens = 0;
  const job = fakeJob(ENDLESS, 1);
  const ticket: Ticket<unknown> = loop.submit({
    ...job,
    start: (sequences) => {
      loop.defer((more) => (tokens += more), 1);
      return job.start(sequences);
    },
  });
  await turnsUntil(() => tokens === 1);
  // Comes between the loss and the sleep that follows it.
  for (let i = 0; i < 3; i++) await turn();
  loop.defer(() => ticket.cancel(), null);
  loop.submit(fakeJob(SMALL, 2)).done.catch(() => {}); // wakes the loop, which then hands over what was deferred
  await expect(ticket.done).rejects.toThrow(CancelledError);
});

test('names of keys that have come and gone are forgotten', async () => {
  const { loop } = start({ kvBlocks: 4096 });
  const { keys } = (loop as unknown as { queue: { keys: Map<string, unknown> } }).queue;
  for (let i = 0; i < 3000; i += 100) {
    const tickets = Array.from({ length: 100 }, (_, j) => {
      const shape = { prompt: 1, newTokens: 1, samples: 1 };
      return loop.submit(fakeJob(shape, 1, { caller: callerNamed(`key ${i + j}`) }));
    });
    await Promise.all(tickets.map(({ done }) => done));
  }
  expect(keys.size).toBeLessThanOrEqual(1100);
});
