import { mkdtempSync, rmSync, unlinkSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { packageRoot } from '../../common/package-root.js';
import { goldenModel } from '../../model/import/fixtures/golden-checkpoints.js';
import { importCheckpoint } from '../../model/import/import-checkpoint.js';
import { openStore } from '../../model/store/open-store.js';
import { writeSyntheticSat } from '../../model/synth/write-synthetic.js';
import { runCommand } from '../../test/support/run-command.js';
import { inspectCommand } from './inspect.js';

const scratch = mkdtempSync(join(tmpdir(), 'cli-inspect-'));
afterAll(() => rmSync(scratch, { recursive: true }));

const store = join(scratch, 'int4');
beforeAll(async () => {
  const tiny = join(packageRoot, 'model/tiny');
  await importCheckpoint({ from: join(tiny, 'sat'), to: store, configPath: join(tiny, 'config.json'), quantize: 4, ranks: 4 });
});

/** What the command prints. */
async function inspect(...args: readonly string[]): Promise<string> {
  return (await runCommand([inspectCommand], ['inspect', ...args])).stdout;
}

test('a store: its model, precision, sizes by part, checksums; tensor by tensor when asked', async () => {
  const shown = await inspect(store);
  expect(shown).toContain('model         6 layers, hidden 256, 4 heads, inner 768, vocabulary 4096, context 512');
  expect(shown).toContain('weights       INT4, vector-wise for 4 ranks');
  expect(shown).toContain('world sizes   1, 2, 4');
  expect(shown).toContain('checksums     SHA-256 of every tensor in manifest.json');
  expect(shown).toMatch(/^layers\.\*\.mlp\.dense_h_to_4h\.qweight +6 +1179648 +1\.1 MiB$/m); // 6 x 1536 x 256 / 2
  const { tensors } = await openStore(store);
  expect(shown).toContain(`99 tensors, ${tensors.reduce((sum, { bytes }) => sum + bytes, 0)} bytes`);
  expect(shown).not.toContain('layers.5.');

  const listed = await inspect(store, '--tensors');
  for (const { name, sha256 } of tensors) {
    expect(listed.split('\n').filter((line) => line.startsWith(name) && line.endsWith(sha256!)).length, name).toBe(1);
  }
});

test('a store as JSON', async () => {
  const json = JSON.parse(await inspect(store, '--json')) as Record<string, unknown>;
  expect(json).toMatchObject({ manifest: true, world_sizes: [1, 2, 4], config: { quantization: { bits: 4, group: 'vector', ranks: 4 } } });
  expect((json['tensors'] as unknown[]).length).toBe(99);
});

test('a store without a manifest', async () => {
  const bare = join(scratch, 'bare');
  await importCheckpoint({ from: goldenModel('E').layout('tp1').dir!, to: bare, configPath: goldenModel('E').configPath });
  unlinkSync(join(bare, 'manifest.json'));
  expect(await inspect(bare)).toContain('checksums     none recorded');
});

test.each([
  { layout: 'tp1', weights: 'float16', ranks: 1 },
  { layout: 'tp4-int8', weights: 'INT8', ranks: 4 },
  { layout: 'tp4-int4', weights: 'INT4', ranks: 4 },
])('a SAT checkpoint: $layout', async ({ layout, weights, ranks }) => {
  const dir = goldenModel('E').layout(layout).dir!;
  const shown = await inspect(dir, '--tensors');
  expect(shown).toContain(`checkpoint    ${dir} (SAT)`);
  expect(shown).toContain(`ranks         ${ranks}\n`);
  expect(shown).toContain(`weights       ${weights}\n`);
  expect(shown).toMatch(/^transformer\.word_embeddings\.weight +float16/m);
  expect((JSON.parse(await inspect(dir, '--json')) as { ranks: unknown[] }).ranks.length).toBe(ranks);
});

test('an archive in parts, by their pattern', async () => {
  const dir = join(scratch, 'parts');
  await writeSyntheticSat({ config: goldenModel('E').config, seed: '0', bits: 4, ranks: 2, to: dir }, 5);
  const shown = await inspect(join(dir, 'glm-130b-sat.tar.part_*'));
  expect(shown).toContain('files         5\n');
  expect(shown).toContain('ranks         2\n');
  expect(shown).toContain('weights       INT4\n');
});
