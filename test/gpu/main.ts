/** `npm run test:gpu`: what the CUDA backend has to show on a GPU of this machine. Ends with status 1 where something is wrong. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ensureTinyStore } from '../../model/tiny/tiny-model.js';
import { loadAddon } from '../../native/binding/addon.js';
import { RANDOM_MODELS } from '../support/golden-data.js';
import {
  equalTexts,
  forwardDistance,
  LEAST_AGREEMENT,
  quantisedDistance,
  queuedSteps,
  RELATIVE_L2,
  tinyLogits,
  varianceOf,
} from './checks.js';

const scratch = mkdtempSync(join(tmpdir(), 'tandem-gpu-'));
let failures = 0;

function print(line: string): void {
  process.stdout.write(`${line}\n`);
}

async function check(what: string, measure: () => Promise<{ passes: boolean; seen: string }>): Promise<void> {
  const { passes, seen } = await measure().catch((error: unknown) => ({ passes: false, seen: String(error) }));
  if (!passes) failures += 1;
  print(`${passes ? 'passed' : 'FAILED'}  ${what}: ${seen}`);
}

function distance(what: string, measure: () => Promise<number>): Promise<void> {
  return check(`${what}, relative L2 at most ${RELATIVE_L2}`, async () => {
    const seen = await measure();
    return { passes: seen < RELATIVE_L2, seen: seen.toExponential(2) };
  });
}

try {
  const { name, totalBytes } = loadAddon().describeGpu(0);
  print(`GPU 0: ${name}, ${(totalBytes / 2 ** 30).toFixed(1)} GiB`);
  for (const model of RANDOM_MODELS) {
    await distance(`random model ${model}`, () => forwardDistance(scratch, model, 1));
    await distance(`random model ${model}, two ranks on one GPU`, () => forwardDistance(scratch, model, 2));
    await distance(`random model ${model}, quantised`, () => quantisedDistance(scratch, model, 1));
  }
  const store = await ensureTinyStore();
  await check(`tiny model, logits (relative L2 at most ${RELATIVE_L2}, same best token for ${LEAST_AGREEMENT * 100} %)`, async () => {
    const seen = await tinyLogits(store);
    return {
      passes: seen.distance < RELATIVE_L2 && seen.agreement >= LEAST_AGREEMENT,
      seen: `${seen.distance.toExponential(2)}, ${(seen.agreement * 100).toFixed(1)} %`,
    };
  });
  await check('tiny model, a row has the same bits alone, among others, in a long run and played again', async () => {
    const differences = await varianceOf(store);
    return { passes: differences.length === 0, seen: differences.join('; ') || 'no bit differs' };
  });
  for (const worldSize of [1, 2]) {
    await check(`tiny model, ${worldSize} rank(s), steps sent before those end that they go on from`, async () => {
      const differences = await queuedSteps(store, worldSize);
      return { passes: differences.length === 0, seen: differences.join('; ') || 'no bit differs' };
    });
  }
  await check('tiny model, blank-filling texts through a server', async () => {
    const { equal, of, differing } = await equalTexts(Infinity, 1);
    return { passes: equal >= of * LEAST_AGREEMENT, seen: [`${equal} of ${of} are the original's`, ...differing].join('\n        ') };
  });
} finally {
  rmSync(scratch, { recursive: true, force: true });
}
print(failures === 0 ? 'all passed' : `${failures} failed`);
process.exitCode = failures === 0 ? 0 : 1;
