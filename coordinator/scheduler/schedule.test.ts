import fc from 'fast-check';
import { expect, test } from 'vitest';
import {
  schedule,
  type PendingExtend,
  type RunningRequest,
  type SchedulerState,
  type StepLimits,
  type WaitingRequest,
} from './schedule.js';
import type { StepCost } from './step-cost.js';

/** A step of 16 tokens; a run of 32 tokens fills it with 4 of the 8 layers. */
const limits: StepLimits = { stepTokens: 16, maxBatchTokens: 200, maxExtends: 6, numLayers: 8 };

interface Extend {
  tokens: number;
  newBlocks?: number;
  shared?: { block: number; holders: number } | undefined;
  context?: string | undefined;
}

interface Asked {
  key?: string;
  priority?: number;
  maxSequences?: number;
  /** Run lengths, or more of the Extends. */
  runs?: readonly (number | Extend)[];
  /** Default: the order in which they are written, the running ones first. */
  id?: number;
}

interface State {
  /** By name; 1 block each. */
  running?: Record<string, Asked & { blocks?: number; ownBlocks?: number; lastStep?: number }>;
  /** By name; they need 1 block each. */
  waiting?: Record<string, Asked & { needs?: number; heldBack?: boolean }>;
  free?: number;
  total?: number;
  counters?: Record<string, number>;
  weights?: Record<string, number>;
  /** Name of the running request whose (first) run is under way. */
  slice?: readonly [string, nextLayer: number];
  limits?: Partial<StepLimits>;
  /** What a step of no tokens takes, and each of them. */
  msPerStepAndToken?: readonly [number, number] | null;
}

interface Expected {
  preempt?: string;
  admit?: readonly string[];
  run?: readonly string[];
  slice?: readonly [string, firstLayer: number, endLayer: number];
}

class Extended implements PendingExtend {
  readonly runTokens: number;
  readonly newBlocks: number;
  readonly sharedBlock: number;
  readonly sharedHolders: number;
  readonly computesContext: string | null;
  constructor(
    readonly of: string,
    extend: number | Extend,
  ) {
    const { tokens, newBlocks = 0, shared, context = null } = typeof extend === 'number' ? { tokens: extend } : extend;
    this.runTokens = tokens;
    this.newBlocks = newBlocks;
    this.sharedBlock = shared?.block ?? -1;
    this.sharedHolders = shared?.holders ?? 0;
    this.computesContext = context;
  }
}

type Named = { readonly name: string };

function stateOf(state: State): SchedulerState<RunningRequest & Named, WaitingRequest & Named> {
  let nextId = 1;
  const common = (name: string, { key = 'a', priority = 0, maxSequences = 1, runs = [1], id }: Asked) => ({
    name,
    id: id ?? nextId++,
    key,
    priority,
    maxSequences,
    pending: runs.map((run) => new Extended(name, run)),
  });
  const order = (a: { priority: number; id: number }, b: { priority: number; id: number }) => b.priority - a.priority || a.id - b.id;
  const running = Object.entries(state.running ?? {})
    .map(([name, asked]) => ({
      ...common(name, asked),
      blocks: asked.blocks ?? 1,
      ownBlocks: asked.ownBlocks ?? asked.blocks ?? 1,
      lastStep: asked.lastStep ?? 0,
    }))
    .sort(order);
  const waiting = Object.entries(state.waiting ?? {})
    .map(([name, asked]) => ({ ...common(name, asked), neededBlocks: asked.needs ?? 1, isHeldBack: asked.heldBack ?? false }))
    .sort(order);
  const keys = [...new Set([...running, ...waiting].map(({ key }) => key))];
  const sliced = running.find(({ name }) => name === state.slice?.[0])?.pending[0];
  return {
    running,
    queues: keys.map((key) => waiting.filter((request) => request.key === key)),
    keys: new Map(keys.map((key) => [key, { weight: state.weights?.[key] ?? 1, counter: state.counters?.[key] ?? 0 }])),
    slice: sliced ? { extend: sliced, runTokens: sliced.runTokens, nextLayer: state.slice![1] } : null,
    freeBlocks: state.free ?? 100,
    totalBlocks: state.total ?? 100,
    stepCost: costOf(state.msPerStepAndToken ?? null),
  };
}

function costOf(line: readonly [number, number] | null): StepCost | null {
  return line && [1, 400].map((tokens) => ({ tokens, ms: line[0] + line[1] * tokens }));
}

function planOf(state: State): Required<Omit<Expected, 'preempt' | 'slice'>> & Pick<Expected, 'preempt' | 'slice'> {
  const plan = schedule(stateOf(state), { ...limits, ...state.limits });
  return {
    ...(plan.preempt ? { preempt: plan.preempt.name } : {}),
    admit: plan.admit.map(({ name }) => name),
    run: plan.run.map((extend) => (extend as Extended).of),
    ...(plan.slice ? { slice: [(plan.slice.extend as Extended).of, plan.slice.firstLayer, plan.slice.endLayer] as const } : {}),
  };
}

function check({ state, plan }: { state: State; plan: Expected }): void {
  expect(planOf(state)).toEqual({ admit: [], run: [], ...plan });
}

interface Case {
  readonly name: string;
  readonly state: State;
  readonly plan: Expected;
}

