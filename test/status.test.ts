/** `tandem status` and `tandem top` as a user runs them, against a server that only knows its status. */
import { spawn, spawnSync } from 'node:child_process';
import { join } from 'node:path';
import * as grpc from '@grpc/grpc-js';
import { afterEach, describe, expect, test } from 'vitest';
import { packageRoot } from '../common/package-root.js';
import { Ops } from '../common/services.js';
import { statusSources } from '../coordinator/status/fixtures.js';
import { statusSnapshot } from '../coordinator/status/snapshot.js';
import type { OpsHandlers } from '../proto/generated/tandem/v1/Ops.js';
import type { Status } from '../proto/generated/tandem/v1/Status.js';
import { runCli, startCli } from './support/run-cli.js';

const servers: grpc.Server[] = [];
afterEach(() => servers.splice(0).forEach((server) => server.forceShutdown()));

interface OpsServer {
  readonly address: string;
  readonly intervals: number[];
  stop(): void;
}

/** @param refuse the code that WatchStatus ends with; null: it streams */
async function startOps(
  epoch: number,
  { port = 0, refuse = null }: { port?: number; refuse?: grpc.status | null } = {},
): Promise<OpsServer> {
  const server = new grpc.Server();
  const intervals: number[] = [];
  const status = (): Status => statusSnapshot(statusSources({ epoch }));
  server.addService(Ops.service, {
    GetStatus: (_call, callback) => callback(null, status()),
    WatchStatus: (call) => {
      intervals.push(call.request.intervalMs);
      if (refuse !== null) return void call.emit('error', { code: refuse, details: 'the key may not observe' });
      call.write(status());
      const timer = setInterval(() => call.write(status()), call.request.intervalMs);
      call.on('cancelled', () => clearInterval(timer));
    },
    Drain: (_call, callback) => callback(null, {}),
  } satisfies OpsHandlers);
  servers.push(server);
  const bound = await new Promise<number>((resolve, reject) =>
    server.bindAsync(`127.0.0.1:${port}`, grpc.ServerCredentials.createInsecure(), (error, at) => (error ? reject(error) : resolve(at))),
  );
  return { address: `127.0.0.1:${bound}`, intervals, stop: () => server.forceShutdown() };
}

test('status shows every part of the status', async () => {
  const { address } = await startOps(7);
  const { code, stdout } = await runCli(['status', '--address', address]);
  expect(code).toBe(0);
  expect(stdout).toMatch(/^tandem \S+: ready, up 1m00s, epoch 7\n/);
  expect(stdout).toMatch(/^requests {2}3 running, 2 queued \(500 prompt tokens\), 40 finished, .* 4 preempted$/m);
  expect(stdout).toMatch(/^KV {8}50 used, 20 cached and 130 free of 200 blocks of 16 tokens, at most 90 used$/m);
  expect(stdout).toMatch(/^cache {5}2 contexts in at most 100 blocks, 6 hits \(300 tokens\), 4 misses, 1 evictions$/m);
  expect(stdout).toMatch(/^first token +- +- +- +0$/m);
  expect(stdout).toMatch(/^ +1 +11 +ready +cpu avx2 x4 .* 0\.7 s ago +1$/m);
});

test.each([{ flags: ['--once'] }, { flags: [] }])('top prints one frame as text where nobody watches: $flags', async ({ flags }) => {
  const { address } = await startOps(7);
  const { code, stdout, stderr } = await runCli(['top', '--address', address, ...flags]);
  expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
  expect(stdout).toMatch(/^tandem \S+ {2}● ready {2}up 1m00s {2}epoch 7/);
  expect(stdout).toMatch(/^3 running, 2 queued \(500 prompt tokens\)$/m);
  expect(stdout).not.toContain('\u001b');
});

test('top prints statuses as lines of JSON, and goes on when the server is back', async () => {
  const first = await startOps(1);
  const cli = startCli(['top', '--json', '--interval-ms', '100', '--address', first.address]);
  await cli.waitFor(/"epoch":1[^\n]*\n[^\n]*"epoch":1/);
  expect(first.intervals).toEqual([100]);
  first.stop();
  await startOps(2, { port: Number(first.address.split(':')[1]) });
  await cli.waitFor(/"epoch":2/);
  cli.child.kill('SIGTERM');
  const { code, stdout, stderr } = await cli.result;
  expect({ code, stderr }).toEqual({ code: 143, stderr: '' });
  for (const line of stdout.trim().split('\n')) expect(JSON.parse(line)).toMatchObject({ schema: 'tandem.status/1', state: 'ready' });
});

test('top does not ask a server again that refuses', async () => {
  const { address, intervals } = await startOps(1, { refuse: grpc.status.PERMISSION_DENIED });
  const { code, stderr } = await runCli(['top', '--json', '--address', address]);
  expect({ code, stderr }).toEqual({ code: 1, stderr: 'tandem: PERMISSION_DENIED: the key may not observe\n' });
  expect(intervals).toHaveLength(1);
});

test.each([
  ['99', 'a whole number from 100 to 60000 is needed'],
  ['60001', 'a whole number from 100 to 60000 is needed'],
  ['fast', 'a whole number from 100 to 60000 is needed'],
])('top refuses --interval-ms %s', async (interval, message) => {
  const { code, stderr } = await runCli(['top', '--interval-ms', interval]);
  expect(code).toBe(2);
  expect(stderr).toContain(message);
});

const hasScript = spawnSync('script', ['--version']).error === undefined;
if (!hasScript) process.stderr.write('script (of util-linux) is not installed: tandem top is not tested in a terminal\n');

describe.skipIf(!hasScript)('top in a terminal', () => {
  test('draws frames on the alternate screen until q is pressed, and leaves it', async () => {
    const { address } = await startOps(5);
    const command = `stty rows 30 columns 100; ${process.execPath} ${join(packageRoot, 'dist/cli/main.js')} top --interval-ms 100 --address ${address}; echo ended $?; stty -a`;
    const child = spawn('script', ['-qc', command, '/dev/null'], { env: { ...process.env, TERM: 'xterm', NO_COLOR: '1' } });
    let output = '';
    let isAsked = false;
    const result = new Promise<void>((resolve) => child.once('close', () => resolve()));
    child.stdout.setEncoding('utf8').on('data', (text: string) => {
      output += text;
      if (isAsked || output.split('\u001b[?2026l').length < 4) return;
      isAsked = true; // once: it may be gone when more of its output comes
      child.stdin.write('q'); // after three frames
    });
    await result;
    const [before, inside, after] = output.split(/\u001b\[\?1049[hl]/);
    expect(before).toBe('');
    expect(inside).toContain('epoch 5');
    expect(inside).not.toContain('\u001b[32m');
    expect(after).toContain('ended 0');
    expect(after).toMatch(/\sicanon\s/); // keys are lines again
  });
});
