/** Ranks that die or fall silent while requests run, clients that go away, and the server's own end. */
import { spawn, type ChildProcess } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, expect, test } from 'vitest';
import { connect } from '../cli/client.js';
import { startLocalCluster, type LocalCluster, type LocalClusterOptions } from '../cli/local-cluster.js';
import { packageRoot } from '../common/package-root.js';
import type { Status__Output } from '../proto/generated/tandem/v1/Status.js';

const TEXT = 'Anna had a dog named Lucky. One day, Lucky ran away. [gMASK]';
let open: LocalCluster[] = [];

async function start(options: Partial<LocalClusterOptions> = {}): Promise<LocalCluster> {
  const cluster = await startLocalCluster({ model: null, worldSize: 2, logLevel: 'silent', flags: ['--run-ahead=on'], ...options });
  open.push(cluster);
  return cluster;
}

afterEach(async () => {
  await Promise.all(open.splice(0).map((cluster) => cluster.close()));
  open = [];
});

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}

async function until(cluster: LocalCluster, holds: (status: Status__Output) => boolean): Promise<Status__Output> {
  for (;;) {
    const status = await cluster.client.status();
    if (holds(status)) return status;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

/** Sampled tokens and a beam search, long enough that a rank can be lost on the way. */
const requests = [1, 2, 3].map((seed) => ({ text: TEXT, seed, temperature: 1, maxNewTokens: 150, endTokens: { ids: [] }, n: 2 }));
const beamRequest = {
  text: TEXT,
  maxNewTokens: 60,
  endTokens: { ids: [] },
  beamSearch: { numBeams: 4, lengthPenalty: 1, deterministic: false },
};

async function runAll(cluster: LocalCluster, onToken: () => void = () => {}) {
  const finishes = await Promise.all([
    ...requests.map((request) => cluster.client.generate(request, onToken)),
    cluster.client.generate(beamRequest),
    cluster.client.score({ text: 'The capital of Japan is', choices: [{ text: 'Tokyo' }, { text: 'Paris' }] }),
  ]);
  return finishes.map((finish) => ('outputs' in finish ? finish.outputs : finish.choices));
}

test.each([
  { name: 'killed', signal: 'SIGKILL' as const, rank: 1 },
  { name: 'killed, rank 0', signal: 'SIGKILL' as const, rank: 0 },
])('a rank $name in mid-stream: clients see a pause, and the same tokens', async ({ signal, rank }) => {
  const undisturbed = await runAll(await start());
  const cluster = await start();
  const before = await cluster.client.status();
  let tokens = 0;
  const disturbed = await runAll(cluster, () => {
    if (++tokens === 40) process.kill(before.workers[rank]!.pid, signal);
  });
  expect(tokens).toBeGreaterThan(40);
  expect(disturbed).toEqual(undisturbed);
  const after = await until(cluster, ({ state }) => state === 'ready');
  expect(after.epoch).toBe(before.epoch + 1);
  expect(after.workers[rank]!.pid).not.toBe(before.workers[rank]!.pid);
  expect(after.requests).toMatchObject({ running: 0, failed: 0 });
  expect(after.kv).toMatchObject({ usedBlocks: 0 });
});

test('a rank that stops answering is named, replaced, and the request goes on', async () => {
  const undisturbed = await (await start()).client.generate(requests[0]!);
  const cluster = await start({ stepTimeoutMs: 1500 });
  const before = await cluster.client.status();
  let tokens = 0;
  const finish = await cluster.client.generate(requests[0]!, () => {
    if (++tokens === 20) process.kill(before.workers[1]!.pid, 'SIGSTOP');
  });
  expect(finish.outputs).toEqual(undisturbed.outputs);
  expect((await cluster.client.status()).epoch).toBe(before.epoch + 1);
});

test('ranks that are lost twice, and while nothing runs', async () => {
  const cluster = await start();
  const request = { text: TEXT, temperature: 0, maxNewTokens: 40, endTokens: { ids: [] } };
  const undisturbed = await cluster.client.generate(request);
  for (const rank of [1, 0]) {
    const before = await cluster.client.status();
    process.kill(before.workers[rank]!.pid, 'SIGKILL');
    await until(cluster, ({ epoch, state }) => epoch > before.epoch && state === 'ready');
    expect((await cluster.client.generate(request)).outputs).toEqual(undisturbed.outputs);
  }
  expect((await cluster.client.status()).workers.map(({ restarts }) => restarts)).toEqual([2, 2]);
});

test('when the coordinator is killed its workers leave, and no shared memory stays', async () => {
  const segments = () => readdirSync('/dev/shm').filter((name) => name.includes('tandem'));
  const before = segments();
  const cluster = await start();
  const { workers } = await cluster.client.status();
  process.kill(cluster.pid, 'SIGKILL');
  await cluster.exited;
  await expect.poll(() => workers.filter(({ pid }) => isAlive(pid)).length, { timeout: 20_000 }).toBe(0);
  expect(segments()).toEqual(before);
});

test('workers that somebody else starts, and starts again', async () => {
  const dir = mkdtempSync(join(tmpdir(), 'tandem-external-'));
  const [link, api] = [`unix:${join(dir, 'link.sock')}`, `unix:${join(dir, 'api.sock')}`];
  const tandem = (...args: string[]): ChildProcess =>
    spawn(process.execPath, [join(packageRoot, 'dist/cli/main.js'), ...args, '--log-level', 'silent'], { stdio: 'ignore' });
  const server = tandem('serve', '--external-workers', '--worker-listen', link, '--listen', api, '--http-listen', 'off');
  const worker = (rank: number): ChildProcess => tandem('worker', '--coordinator', link, '--rank', String(rank));
  let ranks = [worker(0), worker(1)];
  try {
    await expect.poll(() => existsSync(join(dir, 'api.sock')), { timeout: 20_000 }).toBe(true);
    const client = await connect(api); // which answers from the first moment, and takes requests once all ranks are there
    await expect.poll(async () => (await client.status()).state, { timeout: 20_000 }).toBe('ready');
    const request = { text: TEXT, temperature: 0, maxNewTokens: 100, endTokens: { ids: [] } };
    const undisturbed = await client.generate(request);
    let tokens = 0;
    const disturbed = client.generate(request, () => {
      if (++tokens === 20) ranks[0]!.kill('SIGKILL');
    });
    const status = await new Promise((resolve) => ranks[1]!.once('exit', resolve));
    expect(status).toBe(75); // the epoch is over: start me again
    ranks = [worker(0), worker(1)];
    expect((await disturbed).outputs).toEqual(undisturbed.outputs);
    client.close();
  } finally {
    const all = [server, ...ranks];
    server.kill('SIGTERM');
    const statuses = await Promise.all(
      all.map((child) => new Promise((resolve) => (child.exitCode === null ? child.once('exit', resolve) : resolve(child.exitCode)))),
    );
    expect(statuses).toEqual([0, 0, 0]);
    rmSync(dir, { recursive: true, force: true });
  }
});

test('a client that goes away frees its blocks', async () => {
  const cluster = await start();
  const cancel = new AbortController();
  const gone = cluster.client.generate({ text: TEXT, maxNewTokens: 400, endTokens: { ids: [] } }, () => cancel.abort(), cancel.signal);
  await expect(gone).rejects.toMatchObject({ code: 1 });
  const status = await until(cluster, ({ requests: counts }) => counts!.running === 0);
  expect(status.requests).toMatchObject({ cancelled: 1, queued: 0 });
  expect(status.kv).toMatchObject({ usedBlocks: 0 });
});

test('the server stops under load: requests end with UNAVAILABLE, no process is left', async () => {
  const cluster = await start();
  const { workers } = await cluster.client.status();
  let isStopping = false;
  const request = cluster.client.generate({ text: TEXT, maxNewTokens: 400, endTokens: { ids: [] } }, () => {
    if (!isStopping) process.kill(cluster.pid, 'SIGTERM');
    isStopping = true;
  });
  await expect(request).rejects.toMatchObject({ code: 14 });
  await cluster.exited;
  expect(workers.filter(({ pid }) => isAlive(pid))).toEqual([]);
});
