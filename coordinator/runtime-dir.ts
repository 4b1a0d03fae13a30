import { mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { isAnswered } from './listen.js';

const PREFIX = 'tandem-run-';
const WORKER_SOCKET = 'workers.sock';
/** A folder this young may belong to a server that does not listen yet. */
const YOUNG_MS = 60_000;

/**
 * Makes a private folder (mode 0700) for the worker socket of this process, removed when the process ends, and removes the
 * folders that killed servers of this user left behind.
 *
 * @returns the path of the socket to listen on
 */
export async function createWorkerSocketPath(): Promise<string> {
  await removeLeftovers();
  const dir = mkdtempSync(join(tmpdir(), PREFIX));
  process.once('exit', () => rmSync(dir, { recursive: true, force: true }));
  return join(dir, WORKER_SOCKET);
}

async function removeLeftovers(): Promise<void> {
  for (const name of readdirSync(tmpdir()).filter((each) => each.startsWith(PREFIX))) {
    const dir = join(tmpdir(), name);
    const found = statSync(dir, { throwIfNoEntry: false });
    if (!found?.isDirectory() || found.uid !== process.getuid?.() || Date.now() - found.ctimeMs < YOUNG_MS) continue;
    if (!(await isAnswered(join(dir, WORKER_SOCKET)))) rmSync(dir, { recursive: true, force: true });
  }
}
