/** How numbers and tables look in the terminal. */
import type { WorkerStatus__Output } from '../proto/generated/tandem/v1/WorkerStatus.js';
import { pad, widthOf } from './terminal/text.js';

/** With three digits and a binary unit: `12.1 MiB`. */
export function formatBytes(bytes: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  const unit = bytes < 1 ? 0 : Math.min(units.length - 1, Math.floor(Math.log2(bytes) / 10));
  const value = bytes / 1024 ** unit;
  return `${value.toFixed(unit === 0 || value >= 100 ? 0 : 1)} ${units[unit]}`;
}

/** With three digits at least, and a unit: `0.42 ms`, `340 ms`, `12.3 s`, `5m03s`. */
export function formatMs(ms: number): string {
  if (ms >= 120_000) return formatDuration(ms / 1000);
  const [value, unit] = ms >= 10_000 ? [ms / 1000, 's'] : [ms, 'ms'];
  return `${value.toFixed(value >= 100 ? 0 : value >= 10 ? 1 : 2)} ${unit}`;
}

/** In its two largest units: `42s`, `5m03s`, `3h05m`, `12d04h`. */
export function formatDuration(seconds: number): string {
  const whole = Math.floor(seconds);
  const two = (value: number): string => String(Math.floor(value)).padStart(2, '0');
  if (whole < 60) return `${whole}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m${two(whole % 60)}s`;
  if (whole < 86_400) return `${Math.floor(whole / 3600)}h${two((whole % 3600) / 60)}m`;
  return `${Math.floor(whole / 86_400)}d${two((whole % 86_400) / 3600)}h`;
}

/** `0`, `3.14`, `31.4`, `314`, `31,416`. */
export function formatCount(count: number): string {
  if (Number.isInteger(count) || count >= 100) return Math.round(count).toLocaleString('en');
  return count.toFixed(count >= 10 ? 1 : 2);
}

export function formatPercent(share: number): string {
  return `${(share * 100).toFixed(0)} %`;
}

/** `ready`, `loading`, and once it is known how much there is, `loading 34 %`. */
export function formatWorkerState({
  state,
  loadedBytes,
  loadBytes,
}: Pick<WorkerStatus__Output, 'state' | 'loadedBytes' | 'loadBytes'>): string {
  return loadBytes > 0 ? `${state} ${formatPercent(loadedBytes / loadBytes)}` : state;
}

/** Columns aligned with spaces, numbers to the right. */
export function formatTable(header: readonly string[], rows: readonly (readonly string[])[]): string {
  const widths = header.map((title, column) => Math.max(title.length, ...rows.map((row) => widthOf(row[column]!))));
  const isNumber = header.map((_, column) => rows.every((row) => /^[-\d.,]+( \S+)?%?$/.test(row[column]!)));
  const line = (cells: readonly string[]): string =>
    cells
      .map((cell, column) => pad(cell, widths[column]!, isNumber[column] ? 'right' : 'left'))
      .join('  ')
      .trimEnd();
  return [line(header), ...rows.map(line)].join('\n');
}
