/** Lines of styled pieces: laid out first, painted when their width is known. */
import { pad, printable, truncate, widthOf } from './text.js';

export type Style = 'bold' | 'dim' | 'red' | 'green' | 'yellow' | 'cyan';

export interface Piece {
  readonly text: string;
  readonly style?: Style | undefined;
}

export type Line = readonly Piece[];

const SGR: Readonly<Record<Style, string>> = { bold: '1', dim: '2', red: '31', green: '32', yellow: '33', cyan: '36' };

/** @param text may hold anything: it is made printable */
export function piece(text: string, style?: Style): Piece {
  return { text: printable(text), style };
}

/** @returns a text no wider than `width`; without colour it has no escapes */
export function paint(line: Line, width: number, colour: boolean): string {
  let left = width;
  let painted = '';
  for (const { text, style } of line) {
    const fits = truncate(text, left);
    left -= widthOf(fits);
    painted += colour && style && fits.trim() !== '' ? `\u001b[${SGR[style]}m${fits}\u001b[0m` : fits;
    if (fits !== text) break;
  }
  return colour ? painted : painted.trimEnd();
}

export interface Column {
  readonly title: string;
  /** Where the text stands in its column. */
  readonly side?: 'left' | 'right';
  /** So that columns stay where they are while their content changes. */
  readonly minWidth?: number;
  readonly maxWidth?: number;
}

const GAP = '  ';

/** A title line and one for each row, in columns as wide as their content within their bounds. */
export function table(columns: readonly Column[], rows: readonly (readonly Piece[])[]): Line[] {
  const widths = columns.map(({ title, minWidth = 0, maxWidth = Infinity }, i) =>
    Math.min(maxWidth, Math.max(minWidth, widthOf(title), ...rows.map((row) => widthOf(row[i]!.text)))),
  );
  const lineOf = (cells: readonly Piece[]): Line =>
    cells.flatMap(({ text, style }, i) => {
      const cell = { text: pad(truncate(text, widths[i]!), widths[i]!, columns[i]!.side), style };
      return i === 0 ? [cell] : [{ text: GAP }, cell];
    });
  return [lineOf(columns.map(({ title }) => piece(title, 'dim'))), ...rows.map(lineOf)];
}

export function lineWidth(line: Line): number {
  return line.reduce((sum, { text }) => sum + widthOf(text), 0);
}

/** Two blocks of lines next to each other. */
export function beside(left: readonly Line[], right: readonly Line[], gap: number): Line[] {
  const width = Math.max(...left.map(lineWidth)) + gap;
  return Array.from({ length: Math.max(left.length, right.length) }, (_, i) => {
    const line = left[i] ?? [];
    return [...line, { text: ' '.repeat(width - lineWidth(line)) }, ...(right[i] ?? [])];
  });
}
