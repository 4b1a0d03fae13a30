import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { ConfigError } from '../../common/errors.js';

/** GPUs of one kind. */
export interface Gpus {
  readonly count: number;
  readonly name: string;
  readonly memoryBytes: number;
  /** Bytes per second; null: not in the table. */
  readonly bandwidth: number | null;
}

interface GpuModel {
  readonly name: string;
  /** GB as vendors count memory chips: 2^30 bytes. */
  readonly memoryGb: number;
  /** 10^9 bytes per second, from the vendor's data sheet. */
  readonly bandwidth: number;
  /** In the names that nvidia-smi prints. */
  readonly pattern: RegExp;
}

/** The first whose pattern matches, and of those with the same pattern the one with the nearest memory. */
export const gpuModels: readonly GpuModel[] = [
  { name: 'H200', memoryGb: 141, bandwidth: 4800, pattern: /H200/ },
  { name: 'H100-PCIe', memoryGb: 80, bandwidth: 2000, pattern: /H100 PCIe/ },
  { name: 'H100', memoryGb: 80, bandwidth: 3350, pattern: /H100/ },
  { name: 'A100-40', memoryGb: 40, bandwidth: 1555, pattern: /A100/ },
  { name: 'A100-80', memoryGb: 80, bandwidth: 2039, pattern: /A100/ },
  { name: 'A800', memoryGb: 80, bandwidth: 2039, pattern: /A800/ },
  { name: 'A10', memoryGb: 24, bandwidth: 600, pattern: /A10\b/ },
  { name: 'A30', memoryGb: 24, bandwidth: 933, pattern: /A30\b/ },
  { name: 'A40', memoryGb: 48, bandwidth: 696, pattern: /A40\b/ },
  { name: 'A6000', memoryGb: 48, bandwidth: 768, pattern: /RTX A6000/ },
  { name: 'RTX 6000 Ada', memoryGb: 48, bandwidth: 960, pattern: /RTX 6000 Ada/ },
  { name: 'L4', memoryGb: 24, bandwidth: 300, pattern: /L4\b/ },
  { name: 'L40', memoryGb: 48, bandwidth: 864, pattern: /L40\b/ },
  { name: 'L40S', memoryGb: 48, bandwidth: 864, pattern: /L40S/ },
  { name: 'V100-16', memoryGb: 16, bandwidth: 900, pattern: /V100/ },
  { name: 'V100-32', memoryGb: 32, bandwidth: 900, pattern: /V100/ },
  { name: 'T4', memoryGb: 16, bandwidth: 320, pattern: /T4\b/ },
  { name: 'RTX 5090', memoryGb: 32, bandwidth: 1792, pattern: /RTX 5090/ },
  { name: 'RTX 4090', memoryGb: 24, bandwidth: 1008, pattern: /RTX 4090/ },
  { name: 'RTX 3090', memoryGb: 24, bandwidth: 936, pattern: /RTX 3090/ },
  { name: 'RTX 2080 Ti', memoryGb: 11, bandwidth: 616, pattern: /RTX 2080 Ti/ },
];

const gb = 2 ** 30;

/**
 * Reads `4x24GB`, `8 x A100-40` or `rtx3090`. A GB is 2^30 bytes here, as a card's name means it.
 * @throws ConfigError
 */
export function parseGpus(text: string): Gpus {
  const { count = '1', what = '' } = /^\s*(?:(?<count>\d{1,4})\s*[x*]\s*)?(?<what>.*?)\s*$/i.exec(text)?.groups ?? {};
  const number = Number(count);
  const size = /^(\d+(?:\.\d+)?) ?GI?B?$/i.exec(what);
  if (number > 0 && size !== null && Number(size[1]) > 0) {
    return { count: number, name: `GPU of ${size[1]} GB`, memoryBytes: Number(size[1]) * gb, bandwidth: null };
  }
  const model = gpuModels.find(({ name }) => plain(name) === plain(what));
  if (number > 0 && model !== undefined) return { count: number, ...described(model) };
  throw new ConfigError(
    `--gpus ${text}: give how many and what, as in 4x24GB or 8xA100-40; known are ${gpuModels.map(({ name }) => name.replaceAll(' ', '')).join(', ')}`,
  );
}

/** What nvidia-smi shows of this machine; null where there is none, or it shows none. Of different cards, the smallest and the slowest count. */
export async function detectGpus(): Promise<Gpus | null> {
  try {
    const query = ['--query-gpu=name,memory.total', '--format=csv,noheader,nounits'];
    const { stdout } = await promisify(execFile)('nvidia-smi', query, { timeout: 30_000 });
    return parseNvidiaSmi(stdout);
  } catch {
    return null;
  }
}

/** @param csv lines of name and MiB */
export function parseNvidiaSmi(csv: string): Gpus | null {
  const cards = csv.split('\n').flatMap((line) => {
    const { name, mib } = /^(?<name>.+), *(?<mib>\d+)$/.exec(line.trim())?.groups ?? {};
    return name === undefined ? [] : [{ name, memoryBytes: Number(mib) * 2 ** 20, bandwidth: bandwidthOf(name, Number(mib) / 1024) }];
  });
  if (cards.length === 0) return null;
  const bandwidths = cards.map(({ bandwidth }) => bandwidth);
  return {
    count: cards.length,
    name: [...new Set(cards.map(({ name }) => name))].join(', '),
    memoryBytes: Math.min(...cards.map(({ memoryBytes }) => memoryBytes)),
    bandwidth: bandwidths.includes(null) ? null : Math.min(...bandwidths.map((bandwidth) => bandwidth!)),
  };
}

function bandwidthOf(name: string, memoryGb: number): number | null {
  const first = gpuModels.find(({ pattern }) => pattern.test(name));
  if (first === undefined) return null;
  const distance = (model: GpuModel): number => Math.abs(model.memoryGb - memoryGb);
  const alike = gpuModels.filter(({ pattern }) => pattern.source === first.pattern.source);
  return described(alike.reduce((best, model) => (distance(model) < distance(best) ? model : best))).bandwidth;
}

function described({ name, memoryGb, bandwidth }: GpuModel): { name: string; memoryBytes: number; bandwidth: number } {
  return { name, memoryBytes: memoryGb * gb, bandwidth: bandwidth * 1e9 };
}

function plain(name: string): string {
  return name.toLowerCase().replaceAll(/[^a-z0-9]/g, '');
}
