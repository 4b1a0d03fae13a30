/** From rounds to what is reported: medians, and ratios within a round. */
import { PHASES, type Phase, type StepMs } from './contestant.js';
import type { CaseRun, Round } from './measure-case.js';
import type { ModelCase } from './model-cases.js';
import { PEER_NAME } from './peer/peer-contestant.js';

/** Medians over the rounds of everything. */
export interface CaseSummary {
  readonly title: string;
  readonly prefillTokens: number;
  readonly readBandwidth: { readonly oneThread: number; readonly allThreads: number };
  readonly productPeak: number;
  /** The largest, not the median; null where the system does not say. */
  readonly otherLoad: number | null;
  /** By name, in the order in which they were measured. */
  readonly contestants: Readonly<Record<string, ContestantSummary>>;
}

export interface ContestantSummary {
  readonly description: string;
  readonly bytesPerToken: number;
  readonly tokensPerSecond: Readonly<Record<Phase, number>>;
  readonly stepMs: StepMs | null;
  /** Larger is better, for each of them. */
  readonly ratios: Readonly<Partial<Record<RatioName, number>>>;
}

export const RATIO_TITLES = {
  decodeOfBandwidth: 'decode / read bandwidth',
  prefillOfPeak: 'prefill / product peak',
  batchOfDecode: '8 streams / 1 stream',
  decodeOfFirst: 'decode / that of 1 worker',
  decodeOfPeer: 'decode / peer',
  prefillOfPeer: 'prefill / peer',
  batchOfPeer: '8 streams / peer',
} as const;
export type RatioName = keyof typeof RATIO_TITLES;
export const RATIO_NAMES = Object.keys(RATIO_TITLES) as readonly RatioName[];

export function summarize({ title, lengths, productsPerToken }: Omit<ModelCase, 'entrants'>, { rounds, about }: CaseRun): CaseSummary {
  const names = Object.keys(rounds[0]!.samples);
  const first = names.find((name) => name !== PEER_NAME)!;
  const contestants = names.map((name): [string, ContestantSummary] => {
    const { bytesPerToken, description } = about[name]!;
    const ratios: Partial<Record<RatioName, number>> = {};
    for (const ratio of RATIO_NAMES) {
      const values = rounds.map((round) => ratioOf(ratio, { round, name, first, bytesPerToken, productsPerToken }));
      if (!values.includes(null)) ratios[ratio] = median(values as number[]);
    }
    const rates = PHASES.map((phase) => [phase, medianOf(rounds, ({ samples }) => samples[name]![phase].tokensPerSecond)]);
    const steps = rounds.map(({ samples }) => samples[name]!.decode.stepMs);
    const step = (part: keyof StepMs): number => median(steps.map((each) => each![part]));
    return [
      name,
      {
        description,
        bytesPerToken,
        tokensPerSecond: Object.fromEntries(rates) as Record<Phase, number>,
        stepMs: steps.includes(null) ? null : { total: step('total'), compute: step('compute'), collectives: step('collectives') },
        ratios,
      },
    ];
  });
  const loads = rounds.map(({ limits }) => limits.otherLoad);
  return {
    title,
    prefillTokens: lengths.prefillTokens,
    readBandwidth: {
      oneThread: medianOf(rounds, ({ limits }) => limits.readBandwidth.oneThread),
      allThreads: medianOf(rounds, ({ limits }) => limits.readBandwidth.allThreads),
    },
    productPeak: medianOf(rounds, ({ limits }) => limits.productPeak),
    otherLoad: loads.includes(null) ? null : Math.max(...(loads as number[])),
    contestants: Object.fromEntries(contestants),
  };
}

interface RatioInput {
  readonly round: Round;
  readonly name: string;
  /** The first of this project's layouts. */
  readonly first: string;
  readonly bytesPerToken: number;
  readonly productsPerToken: number | null;
}

/** Null where the ratio means nothing: of somebody to himself, to a peer that is not there, of floating point to integers. */
function ratioOf(
  ratio: RatioName,
  { round: { samples, limits }, name, first, bytesPerToken, productsPerToken }: RatioInput,
): number | null {
  const rate = (phase: Phase, of = name): number => samples[of]![phase].tokensPerSecond;
  const toPeer = (phase: Phase): number | null =>
    name === PEER_NAME || !(PEER_NAME in samples) ? null : rate(phase) / rate(phase, PEER_NAME);
  switch (ratio) {
    case 'decodeOfBandwidth':
      return (rate('decode') * bytesPerToken) / limits.readBandwidth.allThreads;
    case 'prefillOfPeak':
      return productsPerToken === null ? null : (rate('prefill') * productsPerToken) / limits.productPeak;
    case 'batchOfDecode':
      return rate('batch') / rate('decode');
    case 'decodeOfFirst':
      return name === first || name === PEER_NAME ? null : rate('decode') / rate('decode', first);
    case 'decodeOfPeer':
      return toPeer('decode');
    case 'prefillOfPeer':
      return toPeer('prefill');
    case 'batchOfPeer':
      return toPeer('batch');
  }
}

function medianOf(rounds: readonly Round[], value: (round: Round) => number): number {
  return median(rounds.map(value));
}

/** Of an even number of values: the mean of the two in the middle. @param values at least one */
export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}
