import { EventEmitter } from 'node:events';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { EngineError, WorkerLostError } from '../../common/errors.js';
import { createLogger } from '../../common/log.js';
import { packageVersion } from '../../common/package-root.js';
import type { CoordinatorMessage } from '../../proto/generated/tandem/v1/CoordinatorMessage.js';
import { encodeResultBody, type StepExtendResult } from '../../common/step-codec.js';
import { EpochEndedError, type EngineStep } from './engine.js';
import { WorkerGroup, type WorkerGroupOptions } from './worker-group.js';

const HEARTBEAT_MS = 100;
const STEP_TIMEOUT_MS = 5000;
const VOCAB_SIZE = 50;

/** The worker's end of a link: what it was told, and a way to say something. */
class FakeLink extends EventEmitter {
  readonly told: CoordinatorMessage[] = [];
  isEnded = false;

  write(message: CoordinatorMessage): boolean {
    this.told.push(message);
    return true;
  }
  end(): void {
    this.isEnded = true;
  }
  say(message: object): void {
    this.emit('data', message);
  }
  hello(rank: number, change: object = {}): void {
    this.say({
      hello: {
        rank,
        pid: 100 + rank,
        device: 'cpu',
        isa: 'generic',
        totalMemoryBytes: '1000',
        version: packageVersion,
        token: 'secret',
        ...change,
      },
    });
  }
  get lastStepId(): number {
    return this.told.filter(({ step }) => step).at(-1)!.step!.stepId!;
  }
}

const dismissed: [rank: number, isCulprit: boolean][] = [];
let group: WorkerGroup;

function create(change: Partial<WorkerGroupOptions> = {}): WorkerGroup {
  return new WorkerGroup({
    worldSize: 2,
    modelPath: '/store',
    threads: 1,
    engine: { kvDtype: 'fp16', isa: 'auto', activations: 'int8', quantizeEmbedding: 'none' },
    kvBlockSize: 16,
    kvBlocks: () => 8,
    maxBatchTokens: 64,
    collectiveTimeoutMs: 1000,
    stepTimeoutMs: STEP_TIMEOUT_MS,
    heartbeatMs: HEARTBEAT_MS,
    token: 'secret',
    vocabSize: VOCAB_SIZE,
    numLayers: 4,
    log: createLogger('test', 'silent'),
    onAttached: () => {},
    onDismissed: (rank, isCulprit) => dismissed.push([rank, isCulprit]),
    ...change,
  });
}

function attach(rank: number, change: object = {}): FakeLink {
  const link = new FakeLink();
  link.on('error', () => {});
  group.attach(link as never);
  link.hello(rank, change);
  return link;
}

function ready(...links: FakeLink[]): void {
  for (const link of links) link.say({ ready: { epoch: group.epoch, memory: null, loadMs: 1 } });
}

function bothReady(): [FakeLink, FakeLink] {
  const links: [FakeLink, FakeLink] = [attach(0), attach(1)];
  ready(...links);
  return links;
}

const noise = { seed: 1n, stream: 0, position: 0 };
const params = { temperature: 1, topK: 0, topP: 0, bannedTokens: [], biasTokens: [], biases: [], repetitionPenalty: 1, repeatedTokens: [] };
const sampleStep: EngineStep = {
  blockCopies: [],
  extends: [
    {
      tokens: [1],
      positions: [0],
      blockTable: [0],
      cachedTokens: 0,
      bidirectionalTokens: 0,
      firstLayer: 0,
      endLayer: 4,
      want: { kind: 'sample', params, noise, topLogprobs: 1 },
      sampledBy: -1,
    },
  ],
};
const sampleResult: Extract<StepExtendResult, { kind: 'sample' }> = {
  kind: 'sample',
  token: 7,
  logprob: -1,
  topTokens: [7],
  topLogprobs: [-1],
};
const answer = (stepId: number, results: StepExtendResult[]) => ({
  result: { stepId, body: encodeResultBody(results), evaluateMicros: 0, computeMicros: 5, collectiveMicros: 1, error: '' },
});

beforeEach(() => {
  vi.useFakeTimers();
  dismissed.length = 0;
  group = create();
});
afterEach(async () => {
  await group.close();
  vi.useRealTimers();
});

test('an epoch begins when all ranks are there, and steps run when all are ready', async () => {
  const first = attach(0);
  expect(first.told).toEqual([]);
  const second = attach(1);
  const [assignment] = first.told;
  expect(assignment!.assignment).toMatchObject({ epoch: 1, worldSize: 2, kvBlocks: 8, modelPath: '/store' });
  expect(second.told).toEqual(first.told);
  await expect(group.step(sampleStep)).rejects.toThrow(EpochEndedError);

  const isReady = group.ready();
  ready(first, second);
  await isReady;
  const result = group.step(sampleStep);
  expect(second.told.at(-1)).toEqual(first.told.at(-1));
  second.say(answer(1, []));
  first.say(answer(1, [sampleResult]));
  expect((await result).results).toEqual([{ ...sampleResult, topTokens: Uint32Array.of(7), topLogprobs: Float32Array.of(-1) }]);
});