const decoding: Case[] = [
  { name: 'nothing to do is an empty plan', state: {}, plan: {} },
  { name: 'all sequences decode together', state: { running: { A: { runs: [1, 1] }, B: {} } }, plan: { run: ['A', 'A', 'B'] } },
  {
    name: 'decoding goes before a longer run that came earlier',
    state: { running: { A: { runs: [14] }, B: {}, C: {} } },
    plan: { run: ['B', 'C', 'A'] },
  },
  {
    name: 'decoding goes before a longer run of a higher priority',
    state: { running: { A: {}, B: { runs: [16], priority: 1 } } },
    plan: { run: ['A'], slice: ['B', 0, 7] },
  },
  {
    name: 'decoding is never more than the Extends of a step',
    state: { running: { A: { runs: [1, 1, 1, 1, 1, 1, 1, 1], maxSequences: 8 } } },
    plan: { run: ['A', 'A', 'A', 'A', 'A', 'A'] },
  },
  {
    name: 'a run under way by layers counts among the Extends of a step',
    state: { running: { A: { runs: [32] }, B: { runs: [1, 1, 1, 1, 1, 1], maxSequences: 6 } }, slice: ['A', 2] },
    plan: { run: ['B', 'B', 'B', 'B', 'B'], slice: ['A', 2, 4] },
  },
  {
    name: 'an Extend that is computed already is chosen with the decoding ones',
    state: { running: { A: { runs: [0] }, B: { runs: [16] } } },
    plan: { run: ['A', 'B'] },
  },
];

const slicing: Case[] = [
  { name: 'a run that fills the step is not sliced', state: { running: { A: { runs: [16] } } }, plan: { run: ['A'] } },
  {
    name: 'a longer run begins with the layers that the step has room for',
    state: { running: { A: { runs: [32] } } },
    plan: { slice: ['A', 0, 4] },
  },
  {
    name: 'what decoding takes is not there for the layers',
    state: { running: { A: { runs: [1, 1, 1, 1], maxSequences: 4 }, B: { runs: [32] } } },
    plan: { run: ['A', 'A', 'A', 'A'], slice: ['B', 0, 3] },
  },
  { name: 'the longest run goes on by one layer at least', state: { running: { A: { runs: [200] } } }, plan: { slice: ['A', 0, 1] } },
  {
    name: 'at most one run is sliced',
    state: { running: { A: { runs: [32] }, B: { runs: [32] } } },
    plan: { slice: ['A', 0, 4] },
  },
  {
    name: 'a run under way goes on where it was',
    state: { running: { A: { runs: [32] } }, slice: ['A', 3] },
    plan: { slice: ['A', 3, 7] },
  },
  {
    name: 'a run under way ends with the last layer',
    state: { running: { A: { runs: [32] } }, slice: ['A', 6] },
    plan: { slice: ['A', 6, 8] },
  },
  {
    name: 'while others wait a run under way leaves them half of the step',
    state: { running: { A: { runs: [32] } }, waiting: { B: { runs: [8] } }, slice: ['A', 2] },
    plan: { admit: ['B'], run: ['B'], slice: ['A', 2, 4] },
  },
  {
    name: 'what those who wait can not use goes to the run under way',
    state: { running: { A: { runs: [32] } }, waiting: { B: { runs: [8], needs: 9 } }, free: 5, slice: ['A', 2] },
    plan: { slice: ['A', 2, 6] },
  },
  {
    name: 'a run under way gets a quarter of the step, however many decode',
    state: {
      running: { A: { runs: [16] }, B: { runs: Array<number>(16).fill(1), maxSequences: 16 } },
      slice: ['A', 2],
      limits: { maxExtends: 32 },
    },
    plan: { run: Array<string>(16).fill('B'), slice: ['A', 2, 4] },
  },
  {
    name: 'a run begins with a quarter of the step, however many decode',
    state: {
      running: { B: { runs: Array<number>(20).fill(1), maxSequences: 20 } },
      waiting: { A: { runs: [16] } },
      limits: { maxExtends: 32 },
    },
    plan: { admit: ['A'], run: Array<string>(20).fill('B'), slice: ['A', 0, 2] },
  },
  {
    name: 'a run is not begun beside others that with all its tokens are more than the engine has room for',
    state: { running: { A: { runs: [12] }, B: { runs: [10] } }, limits: { maxBatchTokens: 20 } },
    plan: { run: ['A'] },
  },
  {
    name: 'no run is taken beside one under way that with all its tokens are more than the engine has room for',
    state: { running: { A: { runs: [32] }, B: { runs: [6] } }, limits: { maxBatchTokens: 36 }, slice: ['A', 4] },
    plan: { slice: ['A', 4, 8] },
  },
];

