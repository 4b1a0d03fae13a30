import fc from 'fast-check';
import { expect, test } from 'vitest';
import { LOOP, statusSources, STEP } from '../coordinator/status/fixtures.js';
import { EMPTY_LOOP, type ActiveRequestSnapshot } from '../coordinator/status/loop-snapshot.js';
import { ServingStats } from '../coordinator/status/serving-stats.js';
import { statusSnapshot, type StatusSources } from '../coordinator/status/snapshot.js';
import type { Status__Output } from '../proto/generated/tandem/v1/Status.js';
import { paint } from './terminal/line.js';
import { widthOf } from './terminal/text.js';
import { topView, type TopState } from './top-view.js';

function request(given: Partial<ActiveRequestSnapshot> = {}): ActiveRequestSnapshot {
  return {
    ...{ requestId: 'r-1', key: '', state: 'decode', promptTokens: 70, generatedTokens: 12, kvBlocks: 6, priority: 0, ageMs: 1500 },
    ...given,
  };
}

function status(given: Partial<StatusSources> = {}): Status__Output {
  const stats = new ServingStats(() => 0);
  stats.step(STEP);
  for (const ms of [10, 20, 400]) stats.interToken(ms);
  return statusSnapshot(statusSources({ stats: stats.snapshot(), ...given }), 1_700_000_000);
}

const requests = (count: number): StatusSources['loop'] => ({
  ...LOOP,
  running: count,
  queued: 0,
  active: Array.from({ length: count }, (_, i) => request({ requestId: `r-${String(i).padStart(3, '0')}`, ageMs: 100_000 - i })),
});

function state(given: Partial<TopState> = {}): TopState {
  return { status: status(), address: '127.0.0.1:7130', columns: 120, rows: 40, scroll: 0, silentMs: null, ...given };
}

function text(given: Partial<TopState> = {}): string[] {
  const shown = state(given);
  return topView(shown).lines.map((line) => paint(line, shown.columns, false));
}

test('shows what a server does', () => {
  const lines = text({ status: status({ loop: { ...requests(2)!, queued: 0 } }) });
  const all = lines.join('\n');
  expect(lines[0]).toMatch(/^tandem \S+ {2}● ready {2}up 1m00s {2}epoch 2 +127\.0\.0\.1:7130 {2}\d\d:\d\d:\d\d$/);
  expect(lines[1]).toBe('glm  INT4  6 layers, hidden 256, context 512  /models/glm');
  expect(all).toMatch(/per second {2}31 tokens {3}70 prompt tokens {3}0 requests {3}1 steps/);
  expect(all).toMatch(/next token +20\.\d ms +39\d ms +39\d ms +3 /);
  expect(all).toMatch(/first token +- +- +- +0 /);
  expect(all).toMatch(/step of 20\.0 ms, 100 tokens in 31 sequences/);
  expect(all).toMatch(/all-reduce +4\.00 ms +20 % {2}███▎/);
  expect(all).toMatch(/25 % used {2}█ 50 used {2}▒ 20 cached {2}░ 130 free of 200 blocks/);
  expect(all).toMatch(/2 contexts cached, 60 % of 10 found, 300 tokens not computed, 1 evicted/);
  expect(all).toMatch(/^1 +ready +cpu avx2 x4 +1000 B +2\.0 KiB +4\.9 KiB +38 % +0\.7 s +1$/m);
  expect(all).toMatch(/^2 running, 0 queued$/m);
  expect(all).toMatch(/^r-001 +decode +70 +12 +6 +100\.0 s$/m);
  expect(all).toMatch(/^\d\d:\d\d:\d\d {2}epoch ended: rank 1 was lost$/m);
  expect(lines).toHaveLength(40);
  expect(lines.at(-1)).toBe('q quit   ↑ ↓ PgUp PgDn scroll the requests');
});

test('while the model loads, the reason is shown and nothing else is made up', () => {
  const all = text({ status: status({ state: 'loading', reason: 'the workers load their shards', loop: EMPTY_LOOP, ranks: [] }) }).join(
    '\n',
  );
  expect(all).toMatch(/● loading/);
  expect(all).toMatch(/^the workers load their shards$/m);
  expect(all).toMatch(/0 % used/);
  expect(all).toMatch(/^0 running, 0 queued$/m);
});

