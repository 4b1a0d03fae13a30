/** How an import shows how far it is: one line that is drawn again and again in a terminal, now and then a line elsewhere. */
import type { ImportProgress } from '../model/import/import-checkpoint.js';
import { formatBytes, formatDuration } from './format.js';
import { printable, truncate } from './terminal/text.js';

/** Of these last milliseconds is the rate. */
const rateWindowMs = 15_000;
const lineEveryMs = 5000;

export interface ProgressOutput {
  readonly isTTY?: boolean | undefined;
  readonly columns?: number | undefined;
  write(text: string): unknown;
}

interface Rates {
  /** Null: not known yet. */
  readonly bytesPerSecond: number | null;
  readonly secondsLeft: number | null;
}

export class ImportProgressView {
  private samples: { ms: number; bytes: number }[] = [];
  private phase: ImportProgress['phase'] | null = null;
  private lastLineMs: number;
  private isDrawn = false;

  constructor(
    private readonly output: ProgressOutput,
    private readonly now: () => number = () => performance.now(),
  ) {
    this.lastLineMs = now();
  }

  update(progress: ImportProgress): void {
    if (progress.phase !== this.phase) this.samples = [];
    this.phase = progress.phase;
    const rates = this.rates(progress);
    if (this.output.isTTY === true) {
      this.output.write(`\r${progressBar(progress, rates, (this.output.columns ?? 80) - 1)}\u001b[K`);
      this.isDrawn = true;
      return;
    }
    const isEnd = progress.tensors === progress.totalTensors;
    if (!isEnd && this.now() - this.lastLineMs < lineEveryMs) return;
    this.lastLineMs = this.now();
    this.output.write(`${progressLine(progress, rates)}\n`);
  }

  /** Leaves what was drawn last where it is. */
  close(): void {
    if (this.isDrawn) this.output.write('\n');
    this.isDrawn = false;
  }

  private rates({ bytes, totalBytes }: ImportProgress): Rates {
    const ms = this.now();
    this.samples.push({ ms, bytes });
    while (this.samples.length > 2 && this.samples[0]!.ms < ms - rateWindowMs) this.samples.shift();
    const [first] = this.samples;
    const seconds = (ms - first!.ms) / 1000;
    const bytesPerSecond = seconds < 0.5 ? null : (bytes - first!.bytes) / seconds;
    const secondsLeft = bytesPerSecond === null || bytesPerSecond === 0 ? null : (totalBytes - bytes) / bytesPerSecond;
    return { bytesPerSecond, secondsLeft };
  }
}

/** `import [#####.....] 45 %  4.9 GiB of 10.9 GiB  1.82 GB/s  3m20s left  72/142 tensors`, without what does not fit. */
export function progressBar(progress: ImportProgress, rates: Rates, width: number): string {
  const { phase, bytes, totalBytes, tensors, totalTensors } = progress;
  const share = totalBytes === 0 ? 1 : bytes / totalBytes;
  const percent = `${Math.floor(share * 100)}`.padStart(3);
  const most = [`${percent} %`, `${formatBytes(bytes)} of ${formatBytes(totalBytes)}`, ...describeRates(rates)];
  const all = [...most, `${tensors}/${totalTensors} tensors`];
  const roomBeside = (texts: readonly string[]): number => Math.min(30, width - phase.length - texts.join('  ').length - 4);
  const figures = (roomBeside(all) < 10 && roomBeside(most) >= 5 ? most : all).join('  ');
  const room = roomBeside([figures]);
  const filled = Math.floor(share * room);
  const bar = room < 5 ? '' : `[${'#'.repeat(filled)}${'.'.repeat(room - filled)}] `;
  return truncate(`${phase} ${bar}${figures}`, width);
}

export function progressLine({ phase, bytes, totalBytes, tensors, totalTensors, name }: ImportProgress, rates: Rates): string {
  const figures = [`${tensors}/${totalTensors} tensors`, `${formatBytes(bytes)} of ${formatBytes(totalBytes)}`, ...describeRates(rates)];
  return `${phase === 'check' ? 'checking what is there: ' : ''}${figures.join(', ')}${name === '' ? '' : `: ${printable(name)}`}`;
}

function describeRates({ bytesPerSecond, secondsLeft }: Rates): string[] {
  return [
    ...(bytesPerSecond === null ? [] : [`${(bytesPerSecond / 1e9).toFixed(2)} GB/s`]),
    ...(secondsLeft === null ? [] : [`${formatDuration(secondsLeft)} left`]),
  ];
}