const order: Case[] = [
  {
    name: 'waiting requests begin in arrival order while there is room',
    state: { waiting: { A: { runs: [7] }, B: { runs: [7] }, C: { runs: [7] } } },
    plan: { admit: ['A', 'B', 'C'], run: ['A', 'B'], slice: ['C', 0, 4] },
  },
  {
    name: 'a short prompt does not overtake a long one of its key',
    state: { running: { S: { runs: [32] } }, waiting: { A: { runs: [30] }, B: { runs: [2] } }, slice: ['S', 0] },
    plan: { slice: ['S', 0, 4] },
  },
  {
    name: 'a request that needs few blocks does not overtake one of its key that waits for many',
    state: { running: { R: {} }, waiting: { A: { needs: 50 }, B: { needs: 1 } }, free: 20 },
    plan: { run: ['R'] },
  },
  {
    name: 'a waiting request goes before a run that a newer one asks for',
    state: { running: { N: { runs: [10], id: 9 } }, waiting: { A: { runs: [10], id: 5 } } },
    plan: { admit: ['A'], run: ['A'], slice: ['N', 0, 4] },
  },
  {
    name: 'a run that an older request asks for goes before a waiting one',
    state: { running: { N: { runs: [10], id: 5 } }, waiting: { A: { runs: [10], id: 9 } } },
    plan: { admit: ['A'], run: ['N'], slice: ['A', 0, 4] },
  },
  {
    name: 'the key with the lowest counter goes first',
    state: { waiting: { A: { runs: [12], key: 'a' }, B: { runs: [12], key: 'b' } }, counters: { a: 7, b: 5 } },
    plan: { admit: ['B', 'A'], run: ['B'], slice: ['A', 0, 2] },
  },
  {
    name: 'what the step itself runs counts, so keys take turns',
    state: {
      waiting: {
        A1: { runs: [3], key: 'a' },
        A2: { runs: [3], key: 'a' },
        A3: { runs: [3], key: 'a' },
        B1: { runs: [3], key: 'b' },
        B2: { runs: [3], key: 'b' },
      },
    },
    plan: { admit: ['A1', 'B1', 'A2', 'B2', 'A3'], run: ['A1', 'B1', 'A2', 'B2', 'A3'] },
  },
  {
    name: 'a key of twice the weight gets twice as much',
    state: {
      waiting: Object.fromEntries(
        Array.from({ length: 12 }, (_, i) => [`${i % 2 === 0 ? 'A' : 'B'}${i}`, { runs: [2], key: i % 2 === 0 ? 'a' : 'b' }]),
      ),
      weights: { a: 2, b: 1 },
    },
    plan: { admit: ['A0', 'B1', 'A2', 'B3', 'A4', 'A6'], run: ['A0', 'B1', 'A2', 'B3', 'A4', 'A6'] },
  },
  {
    name: 'a higher priority goes before a lower counter',
    state: { waiting: { A: { runs: [12], key: 'a' }, B: { runs: [12], key: 'b', priority: 1 } }, counters: { b: 1000 } },
    plan: { admit: ['B', 'A'], run: ['B'], slice: ['A', 0, 2] },
  },
  {
    name: 'a higher priority goes before an older request of its key',
    state: { waiting: { A: { runs: [12] }, B: { runs: [12], priority: 1 } } },
    plan: { admit: ['B', 'A'], run: ['B'], slice: ['A', 0, 2] },
  },
];

const contexts: Case[] = [
  {
    name: 'of identical contexts one is computed, the others are admitted and wait for it',
    state: { waiting: { A: { runs: [{ tokens: 6, context: 'k' }] }, B: { runs: [{ tokens: 6, context: 'k' }] }, C: { runs: [6] } } },
    plan: { admit: ['A', 'B', 'C'], run: ['A', 'C'] },
  },
  {
    name: 'a context that is under way by layers is not computed a second time',
    state: {
      running: { A: { runs: [{ tokens: 32, context: 'k' }] }, B: { runs: [{ tokens: 4, context: 'k' }] } },
      slice: ['A', 4],
    },
    plan: { slice: ['A', 4, 8] },
  },
  {
    name: 'a context that is about to be sliced is not computed a second time',
    state: { waiting: { A: { runs: [{ tokens: 32, context: 'k' }] }, B: { runs: [{ tokens: 32, context: 'k' }] } } },
    plan: { admit: ['A', 'B'], slice: ['A', 0, 4] },
  },
];

const admission: Case[] = [
  {
    name: 'a request begins when there are its blocks and one more for every running sequence',
    state: { running: { R: { maxSequences: 3 } }, waiting: { A: { needs: 5 } }, free: 8 },
    plan: { admit: ['A'], run: ['R', 'A'] },
  },
  {
    name: 'and waits while there is one block less',
    state: { running: { R: { maxSequences: 3 } }, waiting: { A: { needs: 5 } }, free: 7 },
    plan: { run: ['R'] },
  },
  {
    name: 'blocks that decoding appends are not there for newcomers',
    state: { running: { R: { runs: [{ tokens: 1, newBlocks: 1 }] } }, waiting: { A: { needs: 5 } }, free: 6 },
    plan: { run: ['R'] },
  },
  {
    name: 'what the step admits adds up',
    state: { waiting: { A: { needs: 4 }, B: { needs: 4 } }, free: 8 },
    plan: { admit: ['A'], run: ['A'] },
  },
  {
    name: 'alone a request needs no more than its own blocks',
    state: { waiting: { A: { needs: 8 } }, free: 8 },
    plan: { admit: ['A'], run: ['A'] },
  },
  {
    name: 'sequences of all requests stay within the Extends of a step',
    state: { running: { R: { maxSequences: 4 } }, waiting: { A: { maxSequences: 2 }, B: { maxSequences: 1 } } },
    plan: { admit: ['A'], run: ['R', 'A'] },
  },
  {
    name: 'a request of more sequences than a step takes runs alone',
    state: { waiting: { A: { maxSequences: 9 }, B: {} } },
    plan: { admit: ['A'], run: ['A'] },
  },
  {
    name: 'a request that gave up its blocks for this step is left out of it, and so is what is behind it',
    state: { running: { R: {} }, waiting: { A: { heldBack: true }, B: {}, C: { key: 'c' } } },
    plan: { admit: ['C'], run: ['R', 'C'] },
  },
];