describe('a worker is refused', () => {
  test.each([
    { name: 'with a wrong token', rank: 0, change: { token: 'guess' }, message: 'wrong worker token' },
    { name: 'of another version', rank: 0, change: { version: '0.0.0' }, message: 'worker is version 0.0.0' },
    { name: 'with a rank that there is not', rank: 2, change: {}, message: 'ranks are 0 to 1' },
    { name: 'for a rank that is taken', rank: 1, change: {}, message: 'rank 1 is attached already' },
  ])('$name, also when it tries again on the same link', ({ rank, change, message }) => {
    attach(1);
    const link = new FakeLink();
    const errors: Error[] = [];
    link.on('error', (error: Error) => errors.push(error));
    group.attach(link as never);
    link.hello(rank, change);
    expect(errors.map((error) => error.message)).toEqual([expect.stringContaining(message)]);
    link.hello(0);
    expect(group.snapshot().map(({ state }) => state)).toEqual(['absent', 'loading']);
  });
});

describe('an answer that was not asked for ends the epoch', () => {
  test.each<{ name: string; results: StepExtendResult[] }>([
    { name: 'too many', results: [sampleResult, sampleResult] },
    { name: 'none', results: [] },
    { name: 'another kind', results: [{ kind: 'targets', logprobs: [1] }] },
    { name: 'a token beyond the vocabulary', results: [{ ...sampleResult, token: VOCAB_SIZE }] },
    { name: 'too few best tokens', results: [{ ...sampleResult, topTokens: [] }] },
  ])('$name', async ({ results }) => {
    const [first, second] = bothReady();
    const step = group.step(sampleStep);
    second.say(answer(1, []));
    first.say(answer(1, results));
    await expect(step).rejects.toThrow(/^rank 0: /);
    await expect(step).rejects.toThrow(EpochEndedError);
    expect(dismissed).toEqual([
      [0, true],
      [1, false],
    ]);
  });
});

test('a step that every rank refuses alike fails, and the epoch goes on', async () => {
  const [first, second] = bothReady();
  const refused = group.step(sampleStep);
  for (const link of [first, second]) link.say({ result: { ...answer(1, []).result, error: 'extends[0].tokens: 99' } });
  await expect(refused).rejects.toThrow(EngineError);
  expect(group.isReady).toBe(true);
  const next = group.step(sampleStep);
  expect(first.lastStepId).toBe(2);
  second.say(answer(2, []));
  first.say(answer(2, [sampleResult]));
  await next;
});

test('a rank that does not answer a step in time is named and to blame', async () => {
  const [first, second] = bothReady();
  const step = group.step(sampleStep);
  const ended = expect(step).rejects.toThrow(`step 1: no result from rank 1 within ${STEP_TIMEOUT_MS} ms`);
  first.say(answer(1, [sampleResult]));
  for (let i = 0; i < STEP_TIMEOUT_MS / HEARTBEAT_MS; i++) {
    for (const link of [first, second]) link.say({ heartbeat: { epoch: 1, lastStep: 1, memory: null } });
    await vi.advanceTimersByTimeAsync(HEARTBEAT_MS);
  }
  await ended;
  expect(dismissed).toEqual([
    [0, false],
    [1, true],
  ]);
});

test('two steps may be under way, a third may not; a rank may be through with both before another is with the first', async () => {
  const [first, second] = bothReady();
  const done: number[] = [];
  const steps = [1, 2].map((number) => group.step(sampleStep).then(() => done.push(number)));
  expect(() => group.step(sampleStep)).toThrow('2 steps are under way');
  for (const stepId of [1, 2]) second.say(answer(stepId, []));
  first.say(answer(1, [sampleResult]));
  await steps[0];
  expect(done).toEqual([1]);
  first.say(answer(2, [sampleResult]));
  await steps[1];
  expect(done).toEqual([1, 2]);
});

