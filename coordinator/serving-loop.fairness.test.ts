import { afterEach, expect, test } from 'vitest';
import { createLogger } from '../common/log.js';
import { BLOCK_SIZE, callerNamed, fakeJob, type Shape, turn } from './fake-job.js';
import type { EngineStep, EngineStepResult } from './group/engine.js';
import { FakeEngine } from './group/fake-engine.js';
import { DEFAULT_LIMITS } from './limits.js';
import type { Ticket } from './job.js';
import { ServingLoop } from './serving-loop.js';
import type { RequestTimings } from './status/observer.js';

/*
 * Time is virtual: a step takes what the cost model says, requests come when the clock says so, and nothing else takes any. So the figures are
 * the scheduler's alone, and the same in every run.
 */

const STEP_MS = 10;
const DECODE_MS = 0.05;
const PREFILL_MS = 0.1;
const limits = {
  ...DEFAULT_LIMITS,
  stepTokens: 64,
  maxBatchTokens: 512,
  maxExtends: 16,
  contextCacheBlocks: 40,
  maxQueuedRequests: 10_000,
};
/** The longest step: all its tokens from prompts, and a quarter more where decoding has taken them already. */
const LONGEST_STEP_MS = STEP_MS + 1.25 * limits.stepTokens * PREFILL_MS + limits.maxExtends * DECODE_MS;

class VirtualTimeEngine extends FakeEngine {
  nowMs = 0;
  stepsDone = 0;
  /** What happens by the new time. */
  onTime: () => void = () => {};

  override async step(step: EngineStep): Promise<EngineStepResult> {
    const result = await super.step(step);
    this.history.length = 0;
    this.stepsDone += 1;
    this.nowMs += STEP_MS;
    for (const { tokens, firstLayer, endLayer } of step.extends) {
      const share = (endLayer - firstLayer) / this.capacity.numLayers;
      this.nowMs += tokens.length === 1 ? DECODE_MS : tokens.length * share * PREFILL_MS;
    }
    this.onTime();
    return result;
  }
}

const open: ServingLoop[] = [];

afterEach(async () => {
  await Promise.all(open.splice(0).map((loop) => loop.close()));
});

/** 800 tokens of KV: five of the greedy requests below. */
function start(kvBlocks = 200): { loop: ServingLoop; engine: VirtualTimeEngine } {
  const engine = new VirtualTimeEngine({ kvBlocks, blockSize: BLOCK_SIZE, maxBatchTokens: 512, vocabSize: 997, numLayers: 8 });
  const loop = new ServingLoop(engine, limits, createLogger('test', 'silent'), undefined, () => engine.nowMs);
  open.push(loop);
  return { loop, engine };
}

const MODEST: Shape = { prompt: 24, newTokens: 16, samples: 1 };
const GREEDY: Shape = { prompt: 96, newTokens: 64, samples: 1 };

/** Keeps `queued` requests of a key waiting, until it is told to stop. */
class Flood {
  private readonly tickets = new Set<Ticket<unknown>>();
  private isStopped = false;
  private seed = 1000;
  tokens = 0;
  readonly failures: unknown[] = [];

  constructor(
    private readonly loop: ServingLoop,
    private readonly key: string,
    private readonly queued: number,
    private readonly weight = 1,
    private readonly shape: Shape = GREEDY,
  ) {}

  refill(): void {
    while (!this.isStopped && this.tickets.size < this.queued) {
      const ticket = this.loop.submit(
        fakeJob(this.shape, this.seed++, { caller: callerNamed(this.key, { weight: this.weight }), maxSequences: this.shape.samples }),
      );
      this.tickets.add(ticket);
      void ticket.done.then(
        () => {
          this.tickets.delete(ticket);
          this.tokens += this.shape.newTokens * this.shape.samples;
        },
        (error: unknown) => {
          if (!this.isStopped) this.failures.push(error);
        },
      );
    }
  }

  stop(): void {
    expect(this.failures).toEqual([]);
    this.isStopped = true;
    for (const ticket of this.tickets) ticket.cancel();
  }
}

/** A modest key's latencies when it sends a request every 250 ms, each time another one. */
async function modestLatencies(greedyKey: string | null): Promise<{ firstToken: number; endToEnd: number; preemptions: number }> {
  const { loop, engine } = start();
  const flood = greedyKey === null ? null : new Flood(loop, greedyKey, 300);
  const all: RequestTimings[] = [];
  const count = 100;
  let sent = 0;
  engine.onTime = () => {
    flood?.refill();
    for (; sent < count && sent * 250 <= engine.nowMs; sent++) {
      const job = fakeJob(MODEST, sent, { caller: callerNamed('modest') });
      void loop.submit(job).done.then(({ timings }) => all.push(timings));
    }
  };
  engine.onTime();
  while (all.length < count) {
    const { running, queued } = loop.snapshot();
    if (running + queued === 0) {
      engine.nowMs = sent * 250; // nothing to do until the next one comes
      engine.onTime();
    }
    await turn();
  }
  flood?.stop();
  const p99 = (values: number[]): number => values.sort((a, b) => a - b)[Math.ceil(0.99 * values.length) - 1]!;
  return {
    firstToken: p99(all.map(({ queueMs, prefillMs }) => queueMs + prefillMs)),
    endToEnd: p99(all.map(({ queueMs, prefillMs, decodeMs }) => queueMs + prefillMs + decodeMs)),
    preemptions: loop.snapshot().preemptions,
  };
}