const shared: Case[] = [
  {
    name: 'all but the last holder of a shared block need a copy',
    state: {
      running: { R: { maxSequences: 3, runs: Array<Extend>(3).fill({ tokens: 1, shared: { block: 4, holders: 3 } }) } },
      free: 2,
    },
    plan: { run: ['R', 'R', 'R'] },
  },
  {
    name: 'a fork waits while there is no block for its copy',
    state: {
      running: { R: { maxSequences: 3, runs: Array<Extend>(3).fill({ tokens: 1, shared: { block: 4, holders: 3 } }) } },
      free: 1,
    },
    plan: { run: ['R'] },
  },
];

/** So that shares are those of the blocks. */
const manySequences = { maxExtends: 100 };

const preemption: Case[] = [
  {
    name: 'who waits for blocks leaves his turn to another one of his key',
    state: {
      running: { A: { lastStep: 9 }, B: { lastStep: 8, runs: [{ tokens: 1, newBlocks: 1 }] } },
      waiting: { C: { key: 'c', needs: 90, runs: [1] } },
      free: 0,
      msPerStepAndToken: [1, 100],
      counters: { c: 1 },
    },
    plan: { run: ['A'] },
  },
  {
    name: 'where a running request finds no block the newest gives up its own',
    state: { running: { A: { runs: [{ tokens: 1, newBlocks: 1 }] }, B: {}, C: {} }, free: 0 },
    plan: { preempt: 'C' },
  },
  {
    name: 'the lowest priority goes before the newest',
    state: { running: { A: { runs: [{ tokens: 1, newBlocks: 1 }] }, B: { priority: -1 }, C: {} }, free: 0 },
    plan: { preempt: 'B' },
  },
  {
    name: 'of one priority it is the key that holds most',
    state: {
      running: { A: { key: 'b', blocks: 50 }, B: { blocks: 20, runs: [{ tokens: 1, newBlocks: 1 }] }, C: { blocks: 20 } },
      free: 0,
      limits: manySequences,
    },
    plan: { preempt: 'A' },
  },
  {
    name: 'a key of more weight may hold more',
    state: {
      running: { A: { key: 'b', blocks: 50 }, B: { blocks: 20, runs: [{ tokens: 1, newBlocks: 1 }] }, C: { blocks: 20 } },
      weights: { b: 3 },
      free: 0,
      limits: manySequences,
    },
    plan: { preempt: 'C' },
  },
  {
    name: 'who is worth least waits itself, and the others go on',
    state: { running: { A: {}, B: { runs: [{ tokens: 1, newBlocks: 1 }] } }, free: 0 },
    plan: { run: ['A'] },
  },
  {
    name: 'nobody is preempted who has no blocks to give',
    state: { running: { A: { runs: [{ tokens: 1, newBlocks: 1 }] }, B: {}, C: { blocks: 0, runs: [16] } }, free: 0 },
    plan: { preempt: 'B' },
  },
  {
    name: 'nobody is preempted for a request that is worth less, even if all that are worth less still have no blocks',
    state: { running: { A: {}, B: { blocks: 0, runs: [{ tokens: 4, newBlocks: 2 }] } }, free: 1 },
    plan: { run: ['A'] },
  },
  {
    name: 'a longer run that finds no blocks preempts, too',
    state: { running: { A: { runs: [{ tokens: 6, newBlocks: 2 }] }, B: {} }, free: 1 },
    plan: { preempt: 'B' },
  },
  {
    name: 'where everything fits nobody is preempted',
    state: { running: { A: { runs: [{ tokens: 1, newBlocks: 1 }] }, B: { runs: [{ tokens: 1, newBlocks: 1 }], priority: -1 } }, free: 2 },
    plan: { run: ['A', 'B'] },
  },
];

