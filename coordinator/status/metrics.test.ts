import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { packageRoot } from '../../common/package-root.js';
import { Metrics } from './metrics.js';
import { LOOP, REQUEST, statusSources, STEP } from './fixtures.js';
import { observers } from './observer.js';
import { ServingStats } from './serving-stats.js';
import type { StatusSources } from './snapshot.js';

/** The lines of a text by what stands before the value. */
function samples(text: string): Map<string, number> {
  const lines = text.split('\n').filter((line) => line !== '' && !line.startsWith('#'));
  return new Map(lines.map((line) => [line.slice(0, line.lastIndexOf(' ')), Number(line.slice(line.lastIndexOf(' ') + 1))]));
}

async function scrape(metrics: Metrics): Promise<Map<string, number>> {
  return samples((await metrics.text()).text);
}

function observed(): { metrics: Metrics; stats: ServingStats } {
  const stats = new ServingStats();
  const metrics = new Metrics(() => statusSources({ stats: stats.snapshot() }));
  const observer = observers(metrics, stats);
  for (let i = 0; i < 10; i++) observer.step(STEP);
  for (const ms of [0.4, 0.5, 3, 70_000]) observer.interToken(ms);
  observer.firstToken(500);
  observer.ended(REQUEST);
  observer.ended({ ...REQUEST, outcome: 'failed', errorCode: 'ENGINE' });
  observer.ended({ ...REQUEST, outcome: 'expired', errorCode: 'DEADLINE' });
  observer.rejected('queue_full');
  observer.rejected('queue_full');
  return { metrics, stats };
}

test('what the loop reports is in the next scrape', async () => {
  const seen = await scrape(observed().metrics);
  expect(Object.fromEntries(seen)).toMatchObject({
    'tandem_requests_total{outcome="finished"}': 1,
    'tandem_requests_total{outcome="failed"}': 1,
    'tandem_requests_total{outcome="cancelled"}': 0,
    'tandem_request_errors_total{code="DEADLINE"}': 1,
    'tandem_rejections_total{reason="queue_full"}': 2,
    tandem_time_to_first_token_seconds_sum: 0.5,
    tandem_e2e_request_latency_seconds_count: 1,
    tandem_e2e_request_latency_seconds_sum: 2,
    tandem_request_queue_time_seconds_sum: 0.1,
    tandem_request_stall_time_seconds_sum: 0.05,
    'tandem_request_prompt_tokens_bucket{le="64"}': 0,
    'tandem_request_prompt_tokens_bucket{le="128"}': 1,
    tandem_step_seconds_count: 10,
    tandem_step_batch_tokens_sum: 1000,
    'tandem_rank_compute_seconds_total{rank="1"}': expect.closeTo(0.16) as number,
    'tandem_step_part_seconds_total{part="all_reduce"}': expect.closeTo(0.04) as number,
  });
});

test('the parts of a step add up to its time', async () => {
  const seen = await scrape(observed().metrics);
  const parts = [...seen].filter(([name]) => name.startsWith('tandem_step_part_seconds_total')).reduce((sum, [, value]) => sum + value, 0);
  expect(parts).toBeCloseTo(seen.get('tandem_step_seconds_sum')!, 9);
});

test('a value on a bound counts below it, one above all bounds only in +Inf', async () => {
  const seen = await scrape(observed().metrics);
  const bucket = (le: string): number | undefined => seen.get(`tandem_inter_token_latency_seconds_bucket{le="${le}"}`);
  expect([bucket('0.0005'), bucket('0.002'), bucket('0.003'), bucket('60'), bucket('+Inf')]).toEqual([2, 2, 3, 3, 4]);
  expect(seen.get('tandem_inter_token_latency_seconds_count')).toBe(4);
});

