/** The CUDA backend, its launches and kernels, on the emulator of native/test/cuda_on_cpu.h: the same code that runs on a GPU (test/gpu/main.ts). */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { ensureTinyStore } from '../model/tiny/tiny-model.js';
import {
  abortedSteps,
  equalTexts,
  forwardDistance,
  LEAST_AGREEMENT,
  quantisedDistance,
  queuedSteps,
  RELATIVE_L2,
  tinyLogits,
  varianceOf,
} from './gpu/checks.js';
import { RANDOM_MODELS } from './support/golden-data.js';

const scratch = mkdtempSync(join(tmpdir(), 'tandem-cuda-'));
beforeAll(() => {
  process.env['TANDEM_CUDA_ON_CPU'] = '1';
});
afterAll(() => {
  delete process.env['TANDEM_CUDA_ON_CPU'];
  rmSync(scratch, { recursive: true, force: true });
});

describe.each(RANDOM_MODELS)('random model %s', (model) => {
  test('logits of all positions', async () => {
    expect(await forwardDistance(scratch, model, 1)).toBeLessThan(RELATIVE_L2);
  });

  test('logits of two ranks', async () => {
    expect(await forwardDistance(scratch, model, 2)).toBeLessThan(RELATIVE_L2);
  });

  test('logits with quantised weights', async () => {
    expect(await quantisedDistance(scratch, model, 1)).toBeLessThan(RELATIVE_L2);
  });
});

describe('the tiny model', () => {
  test('logits of the last positions', async () => {
    const { distance, agreement } = await tinyLogits(await ensureTinyStore());
    expect(distance).toBeLessThan(RELATIVE_L2);
    expect(agreement).toBeGreaterThanOrEqual(LEAST_AGREEMENT);
  });

  test('a row has the same bits alone, among others, in a long run and played again', async () => {
    expect(await varianceOf(await ensureTinyStore())).toEqual([]);
  });

  test.each([1, 2])('steps sent before those end that they go on from, %i rank(s)', async (worldSize) => {
    expect(await queuedSteps(await ensureTinyStore(), worldSize)).toEqual([]);
  });

  test('an engine that is aborted with steps under way', async () => {
    const outcomes = await abortedSteps(await ensureTinyStore());
    const done = outcomes.filter((outcome) => outcome === 'sample').length;
    expect(outcomes).toEqual(outcomes.map((_, i): unknown => (i < done ? 'sample' : expect.stringMatching(/abort/))));
    expect(done).toBeLessThan(outcomes.length);
  });

  test('texts through a server', async () => {
    const { equal, of, differing } = await equalTexts(4, 1);
    expect(differing).toEqual([]);
    expect(equal).toBe(of);
  });
});