const newcomers: Case[] = [
  {
    name: 'a newcomer preempts a lower priority',
    state: { running: { A: { blocks: 9, priority: -1 } }, waiting: { N: { needs: 5 } }, free: 1 },
    plan: { preempt: 'A' },
  },
  {
    name: 'but not its own priority of its key',
    state: { running: { A: { blocks: 9 } }, waiting: { N: { needs: 5 } }, free: 1 },
    plan: { run: ['A'] },
  },
  {
    name: 'a newcomer preempts the newest of a key that keeps its share',
    state: { running: { A: { blocks: 50 }, B: { blocks: 40 } }, waiting: { N: { needs: 45, key: 'n' } }, free: 10, limits: manySequences },
    plan: { preempt: 'B' },
  },
  {
    name: 'but not if that key then held less than its share',
    state: { running: { A: { blocks: 45 }, B: { blocks: 45 } }, waiting: { N: { needs: 45, key: 'n' } }, free: 10, limits: manySequences },
    plan: { run: ['A', 'B'] },
  },
  {
    name: 'unless the key of the newcomer has less than half of its own',
    state: {
      running: { A: { blocks: 30 }, B: { blocks: 30 }, C: { key: 'c', blocks: 20 }, D: { key: 'c', blocks: 20 } },
      waiting: { N: { needs: 16, key: 'n' } },
      free: 0,
      limits: manySequences,
    },
    plan: { preempt: 'B' },
  },
  {
    name: 'and even then not if the other one was left with less than the newcomer',
    state: {
      running: { A: { blocks: 50 }, B: { blocks: 9 } },
      waiting: { N: { needs: 20, key: 'n' } },
      weights: { a: 4 },
      free: 10,
      total: 70,
      limits: manySequences,
    },
    plan: { run: ['A', 'B'] },
  },
  {
    name: 'a key of more weight may take more',
    state: {
      running: { A: { blocks: 45 }, B: { blocks: 45 } },
      waiting: { N: { needs: 45, key: 'n' } },
      weights: { n: 2 },
      free: 10,
      limits: manySequences,
    },
    plan: { preempt: 'B' },
  },
  {
    name: 'a newcomer preempts nobody if even then it had no room',
    state: {
      running: { A: { blocks: 60 }, B: { blocks: 20, priority: -1 } },
      waiting: { N: { needs: 50 } },
      free: 20,
    },
    plan: { run: ['A', 'B'] },
  },
  {
    name: 'blocks that a request shares with others do not count as room',
    state: {
      running: { A: { blocks: 60 }, B: { blocks: 40, ownBlocks: 10, priority: -1 } },
      waiting: { N: { needs: 40 } },
      free: 20,
    },
    plan: { run: ['A', 'B'] },
  },
  {
    name: 'sequences are shared out like blocks',
    state: {
      running: Object.fromEntries(Array.from({ length: 6 }, (_, i) => [`G${i}`, { blocks: 1 }])),
      waiting: { N: { needs: 20, key: 'n' } },
    },
    plan: { preempt: 'G5' },
  },
  {
    name: 'a newcomer of the highest priority may preempt everybody, and then needs only its own blocks',
    state: { running: { A: { blocks: 50 }, B: { blocks: 50 } }, waiting: { N: { needs: 100, priority: 1 } }, free: 0 },
    plan: { preempt: 'B' },
  },
];

const blocked: Case[] = [
  {
    name: 'while a key waits for blocks others go on within their shares',
    state: { running: { R: { blocks: 50 } }, waiting: { A: { needs: 60 }, B: { key: 'b', needs: 10 } }, free: 50, counters: { b: 9 } },
    plan: { admit: ['B'], run: ['R', 'B'] },
  },
  {
    name: 'but not beyond',
    state: {
      running: { R: { blocks: 30 }, S: { key: 'b', blocks: 45 } },
      waiting: { A: { needs: 40 }, B: { key: 'b', needs: 10 } },
      free: 25,
      counters: { b: 9 },
    },
    plan: { run: ['R', 'S'] },
  },
  {
    name: 'a key that waits for blocks does not take what another one frees for it in between',
    state: { running: { R: { blocks: 50 } }, waiting: { A: { needs: 60 }, A2: { needs: 1 } }, free: 50 },
    plan: { run: ['R'] },
  },
  {
    name: 'others wait, too, once they have gone on for long enough',
    state: {
      running: { R: { blocks: 50 } },
      waiting: { A: { needs: 60 }, B: { key: 'b', needs: 10 } },
      free: 50,
      counters: { a: 5, b: 5 + 2 + 64 * 16 + 1 }, // the step decodes a token of R, too
    },
    plan: { run: ['R'] },
  },
];

test.each(decoding)('decoding: $name', check);
test.each(slicing)('slicing: $name', check);
test.each(order)('order: $name', check);
test.each(contexts)('contexts: $name', check);
test.each(admission)('admission: $name', check);
test.each(shared)('shared blocks: $name', check);
test.each(preemption)('preemption: $name', check);
test.each(newcomers)('newcomers: $name', check);
test.each(blocked)('waiting for blocks: $name', check);

test.each<{ name: string; state: State; charges: Record<string, number> }>([
  { name: 'a decoded token counts twice', state: { running: { A: { runs: [1, 1] } } }, charges: { a: 4 } },
  { name: 'a token of a prompt once', state: { running: { A: { runs: [7] } } }, charges: { a: 7 } },
  { name: 'over the weight', state: { running: { A: { runs: [1, 6] } }, weights: { a: 4 } }, charges: { a: 2 } },
  { name: 'what is computed already nothing', state: { running: { A: { runs: [0] } } }, charges: {} },
  { name: 'a sliced run by its layers, when it begins', state: { running: { A: { runs: [32] } } }, charges: { a: 16 } },
  { name: 'and when it goes on', state: { running: { A: { runs: [32] } }, slice: ['A', 6] }, charges: { a: 8 } },
])('counters: $name', ({ state, charges }) => {
  expect(Object.fromEntries(schedule(stateOf(state), limits).charges)).toEqual(charges);
});

