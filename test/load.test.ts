/** `tandem load` against a real server, over gRPC and HTTP, and what it says to wrong flags. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { LoadReport } from '../cli/load/report.js';
import { startLocalCluster, type LocalCluster } from '../cli/local-cluster.js';
import { runCli, startCli } from './support/run-cli.js';

const scratch = mkdtempSync(join(tmpdir(), 'tandem-test-load-'));
let cluster: LocalCluster;
beforeAll(async () => {
  cluster = await startLocalCluster({ model: null, http: true });
});
afterAll(async () => {
  await cluster?.close();
  rmSync(scratch, { recursive: true, force: true });
});

async function load(...flags: string[]): Promise<LoadReport> {
  const { code, stdout, stderr } = await runCli(['load', '--address', cluster.address, '--json', ...flags]);
  expect(stderr).toBe('');
  expect(code).toBe(0);
  return JSON.parse(stdout) as LoadReport;
}

test('a closed loop over gRPC reports every latency, and the outputs are as long as asked for', async () => {
  const flags = ['--requests=12', '--concurrency=4', '--warm-up=2', '--prompt-tokens=uniform:5:20', '--output-tokens=9'];
  const report = await load(...flags, '--slo=e2e=1000s');
  expect(report).toMatchObject({ schema: 'tandem.load/1', isInterrupted: false, errors: [], goodput: { good: 12, share: 1 } });
  expect(report.requests).toEqual({ sent: 12, finished: 12, failed: 0, cancelled: 0 });
  expect(report.tokens.output).toBe(12 * 9);
  expect(report.latencyMs.interToken!.count).toBe(12 * 8); // a message for each token
  const { ttft, tpot, e2e, serverQueue } = report.latencyMs;
  for (const latency of [ttft, tpot, e2e, serverQueue]) expect(latency!.count).toBe(12);
  expect(ttft!.p50).toBeLessThanOrEqual(e2e!.p50);
});

test('the same seed sends the same requests, and records the same greedy tokens at any concurrency', async () => {
  const recordOf = async (concurrency: number): Promise<string[]> => {
    const file = join(scratch, `record-${concurrency}.jsonl`);
    await load(`--record=${file}`, `--concurrency=${concurrency}`, '--requests=6', '--output-tokens=uniform:2:12', '--seed=9');
    const lines = readFileSync(file, 'utf8').trim().split('\n');
    return lines
      .map((line) => JSON.parse(line) as { index: number; prompt: unknown; tokens: unknown })
      .toSorted((a, b) => a.index - b.index)
      .map(({ prompt, tokens }) => JSON.stringify({ prompt, tokens }));
  };
  const alone = await recordOf(1);
  expect(new Set(alone).size).toBe(6);
  expect(await recordOf(6)).toEqual(alone);
});

test('shared contexts hit the context cache, and clients that leave are counted apart', async () => {
  const report = await load('--requests=20', '--shared-contexts=2', '--prompt-tokens=40', '--output-tokens=20', '--cancel-fraction=0.5');
  expect(report.requests.cancelled).toBeGreaterThan(0);
  expect(report.requests.finished + report.requests.cancelled).toBe(20);
  expect(report.tokens.cachedPrompt).toBeGreaterThan(0);
  const { requests, kv } = await cluster.client.status();
  expect(requests!.running + requests!.queued).toBe(0);
  expect(kv!.usedBlocks).toBe(0);
});

test('an open loop over HTTP reads the usage of the streams', async () => {
  const prompts = join(scratch, 'prompts.txt');
  writeFileSync(prompts, 'The capital of\n\nOnce upon a time\n');
  const report = await load(
    `--http=http://${cluster.httpAddress}`,
    `--prompts=${prompts}`,
    '--rate=50',
    '--requests=5',
    '--output-tokens=6',
  );
  expect(report.requests).toMatchObject({ sent: 5, finished: 5 });
  expect(report.tokens.prompt).toBeGreaterThan(0);
  expect(report.tokens.output).toBeGreaterThan(0);
});

test('refusals are reported by code, and a load in which nothing was answered ends with status 1', async () => {
  const { code, stdout } = await runCli(['load', '--address', cluster.address, '--token-range=4096:4096', '--requests=3']);
  expect(code).toBe(1);
  expect(stdout).toMatch(/errors +3 x INVALID_ARGUMENT: .*4096/);
});

test('Ctrl-C ends the load and prints what it has', async () => {
  const running = startCli(['load', '--address', cluster.address, '--concurrency=2', '--duration-s=600', '--output-tokens=3', '--json']);
  await expect.poll(async () => (await cluster.client.status()).requests!.running).toBeGreaterThan(0);
  running.child.kill('SIGINT');
  const { code, stdout, stderr } = await running.result;
  expect(stderr).toBe('');
  expect(code).toBe(130);
  expect(JSON.parse(stdout)).toMatchObject({ isInterrupted: true, requests: { failed: 0 } });
});

test.each([
  { flags: ['--rate=5', '--concurrency=3'], words: ['--rate', '--concurrency'] },
  { flags: ['--rate=0'], words: ['--rate 0'] },
  { flags: ['--cancel-fraction=2'], words: ['--cancel-fraction 2'] },
  { flags: ['--prompt-tokens=zipf'], words: ['--prompt-tokens zipf'] },
  { flags: ['--arrivals=sometimes'], words: ['--arrivals sometimes'] },
  { flags: ['--slo=fast'], words: ['--slo fast'] },
  { flags: ['--http=http://127.0.0.1:1'], words: ['--http', '--token-range'] },
  { flags: ['--http=http://127.0.0.1:1', '--beams=2'], words: ['--http', '--beams'] },
  { flags: ['--http=http://127.0.0.1:1', '--token-range=5:6', '--http-body=[]'], words: ['--http-body'] },
  { flags: ['--unique-prompts=0.5'], words: ['--unique-prompts', '--shared-contexts'] },
  { flags: ['--keys=/nonexistent'], words: ['/nonexistent'] },
  { flags: ['--prompts=/dev/null'], words: ['--prompts', 'empty'] },
  { flags: ['--token-range=6:5'], words: ['--token-range 6:5'] },
  { flags: ['--requests=0'], words: ['--requests 0'] },
])('$flags is refused in one line', async ({ flags, words }) => {
  const { code, stdout, stderr } = await runCli(['load', '--address', cluster.address, ...flags]);
  expect(code).toBeGreaterThan(0);
  expect(stdout).toBe('');
  expect(stderr.trim().split('\n')).toHaveLength(1);
  for (const word of words) expect(stderr).toContain(word);
});

test('without a server it says so', async () => {
  const { code, stderr } = await runCli(['load', '--address', `unix:${join(scratch, 'nobody')}`]);
  expect(code).toBe(1);
  expect(stderr).toContain('no server at');
});
