/**
 * Feeds the readers of files from elsewhere with damaged ones: `npm run bench:fuzz [-- --inputs N --seed S]`. Every input has to be read or refused with
 * a typed error of one line, in bounded time and memory. What is not is printed with its target and index, is written to /tmp and makes the status 1.
 */
import { fork } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import yargs from 'yargs';
import { hideBin } from 'yargs/helpers';
import { wholeNumber } from '../../cli/number-option.js';
import { packageRoot } from '../../common/package-root.js';
import { currentFileName, type ChildMessage, type ChildTask } from './child-task.js';
import { FuzzTargets, inputOf, type FuzzTarget } from './targets.js';

const { inputs: inputsOfAll, seed } = (await yargs(hideBin(process.argv))
  .scriptName('npm run bench:fuzz --')
  .option('inputs', wholeNumber('inputs', { min: 1, default: 150_000, describe: 'Damaged inputs in all' }))
  .option('seed', wholeNumber('seed', { min: 0, default: 1, describe: 'What the damage is drawn from' }))
  .strict()
  .parseAsync()) as unknown as { inputs: number; seed: number };
/** Far beyond what an input of some kilobytes can need, on a busy machine too. */
const timeLimitMs = 10_000;
const rssLimitBytes = 768 * 2 ** 20;

interface Defect {
  readonly index: number;
  readonly what: string;
}

interface Outcome {
  readonly inputs: number;
  readonly refused: number;
  readonly seconds: number;
  readonly peakBytes: number;
  readonly defects: readonly Defect[];
}

const targets = await FuzzTargets.open();
try {
  const share = inputsOfAll / targets.all.reduce((sum, { inputs }) => sum + inputs, 0);
  let total = 0;
  for (const target of targets.all) {
    const { inputs, refused, seconds, peakBytes, defects } = await run(target, Math.ceil(target.inputs * share));
    total += inputs;
    process.stdout.write(
      `${target.name}: ${inputs} inputs in ${seconds.toFixed(1)} s, ${refused} refused, ${defects.length} defects, peak ${Math.round(peakBytes / 2 ** 20)} MiB\n`,
    );
    for (const { index, what } of defects.slice(0, 10)) {
      const path = join(tmpdir(), `tandem-fuzz-${target.name.replaceAll(' ', '-')}-${seed}-${index}`);
      writeFileSync(path, inputOf(target, seed, index));
      process.stdout.write(`  input ${index} (${path}): ${what}\n`);
    }
    if (defects.length > 0) process.exitCode = 1;
  }
  process.stdout.write(`${total} inputs, seed ${seed}: ${process.exitCode === 1 ? 'DEFECTS' : 'nothing but typed errors'}\n`);
} finally {
  targets.close();
}

/** A process for each run of inputs: after one that stopped it, a new one goes on behind it. */
async function run({ name }: FuzzTarget, inputs: number): Promise<Outcome> {
  const started = performance.now();
  const outcome = { inputs, refused: 0, peakBytes: 0, defects: [] as Defect[] };
  for (let from = 0; from < inputs && outcome.defects.length < 100;) {
    from = await runFrom({ target: name, seed, from, to: inputs, dir: targets.dir, timeLimitMs, rssLimitBytes }, outcome);
  }
  return { ...outcome, seconds: (performance.now() - started) / 1000 };
}

/** @returns the first input that has not been read */
function runFrom(task: ChildTask, outcome: { refused: number; peakBytes: number; defects: Defect[] }): Promise<number> {
  return new Promise((resolve, reject) => {
    const child = fork(join(packageRoot, 'dist/bench/fuzz/child.js'), { execArgv: ['--max-old-space-size=512'] });
    let next: number | null = null;
    child.on('message', (message: ChildMessage) => {
      if (message.kind === 'done') {
        outcome.refused += message.refused;
        next = task.to;
      } else if (message.kind === 'peak') outcome.peakBytes = Math.max(outcome.peakBytes, message.rssBytes);
      else {
        outcome.defects.push({ index: message.index, what: message.what });
        if (message.kind === 'stopped') next = message.index + 1;
      }
    });
    child.on('error', reject);
    child.on('exit', (code, signal) => {
      if (next !== null) return resolve(next);
      const index = readFileSync(join(task.dir, currentFileName)).readInt32LE();
      outcome.defects.push({ index, what: `ends the process (status ${code}, signal ${signal})` });
      resolve(index + 1);
    });
    child.send(task);
  });
}