test('gauges are as of the scrape', async () => {
  let sources: StatusSources = statusSources({ state: 'loading', loop: null, ranks: [] });
  const metrics = new Metrics(() => sources);
  const loading = await scrape(metrics);
  expect(loading.get('tandem_server_state{state="loading"}')).toBe(1);
  expect(loading.get('tandem_kv_cache_usage_ratio')).toBe(0);
  expect([...loading.keys()].filter((name) => name.startsWith('tandem_rank_'))).toEqual([]);
  sources = statusSources();
  const ready = Object.fromEntries(await scrape(metrics));
  expect(ready).toMatchObject({
    'tandem_server_state{state="loading"}': 0,
    'tandem_server_state{state="ready"}': 1,
    tandem_num_requests_waiting: 2,
    tandem_num_requests_running: 3,
    tandem_kv_cache_usage_ratio: 0.25,
    'tandem_kv_blocks{state="cached"}': 20,
    tandem_generation_tokens_total: 8000,
    tandem_cached_prompt_tokens_total: 300,
    'tandem_rank_up{rank="1"}': 1,
    'tandem_rank_heartbeat_age_seconds{rank="1"}': 0.7,
    'tandem_rank_memory_bytes{rank="0",kind="kv"}': 2000,
    'tandem_rank_restarts_total{rank="1"}': 1,
    tandem_epochs_total: 2,
  });
  sources = statusSources({ loop: { ...LOOP, running: 0 }, ranks: statusSources().ranks.slice(0, 1) });
  const later = await scrape(metrics);
  expect(later.get('tandem_num_requests_running')).toBe(0);
  expect(later.has('tandem_rank_up{rank="1"}')).toBe(false);
});

test('two servers in one process keep their own values', async () => {
  const { metrics } = observed();
  const other = new Metrics(() => statusSources());
  expect((await scrape(other)).get('tandem_step_seconds_count')).toBe(0);
  expect((await scrape(metrics)).get('tandem_step_seconds_count')).toBe(10);
});

test('docs/operations.md lists every metric of the server, and no other', async () => {
  const { text } = await observed().metrics.text();
  const served = [...text.matchAll(/^# TYPE (tandem_\w+)/gm)].map(([, name]) => name);
  const section = /\n## Metrics\n.*?(?=\n## |$)/s.exec(readFileSync(join(packageRoot, 'docs', 'operations.md'), 'utf8'))![0];
  const listed = [...section.matchAll(/^\| `(tandem_\w+)/gm)].map(([, name]) => name);
  expect(listed.sort()).toEqual(served.sort());
});

test.each(['prometheus/tandem.rules.yml', 'grafana/tandem.json'])('deploy/%s names metrics that are served', async (file) => {
  const { text } = await observed().metrics.text();
  const served = new Set([...samples(text).keys()].map((sample) => sample.replace(/\{.*/, '')));
  for (const [, histogram] of text.matchAll(/^# TYPE (\w+) histogram/gm)) served.add(histogram!);
  const named = readFileSync(join(packageRoot, 'deploy', file), 'utf8').match(/\btandem_\w+/g)!;
  expect(named.filter((name) => !served.has(name))).toEqual([]);
});

const promtool = spawnSync('promtool', ['--version']).error === undefined;
if (!promtool) process.stderr.write('promtool is not installed: what it checks of metrics and rules is not tested\n');

describe.skipIf(!promtool)('promtool', () => {
  const run = (args: readonly string[], input = ''): { status: number | null; output: string } => {
    const { status, stdout, stderr } = spawnSync('promtool', args, {
      input,
      encoding: 'utf8',
      cwd: join(packageRoot, 'deploy', 'prometheus'),
    });
    return { status, output: stdout + stderr };
  };

  test('finds nothing wrong with what is scraped', async () => {
    expect(run(['check', 'metrics'], (await observed().metrics.text()).text)).toEqual({ status: 0, output: '' });
  });

  test('accepts the alerts, and they fire as their tests say', () => {
    const checked = run(['check', 'rules', 'tandem.rules.yml']);
    expect(checked).toMatchObject({ status: 0, output: expect.stringContaining('SUCCESS') as string });
    expect(run(['test', 'rules', 'tandem.rules.test.yml'])).toMatchObject({ status: 0 });
  });

  test('accepts every query of the dashboard', () => {
    type Dashboard = { panels: { title: string; targets?: { expr: string }[] }[] };
    const dashboard = JSON.parse(readFileSync(join(packageRoot, 'deploy', 'grafana', 'tandem.json'), 'utf8')) as Dashboard;
    const queries = dashboard.panels.flatMap(({ targets = [] }) => targets.map(({ expr }) => expr));
    expect(queries.length).toBeGreaterThan(20);
    const rules = queries.map((expr, i) => ({ record: `query:${i}`, expr: expr.replaceAll('$__rate_interval', '5m') }));
    const file = join(mkdtempSync(join(tmpdir(), 'tandem-rules-')), 'rules.yml');
    writeFileSync(file, JSON.stringify({ groups: [{ name: 'dashboard', rules }] })); // JSON is YAML too
    const checked = run(['check', 'rules', file]);
    rmSync(dirname(file), { recursive: true });
    expect(checked).toMatchObject({ status: 0, output: expect.stringContaining(`${queries.length} rules found`) as string });
  });
});