test('the time of a step begins when the one before it has ended', async () => {
  const [first, second] = bothReady();
  const alive = async (ms: number): Promise<void> => {
    for (let i = 0; i < ms / HEARTBEAT_MS; i++) {
      for (const link of [first, second]) link.say({ heartbeat: { epoch: 1, lastStep: 1, memory: null } });
      await vi.advanceTimersByTimeAsync(HEARTBEAT_MS);
    }
  };
  const steps = [group.step(sampleStep), group.step(sampleStep)];
  const ended = expect(steps[1]).rejects.toThrow(`step 2: no result from rank 0 within ${STEP_TIMEOUT_MS} ms`);
  await alive(STEP_TIMEOUT_MS - HEARTBEAT_MS);
  second.say(answer(1, []));
  second.say(answer(2, []));
  first.say(answer(1, [sampleResult]));
  await steps[0];
  await alive(STEP_TIMEOUT_MS - HEARTBEAT_MS);
  expect(dismissed).toEqual([]);
  await alive(HEARTBEAT_MS);
  await ended;
  expect(dismissed).toEqual([
    [0, true],
    [1, false],
  ]);
});

test('all steps under way are lost with a rank', async () => {
  const [, second] = bothReady();
  const steps = [group.step(sampleStep), group.step(sampleStep)];
  second.emit('cancelled');
  for (const step of steps) await expect(step).rejects.toThrow(EpochEndedError);
});

test.each([
  { name: 'while idle', isLoaded: true },
  { name: 'while loading', isLoaded: false },
])('a rank without heartbeat is found $name', async ({ isLoaded }) => {
  const links = [attach(0), attach(1)];
  if (isLoaded) ready(...links);
  for (let i = 0; i < 12; i++) {
    links[0]!.say({ heartbeat: { epoch: 1, lastStep: 0, memory: null } });
    await vi.advanceTimersByTimeAsync(HEARTBEAT_MS);
  }
  expect(dismissed).toEqual([
    [0, false],
    [1, true],
  ]);
  expect(links.map(({ told }) => told.at(-1))).toEqual([{ abort: { epoch: 1 } }, { abort: { epoch: 1 } }]);
});

test('how far a rank has loaded is known from its heartbeats until it is ready', async () => {
  const [first, second] = [attach(0), attach(1)];
  const nothing = { doneBytes: 0, totalBytes: 0 };
  expect(group.snapshot().map(({ loading }) => loading)).toEqual([nothing, nothing]);
  first.say({ heartbeat: { epoch: 1, lastStep: 0, memory: null, loading: { doneBytes: '300', totalBytes: '1000' } } });
  expect(group.snapshot().map(({ loading }) => loading)).toEqual([{ doneBytes: 300, totalBytes: 1000 }, nothing]);
  ready(first, second);
  expect(group.snapshot().map(({ loading }) => loading)).toEqual([nothing, nothing]);
});

test('when a rank is lost the step fails, the others leave, and the next epoch begins with all of them', async () => {
  const [first, second] = bothReady();
  const step = group.step(sampleStep);
  second.emit('cancelled');
  await expect(step).rejects.toThrow('rank 1 was lost');
  expect(first.told.at(-1)).toEqual({ abort: { epoch: 1 } });
  expect(first.isEnded).toBe(true);
  first.emit('end'); // what it still does is of no interest

  const again = [attach(1), attach(0)];
  expect(group.epoch).toBe(2);
  const communicators = [first, again[0]!].map(({ told }) => told[0]!.assignment!.communicator);
  expect(communicators[0]).not.toBe(communicators[1]);
  for (const link of again) link.say({ ready: { epoch: 1, memory: null, loadMs: 1 } }); // of an epoch that is over
  expect(group.isReady).toBe(false);
  ready(...again);
  expect(group.isReady).toBe(true);
});

test('a rank that leaves before the group is complete does not send the others away', async () => {
  await group.close();
  group = create({ worldSize: 3 });
  const first = attach(0);
  attach(1).emit('cancelled');
  expect(group.snapshot().map(({ state }) => state)).toEqual(['loading', 'absent', 'absent']);
  expect(first.told).toEqual([]);
  expect(dismissed).toEqual([]);
});

test('a shard that cannot be loaded ends it for good, with the reason', async () => {
  const [first] = [attach(0), attach(1)];
  const failed = expect(group.failed).rejects.toThrow('rank 0: tensor x has shape [1]');
  const waiting = expect(group.ready()).rejects.toThrow(WorkerLostError);
  first.say({ error: { epoch: 1, code: 'CHECKPOINT', message: 'tensor x has shape [1]' } });
  await failed;
  await waiting;
  await expect(group.step(sampleStep)).rejects.toThrow(WorkerLostError);
});

test('giving up says what ended the last epoch', async () => {
  const [, second] = bothReady();
  second.emit('cancelled');
  group.giveUp('worker 1 ended 6 times within a minute');
  await expect(group.ready()).rejects.toThrow('worker 1 ended 6 times within a minute; the last epoch ended because: rank 1 was lost');
});