/** A server of blocks and nothing else: runs take blocks of 4 tokens as they grow and are done in the step that runs them. */
class TinyServer {
  readonly running: Modelled[] = [];
  readonly waiting: Modelled[] = [];
  /** Each with the arrivals, admissions, preemptions and ends before it, but for the victim's own. */
  readonly preempted: { readonly victim: Modelled; readonly events: number; readonly gained: number }[] = [];
  private readonly events: Modelled[] = [];
  private readonly counters = new Map<string, number>();
  private nextId = 1;

  constructor(
    private readonly totalBlocks: number,
    private readonly tinyLimits: StepLimits,
    private readonly msPerStepAndToken: readonly [number, number] | null,
  ) {}

  submit(asked: { key: string; priority: number; prompt: number; newTokens: number }): void {
    const request = { ...asked, id: this.nextId++, done: 0, doneBefore: 0, cached: 0, isHeldBack: false };
    this.waiting.push(request);
    this.events.push(request);
  }

  get free(): number {
    return this.totalBlocks - this.running.reduce((sum, { cached }) => sum + blocksOf(cached), 0);
  }

  step(): void {
    for (;;) {
      const plan = schedule(this.state(), this.tinyLimits);
      if (plan.preempt) {
        const victim = plan.preempt.of;
        const events = this.events.filter((request) => request !== victim).length;
        this.preempted.push({ victim, events, gained: victim.done - victim.doneBefore });
        this.events.push(victim);
        move(victim, this.running, this.waiting);
        victim.cached = 0;
        victim.isHeldBack = true;
        continue;
      }
      const runs = [...plan.run, ...(plan.slice ? [plan.slice.extend] : [])].map((extend) => (extend as ModelledRun).of);
      expect(runs.length + plan.admit.length > 0 || this.running.length + this.waiting.length === 0, 'somebody goes on').toBe(true);
      for (const { of } of plan.admit) {
        move(of, this.waiting, this.running);
        of.doneBefore = of.done;
        this.events.push(of);
      }
      for (const request of runs) {
        request.cached = request.prompt + request.done;
        request.done += 1;
        if (request.done < request.newTokens) continue;
        this.running.splice(this.running.indexOf(request), 1);
        this.events.push(request);
      }
      for (const [key, charge] of plan.charges) this.counters.set(key, (this.counters.get(key) ?? 0) + charge);
      expect(this.free, 'free blocks').toBeGreaterThanOrEqual(0);
      for (const request of this.waiting) request.isHeldBack = false;
      return;
    }
  }

  private state(): SchedulerState<RunningRequest & { of: Modelled }, WaitingRequest & { of: Modelled }> {
    const seen = (of: Modelled) => {
      const pending: PendingExtend[] = [new ModelledRun(of)];
      const blocks = blocksOf(of.cached);
      return { of, id: of.id, key: of.key, priority: of.priority, maxSequences: 1, pending, blocks, ownBlocks: blocks, lastStep: 0 };
    };
    const byPriority = (a: Modelled, b: Modelled) => b.priority - a.priority || a.id - b.id;
    const keys = [...new Set([...this.running, ...this.waiting].map(({ key }) => key))];
    return {
      running: this.running.sort(byPriority).map(seen),
      queues: keys.map((key) =>
        this.waiting
          .filter((request) => request.key === key)
          .sort(byPriority)
          .map((of) => ({ ...seen(of), neededBlocks: blocksOf(of.prompt + of.done), isHeldBack: of.isHeldBack })),
      ),
      keys: new Map(keys.map((key) => [key, { weight: 1, counter: this.counters.get(key) ?? 0 }])),
      slice: null,
      freeBlocks: this.free,
      totalBlocks: this.totalBlocks,
      stepCost: costOf(this.msPerStepAndToken),
    };
  }
}

interface Modelled {
  readonly id: number;
  readonly key: string;
  readonly priority: number;
  readonly prompt: number;
  readonly newTokens: number;
  /** Tokens generated. */
  done: number;
  /** Of which before it began (again). */
  doneBefore: number;
  /** Tokens whose blocks it holds. */
  cached: number;
  isHeldBack: boolean;
}

class ModelledRun implements PendingExtend {
  readonly sharedBlock = -1;
  readonly sharedHolders = 0;
  readonly computesContext = null;
  constructor(readonly of: Modelled) {}
  get runTokens(): number {
    return this.of.prompt + this.of.done - this.of.cached;
  }
  get newBlocks(): number {
    return blocksOf(this.of.prompt + this.of.done) - blocksOf(this.of.cached);
  }
}

function blocksOf(tokens: number): number {
  return Math.ceil(tokens / 4);
}

function move(request: Modelled, from: Modelled[], to: Modelled[]): void {
  from.splice(from.indexOf(request), 1);
  to.push(request);
}

const modelled = fc.record({
  key: fc.constantFrom('a', 'b', 'c'),
  priority: fc.constantFrom(0, 0, 0, 1, -1),
  prompt: fc.integer({ min: 1, max: 60 }),
  newTokens: fc.integer({ min: 1, max: 40 }),
  /** Steps before the next one comes. */
  gap: fc.constantFrom(0, 0, 0, 1, 5, 20),
});

