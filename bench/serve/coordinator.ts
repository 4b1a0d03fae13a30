import { percentiles, type Percentiles } from '../../cli/load/summary.js';
import type { CoordinatorRun } from './coordinator-run.js';
import { median, type Part } from './part.js';
import { runProcess } from './processes.js';

const STEPS = 10_000;
const BATCH = 64;
const AIM_US = 150;

const FIGURES = {
  scheduleUs: 'schedule',
  codecUs: 'encode and decode',
  emitUs: 'apply and emit',
  sumUs: 'sum of the three',
  wholeUs: 'all of the event loop',
  submitUs: 'each new request',
} as const satisfies Partial<Record<keyof CoordinatorRun, string>>;

export const coordinator: Part = {
  name: 'coordinator',
  title: `The coordinator's own microseconds per step at batch ${BATCH} (echo engine, ${STEPS} steps of decoding, 2 ranks)`,
  async run({ repeats, progress }) {
    const runs: Record<keyof typeof FIGURES, Percentiles>[] = [];
    for (let repeat = 0; repeat < repeats; repeat++) {
      const run = await runProcess<CoordinatorRun>('coordinator-process.js', ['--steps', String(STEPS), '--batch', String(BATCH)]);
      if (run.leakedBlocks > 0) throw new Error(`${run.leakedBlocks} KV blocks are held by nobody`);
      const figures = Object.keys(FIGURES).map((name) => [name, percentiles(run[name as keyof typeof FIGURES])] as const);
      runs.push(Object.fromEntries(figures) as (typeof runs)[number]);
      progress(`coordinator: ${runs.at(-1)!.sumUs.p50.toFixed(1)} us per step`);
    }
    const measured = Object.entries(FIGURES).map(([name, what]) => {
      const of = (figure: 'p50' | 'p99' | 'mean'): number => median(runs.map((run) => run[name as keyof typeof FIGURES][figure]));
      return { what, p50Us: of('p50'), meanUs: of('mean'), p99Us: of('p99') };
    });
    const sum = measured.find(({ what }) => what === FIGURES.sumUs)!;
    return {
      header: ['microseconds', 'median', 'mean', 'p99'],
      rows: measured.map(({ what, p50Us, meanUs, p99Us }) => [what, ...[p50Us, meanUs, p99Us].map((us) => us.toFixed(1))]),
      notes: [
        `a step costs the coordinator ${sum.p50Us.toFixed(1)} us (aim: under ${AIM_US})`,
        '"all of the event loop" has new requests, garbage collection and the turns of the event loop in it',
      ],
      data: { steps: STEPS, batch: BATCH, aimUs: AIM_US, measured, runs },
      failures: [],
    };
  },
};