test('a server that does not answer is said to, in place of its state', () => {
  expect(text({ silentMs: 5200 })[0]).toMatch(/● no answer for 5s/);
});

test('requests scroll, no further than to their end, and the title says where one is', () => {
  const shown = state({ status: status({ loop: requests(100) }), rows: 40 });
  const first = topView(shown);
  expect(first.scroll).toBe(0);
  expect(text(shown).join('\n')).toContain(`1 to ${first.pageRows} of 100, oldest first`);
  const end = topView({ ...shown, scroll: 1_000_000 });
  expect(end.scroll).toBe(100 - end.pageRows);
  const endText = text({ ...shown, scroll: end.scroll }).join('\n');
  expect(endText).toMatch(/^r-099/m);
  expect(endText).not.toMatch(/^r-000/m);
});

test('keys and priorities have columns where there are any', () => {
  const active = [request({ key: '数据组', priority: -3 }), request({ requestId: 'r-2', key: 'web' })];
  const lines = text({ status: status({ loop: { ...LOOP, active } }) });
  const header = lines.find((line) => line.startsWith('request'))!;
  expect(header).toMatch(/request +key +state +prompt +new +blocks +priority +age/);
  const row = lines.find((line) => line.startsWith('r-1'))!;
  expect(row).toContain('数据组');
  expect(widthOf(row.slice(0, row.indexOf('decode')))).toBe(widthOf(header.slice(0, header.indexOf('state')))); // aligned by columns
});

test('control characters of others are shown and not obeyed', () => {
  const loop = { ...LOOP, active: [request({ requestId: 'a\u001b[2J', key: 'x\u202ey\nz' })] };
  const events = [{ unixSeconds: 0, severity: 'error', message: 'bad\u0007bell\u009b31m' }] as const;
  const shown = state({ status: status({ loop, events, reason: 'why\r' }), rows: null });
  const all = topView(shown).lines.map((line) => paint(line, 200, false));
  expect(all.join('\n')).not.toMatch(/(?!\n)[\p{Cc}\p{Cf}]/u);
  expect(all.join('\n')).toContain('a\\u{1b}[2J');
  expect(all.join('\n')).toContain('x\\u{202e}y\\u{a}z');
});

test('without colour there are no escapes, with colour the same text', () => {
  const shown = state();
  for (const line of topView(shown).lines) {
    const coloured = paint(line, 100, true);
    expect(coloured.replaceAll(/\u001b\[\d+m/g, '').trimEnd()).toBe(paint(line, 100, false));
    expect(paint(line, 100, false)).not.toContain('\u001b');
  }
  expect(topView(shown).lines.some((line) => paint(line, 100, true).includes('\u001b[32m'))).toBe(true);
});

test('as text for a script, everything is there and nobody is told about keys', () => {
  const lines = text({ status: status({ loop: requests(150) }), rows: null });
  expect(lines.filter((line) => /^r-\d{3} /.test(line))).toHaveLength(150);
  expect(lines.join('\n')).not.toContain('quit');
});

test('a frame has the lines and columns of the terminal, whatever the status and the size', () => {
  const name = fc.string({ unit: 'binary', maxLength: 60 });
  const size = fc.integer({ min: 1, max: 250 });
  fc.assert(
    fc.property(
      fc.array(fc.record({ requestId: name, key: name }), { maxLength: 60 }),
      name,
      size,
      size,
      fc.nat(100),
      (named, reason, columns, rows, scroll) => {
        const shown = state({ status: status({ loop: { ...LOOP, active: named.map(request) }, reason }), columns, rows, scroll });
        const { lines } = topView(shown);
        expect(lines.length).toBeLessThanOrEqual(rows);
        if (rows > 1) expect(lines).toHaveLength(rows);
        for (const line of lines) expect(widthOf(paint(line, columns, false))).toBeLessThanOrEqual(columns);
      },
    ),
    { numRuns: 60 },
  );
});

test('on a small terminal the requests stay, the rest makes room', () => {
  const lines = text({ status: status({ loop: requests(30) }), columns: 60, rows: 14 });
  expect(lines.join('\n')).toMatch(/^r-000/m);
  expect(lines.join('\n')).not.toMatch(/^rank/m);
  expect(lines.at(-1)).toMatch(/^q quit/);
});