test('planning again and again ends everything, and nobody begins again only to be preempted again', () => {
  let preemptions = 0;
  fc.assert(
    fc.property(
      fc.array(modelled, { minLength: 2, maxLength: 20 }),
      fc.constantFrom(25, 30, 40, 80),
      fc.constantFrom(4, 8, 32),
      fc.constantFrom(null, [10, 0.1] as const, [1, 1] as const),
      (requests, totalBlocks, maxExtends, msPerStepAndToken) => {
        const server = new TinyServer(totalBlocks, { stepTokens: 1000, maxBatchTokens: 2000, maxExtends, numLayers: 8 }, msPerStepAndToken);
        const work = requests.reduce((sum, { newTokens, gap }) => sum + newTokens + gap, 0);
        for (const { gap, ...asked } of requests) {
          server.submit(asked);
          for (let i = 0; i < gap; i++) server.step();
        }
        // At worst one after the other, each token once: a preempted request loses blocks, not tokens.
        for (let i = 0; i <= work; i++) server.step();
        expect({ running: server.running, waiting: server.waiting }).toEqual({ running: [], waiting: [] });
        // Ping-pong: preempted again before the block that was left for everybody is full, while nothing happened to anybody else.
        const { preempted } = server;
        const soon = preempted.filter(({ gained }) => gained < 4);
        const pointless = preempted.filter(({ victim, events, gained }, i) => {
          const before = preempted.slice(0, i).findLast((earlier) => earlier.victim === victim);
          return before?.events === events && gained < 4;
        });
        expect(pointless).toEqual([]);
        expect(soon.length).toBeLessThanOrEqual(2 * requests.length); // nor do several take turns at it
        preemptions += preempted.length;
      },
    ),
    { numRuns: 400 },
  );
  expect(preemptions).toBeGreaterThan(100);
});

const anyExtend = fc.oneof(
  { weight: 3, arbitrary: fc.record({ tokens: fc.constant(1), newBlocks: fc.constantFrom(0, 0, 0, 1) }) },
  {
    weight: 1,
    arbitrary: fc.record({
      tokens: fc.constantFrom(0, 1, 2, 5, 16, 17, 40, 100),
      newBlocks: fc.integer({ min: 0, max: 9 }),
      shared: fc.option(fc.record({ block: fc.constant(0), holders: fc.integer({ min: 2, max: 4 }) }), { nil: undefined }),
      context: fc.option(fc.constantFrom('k', 'l'), { nil: undefined }),
    }),
  },
);
const anyAsked = fc
  .record({
    key: fc.constantFrom('a', 'b', 'c'),
    priority: fc.constantFrom(0, 0, 1, -1),
    runs: fc.array(anyExtend, { minLength: 1, maxLength: 3 }),
  })
  .map((asked) => ({ ...asked, maxSequences: asked.runs.length }));
const named = <T>(prefix: string, arbitrary: fc.Arbitrary<T>, maxLength: number): fc.Arbitrary<Record<string, T>> =>
  fc.array(arbitrary, { maxLength }).map((all) => Object.fromEntries(all.map((each, i) => [`${prefix}${i}`, each])));
const anyState: fc.Arbitrary<State> = fc
  .record({
    running: named('R', fc.tuple(anyAsked, fc.integer({ min: 0, max: 9 })), 8),
    waiting: named('W', fc.tuple(anyAsked, fc.boolean()), 8),
    free: fc.oneof(fc.constant(1000), fc.integer({ min: 0, max: 30 })),
    counters: fc.record({ a: fc.nat({ max: 40 }), b: fc.nat({ max: 40 }), c: fc.nat({ max: 2000 }) }),
    weights: fc.record({ a: fc.constant(1), b: fc.constantFrom(1, 3), c: fc.constant(1) }),
    nextLayer: fc.option(fc.integer({ min: 1, max: 7 }), { nil: null }),
    msPerStepAndToken: fc.constantFrom(null, [10, 0.1] as const, [1, 1] as const),
  })
  .map(({ running, waiting, nextLayer, ...rest }) => ({
    ...rest,
    total: 1000,
    // Only sequences of one request share a block that is not full, and only running ones have any.
    running: Object.fromEntries(
      Object.entries(running).map(([name, [asked, blocks]], block) => {
        const runs = asked.runs.map((run) => ('shared' in run && run.shared ? { ...run, shared: { ...run.shared, block } } : run));
        return [name, { ...asked, runs, blocks }];
      }),
    ),
    waiting: Object.fromEntries(
      Object.entries(waiting).map(([name, [asked, heldBack]]) => {
        const needs = asked.runs.reduce((sum, { newBlocks }) => sum + newBlocks + 1, 0);
        const runs = asked.runs.map((run) => ({ ...run, shared: undefined }));
        return [name, { ...asked, runs, needs, heldBack: heldBack && Object.keys(running).length > 0 }];
      }),
    ),
    // Only a run of more than one token is sliced.
    ...(nextLayer !== null && (running['R0']?.[0].runs[0]?.tokens ?? 0) > 1 ? { slice: ['R0', nextLayer] as const } : {}),
  }));

