/** Load and clients run in processes of their own: they are not to share an event loop with what measures them, nor with one another. */
import { execFile, fork } from 'node:child_process';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { startLocalCluster, type LocalCluster, type LocalClusterOptions } from '../../cli/local-cluster.js';
import type { LoadReport } from '../../cli/load/report.js';
import { packageRoot } from '../../common/package-root.js';
import { SkippedError } from './part.js';

const MAX_OUTPUT_BYTES = 64 * 1024 * 1024;

/** `tandem load` with `--json`. */
export async function tandemLoad(address: string, flags: Readonly<Record<string, string | number>>): Promise<LoadReport> {
  const args = Object.entries(flags).map(([name, value]) => `--${name}=${value}`);
  const { stdout } = await promisify(execFile)(
    process.execPath,
    [join(packageRoot, 'dist', 'cli', 'main.js'), 'load', '--address', address, '--json', ...args],
    { maxBuffer: MAX_OUTPUT_BYTES },
  );
  return JSON.parse(stdout) as LoadReport;
}

/** Another program of this folder; it sends one message. */
export function runProcess<T>(file: string, args: readonly string[], execArgv: readonly string[] = []): Promise<T> {
  const child = fork(join(packageRoot, 'dist', 'bench', 'serve', file), args, { execArgv: [...execArgv], serialization: 'advanced' });
  return new Promise((resolve, reject) => {
    child.once('message', (message) => resolve(message as T));
    child.once('error', reject);
    child.once('exit', (code) => reject(new Error(`${file} ended with status ${code} before it had a result`)));
  });
}

/** Runs `work` against a server of its own. @throws SkippedError where the server does not know a flag yet */
export async function withCluster<T>(options: LocalClusterOptions, work: (cluster: LocalCluster) => Promise<T>): Promise<T> {
  let cluster: LocalCluster;
  try {
    cluster = await startLocalCluster(options);
  } catch (error) {
    const { message } = error as Error;
    if (/unknown argument/.test(message)) throw new SkippedError(`this server does not know a flag that it needs: ${message}`);
    throw error;
  }
  try {
    return await work(cluster);
  } finally {
    await cluster.close();
  }
}
