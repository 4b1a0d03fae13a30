import { formatBytes } from './format.js';

const everyMs = 1000;

export interface ByteProgress {
  readonly bytes: number;
  readonly totalBytes: number;
}

/** Prints a line on stderr about once a second: how much is done, how fast, and how long the rest takes at that rate. */
export function byteProgress(): (progress: ByteProgress) => void {
  const started = performance.now();
  let last = started;
  return ({ bytes, totalBytes }) => {
    const now = performance.now();
    if (now - last < everyMs) return;
    last = now;
    const perSecond = (bytes / (now - started)) * 1000;
    process.stderr.write(
      `${formatBytes(bytes)} of ${formatBytes(totalBytes)}, ${(perSecond / 1e9).toFixed(2)} GB/s, ` +
        `${Math.ceil((totalBytes - bytes) / perSecond)} s left\n`,
    );
  };
}