const anyLimits = fc.record({
  stepTokens: fc.constantFrom(4, 16, 50),
  maxBatchTokens: fc.constant(150),
  maxExtends: fc.constantFrom(4, 8, 30),
  numLayers: fc.constant(8),
});

test('a plan keeps to what there is, runs nothing twice, and is never empty where something can run', () => {
  const seen = { preempt: 0, slice: 0, admit: 0 };
  fc.assert(
    fc.property(anyState, anyLimits, (described, given) => {
      const state = stateOf(described);
      const plan = schedule(state, given);
      if (plan.preempt) {
        seen.preempt += 1;
        expect(state.running).toContain(plan.preempt);
        expect(plan.preempt.blocks).toBeGreaterThan(0);
        expect([plan.admit, plan.run, plan.slice]).toEqual([[], [], null]);
        return;
      }
      const runs = [...plan.run, ...(plan.slice ? [plan.slice.extend] : [])];
      expect(new Set(runs).size).toBe(runs.length);
      expect(new Set(plan.admit).size).toBe(plan.admit.length);
      expect(runs.length).toBeLessThanOrEqual(given.maxExtends);

      const owners = new Map<PendingExtend, Named>();
      for (const request of [...state.running, ...plan.admit]) for (const extend of request.pending) owners.set(extend, request);
      for (const run of runs) expect(owners.has(run)).toBe(true);
      for (const request of plan.admit) expect(request.isHeldBack).toBe(false);

      // Blocks: of what runs already, those that it appends and copies; of newcomers, all that they need.
      const admitted = new Set<Named>(plan.admit);
      const writers = new Map<number, number>();
      let blocks = plan.admit.reduce((sum, { neededBlocks }) => sum + neededBlocks, 0);
      for (const run of runs) {
        if (admitted.has(owners.get(run)!) || run === state.slice?.extend) continue;
        const before = writers.get(run.sharedBlock) ?? 0;
        if (run.sharedBlock >= 0) writers.set(run.sharedBlock, before + 1);
        blocks += run.newBlocks + (run.sharedBlock >= 0 && run.sharedHolders - before > 1 ? 1 : 0);
      }
      const isAlone = state.running.length === 0 && plan.admit.length === 1;
      if (!isAlone) expect(blocks).toBeLessThanOrEqual(state.freeBlocks);

      // Tokens: decoding may take the whole step and a run by layers its least; everything else fits.
      const tokens = plan.run.reduce((sum, { runTokens }) => sum + runTokens, 0);
      const decoded = plan.run.filter(({ runTokens }) => runTokens <= 1).length;
      const { slice } = plan;
      const sliced = slice ? (slice.runTokens * (slice.endLayer - slice.firstLayer)) / given.numLayers : 0;
      const oneLayer = slice ? slice.runTokens / given.numLayers : 0;
      expect(tokens + sliced).toBeLessThanOrEqual(Math.max(given.stepTokens, decoded) + Math.max(given.stepTokens / 4, oneLayer) + 1e-9);
      if (tokens > decoded) expect(tokens).toBeLessThanOrEqual(given.stepTokens);
      expect(tokens + (slice?.runTokens ?? 0)).toBeLessThanOrEqual(given.maxBatchTokens);
      if (slice) {
        expect(slice.firstLayer).toBe(state.slice?.extend === slice.extend ? state.slice.nextLayer : 0);
        expect(slice.endLayer).toBeGreaterThan(slice.firstLayer);
        expect(slice.endLayer).toBeLessThanOrEqual(given.numLayers);
      } else expect(state.slice).toBeNull();
      const computing = runs.flatMap(({ computesContext }) => (computesContext === null ? [] : [computesContext]));
      const twice = computing.filter((key, i) => computing.indexOf(key) !== i);
      // Decoding ones are not looked at: whoever has one token to run has its context.
      if (runs.every((run) => run.runTokens > 1 || run.computesContext === null)) expect(twice).toEqual([]);

      // Within a key nobody overtakes.
      for (const queue of state.queues) {
        const taken = queue.filter((request) => admitted.has(request));
        expect(taken).toEqual(queue.slice(0, taken.length));
      }
      const canRun = state.running.length > 0 || state.queues.some(([first]) => first && !first.isHeldBack);
      const isWorstShort = blocksAreShort(state);
      if (canRun && !isWorstShort) expect(runs.length).toBeGreaterThan(0);
      if (plan.admit.length > 0) seen.admit += 1;
      if (slice) seen.slice += 1;
    }),
    { numRuns: 3000 },
  );
  for (const count of Object.values(seen)) expect(count).toBeGreaterThan(50);
});

/** None of the running requests may find its blocks: then the one that is worth most preempts, or is alone and in error. */
function blocksAreShort(state: SchedulerState): boolean {
  return state.running.every(({ pending }) =>
    pending.every(({ newBlocks, sharedBlock }) => newBlocks + (sharedBlock >= 0 ? 1 : 0) > state.freeBlocks),
  );
}

test('nobody is preempted where everything fits', () => {
  fc.assert(
    fc.property(anyState, (described) => {
      const state = stateOf({ ...described, free: 1000 });
      expect(schedule(state, { ...limits, maxExtends: 1000 }).preempt).toBeNull();
    }),
    { numRuns: 1000 },
  );
});