test("one greedy key cannot move another's p99", async () => {
  const alone = await modestLatencies(null);
  const beside = await modestLatencies('greedy');
  // A request comes in the middle of a step and shares its own steps: no step of its own takes twice as long as alone, or longer than the longest.
  expect(beside.firstToken).toBeLessThanOrEqual(2 * alone.firstToken + LONGEST_STEP_MS);
  expect(beside.endToEnd).toBeLessThanOrEqual(2 * alone.endToEnd + LONGEST_STEP_MS);
  expect(beside.preemptions).toBeGreaterThan(0); // the greedy key had taken all the memory
});

test('the same load under one key does: nobody is told apart there', async () => {
  const alone = await modestLatencies(null);
  const beside = await modestLatencies('modest');
  expect(beside.firstToken).toBeGreaterThan(100 * alone.firstToken);
  expect(beside.endToEnd).toBeGreaterThan(20 * alone.endToEnd);
});

/** Tokens that two keys get of 3000 steps when both want more than there is. */
async function sharedOut(weights: readonly [number, number], shapes: readonly [Shape, Shape]): Promise<[number, number]> {
  const { loop, engine } = start();
  const floods = [0, 1].map((i) => new Flood(loop, `key ${i}`, 100, weights[i], shapes[i]));
  engine.onTime = () => floods.forEach((flood) => flood.refill());
  engine.onTime();
  while (engine.stepsDone < 3000) await turn();
  floods.forEach((flood) => flood.stop());
  return [floods[0]!.tokens, floods[1]!.tokens];
}

test.each([
  { weight: 1, least: 0.9, most: 1.1 },
  { weight: 3, least: 2.5, most: 3.75 }, // there is memory for five requests, and they are whole
])('a key of weight $weight gets $weight times as many tokens as one of weight 1', async ({ weight, least, most }) => {
  const [heavy, light] = await sharedOut([weight, 1], [GREEDY, GREEDY]);
  expect(light).toBeGreaterThan(1000);
  expect(heavy / light).toBeGreaterThan(least);
  expect(heavy / light).toBeLessThan(most);
});

test('keys that flood the server alike do not preempt each other more than one key does itself', async () => {
  const preemptions = async (keys: number): Promise<number> => {
    const { loop, engine } = start(110);
    const floods = Array.from(
      { length: keys },
      (_, i) => new Flood(loop, `key ${i}`, 200 / keys, 1, { prompt: 16, newTokens: 48, samples: 1 }),
    );
    engine.onTime = () => floods.forEach((flood) => flood.refill());
    engine.onTime();
    while (engine.stepsDone < 2000) await turn();
    floods.forEach((flood) => flood.stop());
    return loop.snapshot().preemptions;
  };
  const one = await preemptions(1);
  expect(one).toBeGreaterThan(0);
  expect(await preemptions(3)).toBeLessThan(1.6 * one);
});

test('a key of long requests starves no key of short ones, nor the other way round', async () => {
  // Each is charged what it uses: prompt and two for every new token.
  const long = { prompt: 300, newTokens: 100, samples: 1 };
  const short = { prompt: 8, newTokens: 8, samples: 1 };
  const [ofLong, ofShort] = await sharedOut([1, 1], [long, short]);
  const used = (tokens: number, shape: Shape): number => (tokens * (shape.prompt + 2 * shape.newTokens)) / shape.newTokens;
  expect(used(ofLong, long) / used(ofShort, short)).toBeGreaterThan(1 / 3);
  expect(used(ofLong, long) / used(ofShort, short)).toBeLessThan(3);
});

test('a key that runs one long request has no credit when it floods', async () => {
  const { loop, engine } = start();
  const shape = { prompt: 60, newTokens: 1, samples: 1 }; // prompts are what a step has no room for
  const busy = new Flood(loop, 'busy', 50, 1, shape);
  const sleepy = new Flood(loop, 'sleepy', 50, 1, shape);
  loop.submit(fakeJob({ prompt: 4, newTokens: 350, samples: 1 }, 1, { caller: callerNamed('sleepy') }));
  engine.onTime = () => {
    busy.refill();
    if (engine.stepsDone >= 300) sleepy.refill();
  };
  engine.onTime();
  while (engine.stepsDone < 300) await turn();
  const before = busy.tokens;
  while (engine.stepsDone < 600) await turn();
  const after = busy.tokens;
  busy.stop();
  sleepy.stop();
  // It had the server nearly to itself, and now has half.
  expect(after - before).toBeGreaterThan(before / 4);
});

test('a request that is larger than its share begins in the end, however busy the others are', async () => {
  const { loop, engine } = start(140);
  const floods = ['a', 'b', 'c'].map((key) => new Flood(loop, key, 20, 1, { prompt: 12, newTokens: 20, samples: 1 }));
  let isDone = false;
  engine.onTime = () => floods.forEach((flood) => flood.refill());
  engine.onTime();
  while (engine.stepsDone < 50) await turn();
  const large = fakeJob({ prompt: 500, newTokens: 8, samples: 1 }, 7, { caller: callerNamed('large'), maxBlocks: 128 });
  void loop.submit(large).done.then(() => (isDone = true));
  while (!isDone && engine.stepsDone < 2000) await turn();
  floods.forEach((flood) => flood.stop());
  expect(isDone).toBe(true);
});

test('so does one that needs all the sequences of a step', async () => {
  const { loop, engine } = start();
  const floods = ['a', 'b', 'c'].map((key) => new Flood(loop, key, 20, 1, { prompt: 12, newTokens: 20, samples: 1 }));
  let isDone = false;
  engine.onTime = () => floods.forEach((flood) => flood.refill());
  engine.onTime();
  const wide = fakeJob({ prompt: 8, newTokens: 4, samples: 16 }, 7, { caller: callerNamed('wide'), maxSequences: 16 });
  void loop.submit(wide).done.then(() => (isDone = true));
  while (!isDone && engine.stepsDone < 2000) await turn();
  floods.forEach((flood) => flood.stop());
  expect(isDone).toBe(true);
});
