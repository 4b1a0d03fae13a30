import { describe, expect, test } from 'vitest';
import { ConfigError } from '../../common/errors.js';
import { gpuModels, parseGpus, parseNvidiaSmi } from './gpus.js';

const gib = 2 ** 30;

describe('--gpus', () => {
  test.each([
    { text: '4x24GB', gpus: { count: 4, name: 'GPU of 24 GB', memoryBytes: 24 * gib, bandwidth: null } },
    { text: '8 * 10.5 GiB', gpus: { count: 8, name: 'GPU of 10.5 GB', memoryBytes: 10.5 * gib, bandwidth: null } },
    { text: '8xA100-40', gpus: { count: 8, name: 'A100-40', memoryBytes: 40 * gib, bandwidth: 1555e9 } },
    { text: '8 x RTX 2080 Ti', gpus: { count: 8, name: 'RTX 2080 Ti', memoryBytes: 11 * gib, bandwidth: 616e9 } },
    { text: 'rtx3090', gpus: { count: 1, name: 'RTX 3090', memoryBytes: 24 * gib, bandwidth: 936e9 } },
  ])('$text', ({ text, gpus }) => {
    expect(parseGpus(text)).toEqual(gpus);
  });

  test.each(['', '4x', 'x24GB', '0x24GB', '4x0GB', '4xABC', '4x24MB', '-1x24GB', '99999x24GB'])('refuses %j', (text) => {
    expect(() => parseGpus(text)).toThrow(ConfigError);
  });

  test('knows each of its models by its own name', () => {
    for (const { name, memoryGb } of gpuModels) expect(parseGpus(`2x${name}`)).toMatchObject({ name, memoryBytes: memoryGb * gib });
  });
});

describe('nvidia-smi', () => {
  test.each([
    { line: 'NVIDIA H100 80GB HBM3, 81559', bandwidth: 3350e9 },
    { line: 'NVIDIA H100 PCIe, 81559', bandwidth: 2000e9 },
    { line: 'NVIDIA H200, 143771', bandwidth: 4800e9 },
    { line: 'NVIDIA A100-SXM4-40GB, 40960', bandwidth: 1555e9 },
    { line: 'NVIDIA A100-SXM4-80GB, 81920', bandwidth: 2039e9 },
    { line: 'Tesla V100-SXM2-32GB, 32768', bandwidth: 900e9 },
    { line: 'NVIDIA GeForce RTX 2080 Ti, 11264', bandwidth: 616e9 },
    { line: 'NVIDIA L4, 23034', bandwidth: 300e9 },
    { line: 'NVIDIA L40S, 46068', bandwidth: 864e9 },
    { line: 'NVIDIA RTX A6000, 49140', bandwidth: 768e9 },
    { line: 'Tesla T4, 15360', bandwidth: 320e9 },
    { line: 'Some Other Card, 1000', bandwidth: null },
  ])('$line', ({ line, bandwidth }) => {
    expect(parseNvidiaSmi(`${line}\n`)).toMatchObject({ count: 1, memoryBytes: Number(line.split(', ')[1]) * 2 ** 20, bandwidth });
  });

  test('of different cards the smallest and the slowest count', () => {
    expect(parseNvidiaSmi('NVIDIA GeForce RTX 4090, 24564\nNVIDIA GeForce RTX 3090, 24576\n')).toEqual({
      count: 2,
      name: 'NVIDIA GeForce RTX 4090, NVIDIA GeForce RTX 3090',
      memoryBytes: 24564 * 2 ** 20,
      bandwidth: 936e9,
    });
    expect(parseNvidiaSmi('NVIDIA H200, 143771\nUnknown, 999999\n')).toMatchObject({ count: 2, bandwidth: null });
  });

  test.each(['', 'No devices were found\n', 'NVIDIA-SMI has failed, driver\n'])('shows no cards: %j', (text) => {
    expect(parseNvidiaSmi(text)).toBeNull();
  });
});
