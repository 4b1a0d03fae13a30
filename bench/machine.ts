/** What the machine can do, and what else it does. */
import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import type { NativeAddon } from '../native/binding/addon.js';
import { THREADS } from './contestant.js';

export interface Limits {
  readonly readBandwidth: { readonly oneThread: number; readonly allThreads: number };
  /** Products of 4-bit weights and int8 activations per second, in registers, of all threads. */
  readonly productPeak: number;
  /** Share of the processors' time that was not idle while nothing of the bench ran; null where the system does not say. */
  readonly otherLoad: number | null;
}

const BANDWIDTH_BYTES = 512 * 1024 * 1024;
const REPEATS = 5;
const LOOK_MS = 300;

/** Takes about two seconds. Everything of the bench has to be at rest. */
export async function measureLimits(addon: NativeAddon): Promise<Limits> {
  const otherLoad = await measureLoad();
  const bandwidth = (threads: number): Promise<number> => addon.measureReadBandwidth({ bytes: BANDWIDTH_BYTES, threads, repeats: REPEATS });
  return {
    otherLoad,
    readBandwidth: { oneThread: await bandwidth(1), allThreads: await bandwidth(THREADS) },
    productPeak: await addon.measureProductPeak({ isa: addon.build.isa, threads: THREADS }),
  };
}

async function measureLoad(): Promise<number | null> {
  const before = processorTicks();
  await sleep(LOOK_MS);
  const after = processorTicks();
  if (before === null || after === null || after.all === before.all) return null;
  return 1 - (after.idle - before.idle) / (after.all - before.all);
}

/** Of all processors since the start, from the first line of /proc/stat: user, nice, system, idle, waiting for disks, ... */
function processorTicks(): { idle: number; all: number } | null {
  try {
    const ticks = readFileSync('/proc/stat', 'utf8').split('\n')[0]!.trim().split(/\s+/).slice(1, 9).map(Number);
    return { idle: ticks[3]! + ticks[4]!, all: ticks.reduce((sum, each) => sum + each, 0) };
  } catch {
    return null;
  }
}
