/** bench/record.json: what was measured last with each instruction set, and how a fresh run compares with it. */
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { ConfigError } from '../common/errors.js';
import { packageRoot } from '../common/package-root.js';
import { CASE_NAMES, type CaseName } from './model-cases.js';
import { PEER_NAME } from './peer/peer-contestant.js';
import { RATIO_NAMES, RATIO_TITLES, type CaseSummary } from './summary.js';

/** By instruction set. */
export type BenchRecord = Readonly<Record<string, RecordedRun>>;

export interface RecordedRun {
  readonly date: string;
  readonly cpu: string;
  readonly compiler: string;
  readonly node: string;
  readonly repeats: number;
  readonly cases: Readonly<Partial<Record<CaseName, CaseSummary>>>;
}

/** One ratio of a fresh run beside the recorded one. */
export interface Comparison {
  readonly what: string;
  readonly recorded: number;
  readonly now: number;
  readonly hasFallen: boolean;
}

export const recordFile = join(packageRoot, 'bench', 'record.json');

/** @throws ConfigError where it is no JSON */
export function readRecord(): BenchRecord {
  if (!existsSync(recordFile)) return {};
  try {
    return JSON.parse(readFileSync(recordFile, 'utf8')) as BenchRecord;
  } catch (error) {
    throw new ConfigError(`${recordFile} is no JSON: ${(error as Error).message}`);
  }
}

export function writeRecord(record: BenchRecord): void {
  writeFileSync(recordFile, `${JSON.stringify(record, null, 2)}\n`);
}

/**
 * Every ratio that both runs have, of this project only: absolute rates are the machine's as much as the program's, and the peer's are its own.
 *
 * @param tolerance the part of a recorded ratio that may be missing
 */
export function compareRuns(recorded: RecordedRun, now: RecordedRun, tolerance: number): Comparison[] {
  const comparisons: Comparison[] = [];
  for (const name of CASE_NAMES) {
    for (const [contestant, { ratios }] of Object.entries(now.cases[name]?.contestants ?? {})) {
      const before = recorded.cases[name]?.contestants[contestant]?.ratios;
      if (contestant === PEER_NAME || before === undefined) continue;
      for (const ratio of RATIO_NAMES) {
        const [was, is] = [before[ratio], ratios[ratio]];
        if (was === undefined || is === undefined) continue;
        const what = `${now.cases[name]!.title}, ${contestant}: ${RATIO_TITLES[ratio]}`;
        comparisons.push({ what, recorded: was, now: is, hasFallen: !(is >= was * (1 - tolerance)) });
      }
    }
  }
  return comparisons;
}
