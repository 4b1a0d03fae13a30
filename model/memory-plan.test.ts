import { describe, expect, test } from 'vitest';
import { plannedBytes } from './export/write-torch.js';
import { satTensors } from './export/sat-tensors.js';
import { kvBlockBytes } from './kv-blocks.js';
import { planMemory, rankWeightBytes, type PlanDevices, type PlanOptions } from './memory-plan.js';
import { glm130b, localShare } from './model-config.js';
import { goldenModel } from './import/fixtures/golden-checkpoints.js';

const gib = 2 ** 30;

function gpus(count: number, memoryGib: number, bandwidth: number | null = null): PlanDevices {
  return { count, memoryBytes: memoryGib * gib, bandwidth, activationBytes: 2 };
}

function options(more: Partial<PlanOptions>): PlanOptions {
  return { config: glm130b, devices: gpus(8, 40), weights: 'fp16', kv: 'fp16', context: 2048, memoryShare: 0.9, ...more };
}

// The hardware table of GLM-130B's README; where it says that weights have to be swapped out, they do not fit.
describe('the table of the model itself', () => {
  test.each([
    { name: '8 x A100', devices: gpus(8, 40), weights: 'fp16', fits: true },
    { name: '8 x V100', devices: gpus(8, 32), weights: 'fp16', fits: false },
    { name: '8 x V100', devices: gpus(8, 32), weights: 'int8', fits: true },
    { name: '8 x RTX 3090', devices: gpus(8, 24), weights: 'int8', fits: true },
    { name: '4 x RTX 3090', devices: gpus(4, 24), weights: 'int4', fits: true },
    { name: '8 x RTX 2080 Ti', devices: gpus(8, 11), weights: 'int4', fits: true },
    // What it does not list, and a smaller machine of each precision.
    { name: '4 x A100', devices: gpus(4, 40), weights: 'fp16', fits: false },
    { name: '4 x RTX 3090', devices: gpus(4, 24), weights: 'int8', fits: false },
    { name: '2 x RTX 3090', devices: gpus(2, 24), weights: 'int4', fits: false },
    { name: '4 x RTX 2080 Ti', devices: gpus(4, 11), weights: 'int4', fits: false },
  ] as const)('$name, $weights: $fits', ({ devices, weights, fits }) => {
    const plan = planMemory(options({ devices, weights }));
    expect(plan.fits).toBe(fits);
    expect(plan.whyNot === null).toBe(fits);
  });
});

test.each(['fp16', 'int8', 'int4'] as const)('%s weights of a rank are what its tensors have', (weights) => {
  const bits = weights === 'fp16' ? null : weights === 'int8' ? 8 : 4;
  const { config } = goldenModel('A');
  for (const ranks of [1, 2, 4]) {
    const tensors = satTensors(config, { ranks, bits }).filter(({ part }) => part !== 'frequencies');
    expect(rankWeightBytes(config, ranks, weights)).toBe(tensors.reduce((sum, tensor) => sum + plannedBytes(tensor), 0));
  }
});

test('everything that is planned fits, and one block or sequence more would not', () => {
  for (const weights of ['fp16', 'int8', 'int4'] as const) {
    for (const kv of ['fp16', 'int8'] as const) {
      const plan = planMemory(options({ weights, kv }));
      const taken = plan.weightBytes + plan.workspaceBytes + plan.kvBlocks * plan.kvBlockBytes;
      expect(taken).toBeLessThanOrEqual(plan.usableBytes);
      expect(taken + plan.kvBlockBytes).toBeGreaterThan(plan.usableBytes);
      expect(plan.kvTokens).toBe(16 * plan.kvBlocks);
      expect(plan.maxSequences * 2048).toBeLessThanOrEqual(plan.kvTokens);
      expect((plan.maxSequences + 1) * 2048).toBeGreaterThan(plan.kvTokens);
    }
  }
});

test('INT8 keys and values take little more than half', () => {
  const share = localShare(glm130b, 8);
  const bytes = (dtype: 'fp16' | 'int8'): number => kvBlockBytes({ config: glm130b, share, blockSize: 16, dtype });
  expect(bytes('fp16')).toBe(2 * 70 * 12 * 128 * 16 * 2);
  expect(bytes('int8')).toBe(2 * 70 * 12 * (128 + 2) * 16);
});

test('as many devices as can divide the model are used', () => {
  expect(planMemory(options({ devices: gpus(7, 80) })).worldSize).toBe(4);
  expect(planMemory(options({ devices: gpus(64, 80) })).worldSize).toBe(32);
});

test('a step takes as long as its bytes at the bandwidth', () => {
  const plan = planMemory(options({ devices: gpus(8, 40, 1e12) }));
  const context = 128 * plan.kvBlockBytes;
  expect(plan.stepMs!.oneSequence).toBeCloseTo((plan.weightBytes + context) / 1e9, 6);
  expect(plan.stepMs!.maxSequences).toBeCloseTo((plan.weightBytes + plan.maxSequences * context) / 1e9, 6);
  expect(planMemory(options({})).stepMs).toBeNull();
});

describe('why it does not fit', () => {
  const { weightBytes, workspaceBytes, kvBlockBytes: blockBytes } = planMemory(options({}));
  test.each([
    { name: 'the weights alone', bytes: weightBytes - 1, message: /^the weights take 29\.97 GiB, 29\.97 GiB are usable$/ },
    {
      name: 'the workspace',
      bytes: weightBytes + workspaceBytes / 2,
      message: /^weights \(29\.97 GiB\) and workspace .* more than the usable/,
    },
    {
      name: 'a whole sequence',
      bytes: weightBytes + workspaceBytes + 10 * blockBytes,
      message: /a sequence of 2048 tokens takes 0\.82 GiB; one of 160 would fit \(--context\)$/,
    },
  ])('$name', ({ bytes, message }) => {
    const devices = { ...gpus(8, 0), memoryBytes: bytes };
    expect(planMemory(options({ devices, memoryShare: 1 })).whyNot).toMatch(message);
  });

  test('a shorter one does', () => {
    const devices = { ...gpus(8, 0), memoryBytes: weightBytes + workspaceBytes + 10 * blockBytes };
    expect(planMemory(options({ devices, memoryShare: 1, context: 160 })).fits).toBe(true);
    expect(planMemory(options({ devices, memoryShare: 1, context: 161 })).fits).toBe(false);
  });
});
