import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, test } from 'vitest';
import { CheckpointError, ConfigError } from '../../common/errors.js';
import { packageRoot } from '../../common/package-root.js';
import { openStore } from '../../model/store/open-store.js';
import { runCommand } from '../../test/support/run-command.js';
import { importCommand } from './import.js';
import { inspectCommand } from './inspect.js';

const scratch = mkdtempSync(join(tmpdir(), 'cli-import-'));
afterAll(() => rmSync(scratch, { recursive: true }));

const tiny = join(packageRoot, 'model/tiny');
const fromTiny = ['--from', join(tiny, 'sat'), '--config', join(tiny, 'config.json')];

test('import prints a summary, and inspect shows what it made', async () => {
  const store = join(scratch, 'int4');
  const imported = await run('import', ...fromTiny, '--to', store, '--quantize', 'int4', '--ranks', '4');
  expect(imported.stderr).toMatch(/99\/99 tensors, .* of .*: transformer\.final_layernorm\.bias\n$/);
  expect(imported.stdout).toMatch(new RegExp(`^imported 99 tensors, \\d+ bytes \\(.*\\), in \\d+\\.\\d s to ${store}\n$`));
  const { tensors } = await openStore(store);
  expect(tensors.length).toBe(99);

  expect((await run('inspect', store)).stdout).toContain('weights       INT4, vector-wise for 4 ranks');
});

test.each([
  { name: 'a target that exists', args: [...fromTiny, '--to', tiny], error: ConfigError, message: 'exists and is not empty' },
  {
    name: 'a folder that is no checkpoint',
    args: ['--from', tiny, '--to', join(scratch, 'x')],
    error: CheckpointError,
    message: 'latest does not exist',
  },
  {
    name: 'half a rank',
    args: [...fromTiny, '--to', join(scratch, 'x'), '--quantize', 'int8', '--ranks', '1.5'],
    error: Error,
    message: '--ranks 1.5: a whole number from 1 to 2147483647 is needed',
  },
  {
    name: 'three bits',
    args: [...fromTiny, '--to', join(scratch, 'x'), '--quantize', 'int3'],
    error: Error,
    message: 'Choices: "int8", "int4"',
  },
  {
    name: 'a limit without a unit that there is',
    args: [...fromTiny, '--to', join(scratch, 'x'), '--memory-limit', '4 gigs'],
    error: Error,
    message: '--memory-limit 4 gigs: a size is needed, such as 1.5GiB or 800MiB',
  },
  {
    name: 'too little memory',
    args: [...fromTiny, '--to', join(scratch, 'x'), '--memory-limit', '64MiB'],
    error: ConfigError,
    message: 'a memory limit of 64.0 MiB is too low',
  },
  { name: 'no target', args: fromTiny, error: Error, message: 'Missing required argument: to' },
])('$name is an error of one thing', async ({ args, error, message }) => {
  const failure: unknown = await run('import', ...args).then(
    () => null,
    (reason: unknown) => reason,
  );
  expect(failure).toBeInstanceOf(error);
  expect((failure as Error).message).toContain(message);
  expect(readdirSync(scratch).filter((name) => name === 'x' || name.includes('.partial'))).toEqual([]);
});

test('--dry-run prints the plan and writes nothing', async () => {
  const { stdout } = await run('import', ...fromTiny, '--to', join(scratch, 'x'), '--quantize', 'int8', '--dry-run');
  expect(stdout).toMatch(/^transformer\.layers\.5\.mlp\.dense_4h_to_h\.qweight +I8 +256 x 768 +196608$/m);
  expect(stdout).toMatch(/^from {4}\S+mp_rank_00_model_states\.pt and 1 more files: 2 ranks, [\d.]+ MiB to read$/m);
  expect(stdout).toMatch(/^to {6}\S+: 99 tensors, \d+ bytes \([\d.]+ MiB\)$/m);
  expect(stdout).toMatch(/^disk {4}[\d.]+ MiB needed, .* free$/m);
  expect(stdout).toMatch(/^memory {2}about \d+ MiB, one thread$/m);
  expect(readdirSync(scratch).filter((name) => name.includes('x'))).toEqual([]);
});

function run(...args: readonly string[]): Promise<{ stdout: string; stderr: string }> {
  return runCommand([importCommand, inspectCommand], args);
}
