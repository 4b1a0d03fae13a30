import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';

/** VmHWM: the most that was resident at once; 0 for a process that has just ended. */
export function peakResidentBytes(pid: number): number {
  try {
    return 1024 * Number(/^VmHWM:\s*(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1] ?? 0);
  } catch {
    return 0;
  }
}

/** Takes files out of the page cache, so that the disk is what is read. */
export function forgetFiles(paths: readonly string[]): void {
  for (const path of paths) {
    const result = spawnSync('dd', [`of=${path}`, 'oflag=nocache', 'conv=notrunc,fdatasync', 'count=0'], { stdio: 'ignore' });
    if (result.status !== 0) throw new Error('dd of GNU coreutils is needed to read from the disk and not from memory');
  }
}
