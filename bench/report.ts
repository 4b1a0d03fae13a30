/** How a run looks in the terminal and in docs/performance.md: the same rows. */
import { formatTable } from '../cli/format.js';
import { BATCH, THREADS } from './contestant.js';
import { CASE_NAMES } from './model-cases.js';
import type { BenchRecord, Comparison, RecordedRun } from './record.js';
import { RATIO_NAMES, RATIO_TITLES, type CaseSummary, type RatioName } from './summary.js';

export const BEGIN_MARK = '<!-- bench:begin -->';
export const END_MARK = '<!-- bench:end -->';

interface Table {
  readonly header: readonly string[];
  readonly rows: readonly (readonly string[])[];
}

/** Ratios that are fractions of a limit. */
const FRACTIONS: readonly RatioName[] = ['decodeOfBandwidth', 'prefillOfPeak'];

export function renderText(isa: string, run: RecordedRun): string {
  const tables = [ratesTable(run), ratiosTable(run), limitsTable(run)];
  return [headline(isa, run), ...tables.map(({ header, rows }) => formatTable(header, rows)), descriptions(run).join('\n')].join('\n\n');
}

export function renderMarkdown(record: BenchRecord): string {
  return Object.entries(record)
    .map(([isa, run]) =>
      [
        `### ${isa}`,
        `${headline(isa, run)}.`,
        ...[ratiosTable(run), ratesTable(run), limitsTable(run)].map(markdownTable),
        descriptions(run)
          .map((line) => `- ${line}`)
          .join('\n'),
      ].join('\n\n'),
    )
    .join('\n\n');
}

/** Puts the text between the markers of the document. @throws Error where it has none, or not in order */
export function replaceSection(document: string, text: string): string {
  const begin = document.indexOf(BEGIN_MARK);
  const end = document.indexOf(END_MARK);
  if (begin < 0 || end < begin) throw new Error(`${BEGIN_MARK} and ${END_MARK} are not there, in this order`);
  return `${document.slice(0, begin + BEGIN_MARK.length)}\n\n${text}\n\n${document.slice(end)}`;
}

export function renderComparisons(comparisons: readonly Comparison[]): string {
  const rows = comparisons.map(({ what, recorded, now, hasFallen }) => [
    what,
    recorded.toFixed(3),
    now.toFixed(3),
    `${((now / recorded - 1) * 100).toFixed(1)} %`,
    hasFallen ? 'FALLEN' : '',
  ]);
  return formatTable(['ratio', 'recorded', 'now', 'change', ''], rows);
}

function headline(isa: string, { date, cpu, compiler, node, repeats }: RecordedRun): string {
  return `${date}, ${cpu}, ${isa} kernels (${compiler}, Node ${node}); medians of ${repeats} rounds, ${THREADS} threads each`;
}

function ratesTable(run: RecordedRun): Table {
  return {
    header: [
      'model',
      'who',
      'decode tok/s',
      `decode tok/s, ${BATCH} streams`,
      'prefill tok/s (tokens)',
      'weights per token',
      'mean step / compute / collectives ms',
    ],
    rows: contestantsOf(run).map(({ summary, name, contestant: { tokensPerSecond, bytesPerToken, stepMs } }) => [
      summary.title,
      name,
      tokensPerSecond.decode.toFixed(2),
      tokensPerSecond.batch.toFixed(2),
      `${tokensPerSecond.prefill.toFixed(1)} (${summary.prefillTokens})`,
      `${(bytesPerToken / 1e6).toFixed(1)} MB`,
      stepMs === null ? '' : [stepMs.total, stepMs.compute, stepMs.collectives].map((ms) => ms.toFixed(2)).join(' / '),
    ]),
  };
}

function ratiosTable(run: RecordedRun): Table {
  const contestants = contestantsOf(run);
  const columns = RATIO_NAMES.filter((ratio) => contestants.some(({ contestant }) => contestant.ratios[ratio] !== undefined));
  return {
    header: ['model', 'who', ...columns.map((ratio) => RATIO_TITLES[ratio])],
    rows: contestants.map(({ summary, name, contestant: { ratios } }) => [
      summary.title,
      name,
      ...columns.map((ratio) => (ratios[ratio] === undefined ? '' : formatRatio(ratio, ratios[ratio]))),
    ]),
  };
}

function limitsTable(run: RecordedRun): Table {
  return {
    header: [
      'limits, measured before each round',
      'read GB/s, 1 thread',
      `${THREADS} threads`,
      'products in registers, GMAC/s',
      'busy with other work',
    ],
    rows: casesOf(run).map(({ title, readBandwidth, productPeak, otherLoad }) => [
      title,
      (readBandwidth.oneThread / 1e9).toFixed(1),
      (readBandwidth.allThreads / 1e9).toFixed(1),
      (productPeak / 1e9).toFixed(0),
      otherLoad === null ? 'unknown' : `${(otherLoad * 100).toFixed(0)} % at most`,
    ]),
  };
}

/** What the contestants say of themselves; said once where it is the same for all cases. */
function descriptions(run: RecordedRun): string[] {
  return [...new Set(contestantsOf(run).map(({ summary, name, contestant }) => `${summary.title}, ${name}: ${contestant.description}`))];
}

function casesOf(run: RecordedRun): CaseSummary[] {
  return CASE_NAMES.flatMap((name) => run.cases[name] ?? []);
}

function contestantsOf(run: RecordedRun) {
  return casesOf(run).flatMap((summary) =>
    Object.entries(summary.contestants).map(([name, contestant]) => ({ summary, name, contestant })),
  );
}

function formatRatio(name: RatioName, value: number): string {
  return FRACTIONS.includes(name) ? `${(value * 100).toFixed(0)} %` : value.toFixed(2);
}

function markdownTable({ header, rows }: Table): string {
  return [header, header.map(() => '---'), ...rows].map((cells) => `| ${cells.join(' | ')} |`).join('\n');
}
