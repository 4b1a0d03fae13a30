import { execFile } from 'node:child_process';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { oneLine } from '../../cli/describe-error.js';
import { ConfigError } from '../../common/errors.js';
import { packageRoot } from '../../common/package-root.js';

/** The package of its own whose dependencies the peer is; nothing else of this project sees them. */
export const peerDir = join(packageRoot, 'bench', 'peer');

const SYSTEM = 'linux-x64';
type Manifest = { readonly version: string; readonly dependencies: Readonly<Record<string, string>> };

/**
 * Installs node-llama-cpp with the prebuilt binary for this system's CPU, unless it is there. Without the optional dependencies, which are hundreds of
 * megabytes of binaries for other systems and GPUs, and without install scripts, which would compile llama.cpp where no binary fits.
 *
 * @throws ConfigError in one line where that is not possible
 */
export async function installPeer(progress: (message: string) => void): Promise<void> {
  const system = `${process.platform}-${process.arch}`;
  if (system !== SYSTEM) throw new ConfigError(`the peer is set up for ${SYSTEM}, this is ${system}`);
  if (await isInstalled()) return;
  progress('installing the peer');
  // Not `npm ci`: it wants every optional dependency in the lock file, and some of those for other systems were not to be had.
  const args = ['install', '--no-save', '--omit=optional', '--ignore-scripts', '--no-audit', '--no-fund'];
  await promisify(execFile)('npm', args, { cwd: peerDir }).catch((error: Error & { stderr?: string }) => {
    const reason = error.stderr?.split('\n').find((line) => /^npm error (?!code |syscall |errno |path )\S/.test(line));
    throw new ConfigError(`\`npm install\` in ${peerDir} failed: ${reason?.replace(/^npm error /, '') ?? oneLine(error.message)}`);
  });
}

async function isInstalled(): Promise<boolean> {
  const { dependencies } = await manifest(peerDir);
  const versions = Object.entries(dependencies).map(async ([name, version]) => {
    const installed = await manifest(join(peerDir, 'node_modules', name)).catch(() => null);
    return installed?.version === version;
  });
  return (await Promise.all(versions)).every(Boolean);
}

async function manifest(dir: string): Promise<Manifest> {
  return JSON.parse(await readFile(join(dir, 'package.json'), 'utf8')) as Manifest;
}
