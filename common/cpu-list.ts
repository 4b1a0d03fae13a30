import { readFileSync } from 'node:fs';
import { ConfigError } from './errors.js';

const MOST_CPUS = 1024;

/**
 * CPUs as taskset names them: `0-3,8` or, with a stride, `0-6:2`; ascending.
 * @throws ConfigError it is not such a list, or names a CPU that this process may not use
 */
export function parseCpuList(text: string, allowed: readonly number[] | null = allowedCpus()): readonly number[] {
  const cpus = numbersOf(text);
  if (cpus === null) throw new ConfigError(`--cpus ${text}: a list of CPUs as in 0-3,8 is needed`);
  const refused = allowed === null ? [] : cpus.filter((cpu) => !allowed.includes(cpu));
  if (refused.length > 0) {
    throw new ConfigError(`--cpus ${text}: this process may not use ${formatCpuList(refused)}, allowed are ${formatCpuList(allowed!)}`);
  }
  return cpus;
}

/**
 * A rank's share of CPUs: as many neighbours of the list as any other rank has, up to one.
 * @throws ConfigError there are fewer CPUs than ranks: two ranks would share one
 */
export function cpusOfRank(cpus: readonly number[], rank: number, worldSize: number): readonly number[] {
  if (cpus.length < worldSize) {
    throw new ConfigError(`--cpus ${formatCpuList(cpus)}: ${worldSize} workers need as many CPUs at least`);
  }
  const begin = (of: number): number => Math.floor((cpus.length * of) / worldSize);
  return cpus.slice(begin(rank), begin(rank + 1));
}

export function formatCpuList(cpus: readonly number[]): string {
  const ranges: { first: number; last: number }[] = [];
  for (const cpu of cpus) {
    const range = ranges.at(-1);
    if (range && cpu === range.last + 1) range.last = cpu;
    else ranges.push({ first: cpu, last: cpu });
  }
  return ranges.map(({ first, last }) => (first === last ? `${first}` : `${first}-${last}`)).join(',');
}

/** What sched_getaffinity says of this process; null where the system does not tell. */
function allowedCpus(): readonly number[] | null {
  try {
    const [, list] = /^Cpus_allowed_list:\s*(\S+)$/m.exec(readFileSync('/proc/self/status', 'utf8')) ?? [];
    return list === undefined ? null : numbersOf(list);
  } catch {
    return null;
  }
}

function numbersOf(text: string): readonly number[] | null {
  const cpus = new Set<number>();
  for (const part of text.split(',')) {
    const [, first, last = first, stride = '1'] = /^(\d{1,4})(?:-(\d{1,4})(?::(\d{1,4}))?)?$/.exec(part) ?? [];
    if (first === undefined || Number(last) < Number(first) || Number(last) >= MOST_CPUS || Number(stride) < 1) return null;
    for (let cpu = Number(first); cpu <= Number(last); cpu += Number(stride)) cpus.add(cpu);
  }
  return [...cpus].sort((a, b) => a - b);
}
