import { join } from 'node:path';
import { expect, test } from 'vitest';
import { ConfigError } from '../../common/errors.js';
import { packageRoot } from '../../common/package-root.js';
import { runCommand } from '../../test/support/run-command.js';
import { planCommand } from './plan.js';

/** What the command prints. */
async function plan(...args: readonly string[]): Promise<string> {
  return (await runCommand([planCommand], ['plan', ...args])).stdout;
}

test('GLM-130B on four cards of 24 GB: INT4 fits, and why the others do not', async () => {
  const shown = await plan('--gpus', '4xRTX3090');
  expect(shown).toContain('hardware   4 x RTX 3090, 24.0 GiB each, 21.6 GiB of it usable (90 %), 936 GB/s');
  expect(shown).toMatch(/^INT4 +FP16 +yes +15\.6 GiB/m);
  expect(shown).toMatch(/^INT8 +FP16 +no/m);
  expect(shown).toContain('INT8 does not fit: the weights take 30.41 GiB, 21.60 GiB are usable');
  expect(shown.match(/does not fit/g)).toHaveLength(2);
});

test('as JSON, of another model, with a bandwidth', async () => {
  const args = ['--config', join(packageRoot, 'model/tiny/config.json'), '--gpus', '8x1GB', '--bandwidth', '100', '--context', '100'];
  const json = JSON.parse(await plan(...args, '--json')) as {
    plans: { worldSize: number; fits: boolean; stepMs: { oneSequence: number } }[];
  };
  expect(json).toMatchObject({ hardware: { count: 8, bandwidth: 100e9 }, context: 100, kvBlockSize: 16 });
  expect(json.plans).toHaveLength(6);
  for (const { worldSize, fits, stepMs } of json.plans) {
    expect({ worldSize, fits }).toEqual({ worldSize: 4, fits: true });
    expect(stepMs.oneSequence).toBeGreaterThan(0);
  }
});

test('without GPUs it is about the memory of this machine', async () => {
  expect(await plan('--gpus', 'none')).toContain("hardware   1 x this machine's memory");
});

test.each([
  { args: ['--gpus', '4x'], message: '--gpus 4x' },
  { args: ['--gpus', '4x24GB', '--context', '4096'], message: '--context 4096: the model takes 2048 tokens' },
  { args: ['--gpus', '4x24GB', '--memory-share', '1.5'], message: '--memory-share 1.5' },
  { args: ['--gpus', '4x24GB', '--bandwidth', '-3'], message: '--bandwidth -3' },
])('$message is refused', async ({ args, message }) => {
  await expect(plan(...args)).rejects.toThrow(ConfigError);
  await expect(plan(...args)).rejects.toThrow(message);
});
