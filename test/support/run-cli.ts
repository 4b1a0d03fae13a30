import { spawn, type ChildProcessWithoutNullStreams } from 'node:child_process';
import { join } from 'node:path';
import { packageRoot } from '../../common/package-root.js';

export interface CliResult {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

export interface CliOptions {
  /** Package folder to run from. */
  readonly root?: string;
  readonly env?: Readonly<Record<string, string>>;
}

export interface RunningCli {
  readonly child: ChildProcessWithoutNullStreams;
  /** When it has ended. */
  readonly result: Promise<CliResult>;
  /** Resolves when what it has written to stderr or stdout matches; rejects if it ends before. */
  waitFor(pattern: RegExp): Promise<void>;
}

/** Starts `tandem` as a user would. */
export function startCli(args: readonly string[], { root = packageRoot, env = {} }: CliOptions = {}): RunningCli {
  const child = spawn(process.execPath, [join(root, 'dist', 'cli', 'main.js'), ...args], {
    stdio: 'pipe',
    env: { ...process.env, ...env },
  });
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => (stdout += text));
  child.stderr.setEncoding('utf8').on('data', (text: string) => (stderr += text));
  child.stdin.on('error', () => {}); // a command that reads nothing may be gone already
  const result = new Promise<CliResult>((resolve, reject) => {
    child.once('error', reject);
    child.once('close', (code) => resolve({ code, stdout, stderr }));
  });
  const waitFor = (pattern: RegExp): Promise<void> =>
    new Promise((resolve, reject) => {
      const check = (): void => {
        if (pattern.test(stderr) || pattern.test(stdout)) resolve();
      };
      child.stdout.on('data', check);
      child.stderr.on('data', check);
      child.once('close', () => reject(new Error(`ended without ${pattern}: ${stderr}`)));
      check();
    });
  return { child, result, waitFor };
}

/** Runs `tandem` to its end, with `input` on its stdin. */
export function runCli(
  args: readonly string[],
  { input = '', ...options }: CliOptions & { readonly input?: string } = {},
): Promise<CliResult> {
  const { child, result } = startCli(args, options);
  child.stdin.end(input);
  return result;
}
