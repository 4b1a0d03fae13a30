/**
 * The tiny model's held-out accuracies through the server: FP16, INT8 and INT4 weights at 1 and 2 workers, beside what the original
 * evaluation harness found (test/golden/tiny/evaluation.json).
 */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { packageRoot } from '../common/package-root.js';
import type { TandemClient } from '../cli/client.js';
import { formatTable } from '../cli/format.js';
import { startLocalCluster } from '../cli/local-cluster.js';
import { importCheckpoint } from '../model/import/import-checkpoint.js';
import { tinyModelDir } from '../model/tiny/tiny-model.js';
import { exactMatch } from './exact-match.js';

/** [name, data file below eval/data, golden task and group] */
const BLANK_SETS = [
  { name: 'blank/en', task: 'blank/blank-en.yaml' },
  { name: 'blank/zh', task: 'blank/blank-zh.yaml' },
] as const;
const MMLU_SETS = ['geography', 'nature', 'language', 'life'] as const;
const PRECISIONS = [
  { name: 'fp16', golden: 'fp32', quantize: null },
  { name: 'int8', golden: 'int8', quantize: 8 },
  { name: 'int4', golden: 'int4', quantize: 4 },
] as const;
const CONCURRENCY = 32;

type Golden = { runs: Record<string, Record<string, Record<string, Record<string, [Record<string, number>, number]>>>> };
const golden = JSON.parse(readFileSync(join(packageRoot, 'test/golden/tiny/evaluation.json'), 'utf8')) as Golden;

const scratch = mkdtempSync(join(tmpdir(), 'tandem-accuracy-'));
process.once('exit', () => rmSync(scratch, { recursive: true, force: true }));
const rows: string[][] = [];
let isWrong = false;
for (const { name, golden: goldenName, quantize } of PRECISIONS) {
  const store = join(scratch, name);
  await importCheckpoint({
    from: join(tinyModelDir, 'sat'),
    to: store,
    configPath: join(tinyModelDir, 'config.json'),
    tokenizerPath: join(tinyModelDir, 'tokenizer.model'),
    quantize,
  });
  for (const worldSize of [1, 2]) {
    const cluster = await startLocalCluster({ model: store, worldSize });
    try {
      for (const { name: set, task } of BLANK_SETS) {
        add(name, worldSize, set, await blankAccuracy(cluster.client, set), golden.runs[goldenName]![task]!['all']!['test.jsonl']!);
      }
      for (const set of MMLU_SETS) {
        const expected = golden.runs[goldenName]!['mmlu/mmlu.yaml']![set]![`${set}/test.jsonl`]!;
        add(name, worldSize, `mmlu/${set}`, await choiceAccuracy(cluster.client, `mmlu/${set}`), expected);
      }
    } finally {
      await cluster.close();
    }
  }
}
process.stdout.write(`${formatTable(['weights', 'workers', 'set', 'items', 'measured %', 'reference %'], rows)}\n`);
process.stdout.write(
  isWrong ? 'FAILED: a set differs from the reference by more than one item\n' : 'All sets are within one item of the reference.\n',
);
process.exitCode = isWrong ? 1 : 0;

function add(
  precision: string,
  worldSize: number,
  set: string,
  correct: boolean[],
  [metrics, count]: [Record<string, number>, number],
): void {
  if (correct.length !== count) throw new Error(`${set} has ${correct.length} items, the reference ${count}`);
  const measured = (100 * correct.filter(Boolean).length) / count;
  const expected = metrics['EM'] ?? metrics['Accuracy']!;
  // With a cache in fp16 one item may fall on the other side.
  if (Math.abs(measured - expected) > 100 / count + 1e-4) isWrong = true;
  rows.push([precision, String(worldSize), set, String(count), measured.toFixed(1), expected.toFixed(1)]);
  process.stderr.write(`accuracy: ${precision}, ${worldSize} worker(s), ${set}: ${measured.toFixed(1)} %\n`);
}

function blankAccuracy(client: TandemClient, set: string): Promise<boolean[]> {
  return inParallel(
    readLines<{ inputs: number[]; targets_pretokenized: string[] }>(set),
    async ({ inputs, targets_pretokenized: targets }) => {
      const finish = await client.generate({ ids: { ids: inputs }, mode: 'MODE_MASK', temperature: 0, maxNewTokens: 12 });
      return targets.some((target) => exactMatch(finish.outputs[0]!.blanks[0]!.text, target));
    },
  );
}

function choiceAccuracy(client: TandemClient, set: string): Promise<boolean[]> {
  type Item = { inputs_pretokenized: string; choices_pretokenized: string[]; label: number };
  return inParallel(readLines<Item>(set), async ({ inputs_pretokenized: text, choices_pretokenized: choices, label }) => {
    const { choices: scored } = await client.score({ text, mode: 'MODE_MASK', choices: choices.map((choice) => ({ text: choice })) });
    const logprobs = scored.map(({ logprob }) => logprob);
    return logprobs.indexOf(Math.max(...logprobs)) === label;
  });
}

function readLines<T>(set: string): T[] {
  const text = readFileSync(join(tinyModelDir, 'eval', 'data', set, 'test.jsonl'), 'utf8');
  return text
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => JSON.parse(line) as T);
}

async function inParallel<T, R>(items: readonly T[], run: (item: T) => Promise<R>): Promise<R[]> {
  const results: R[] = new Array<R>(items.length);
  let next = 0;
  const lane = async (): Promise<void> => {
    while (next < items.length) {
      const index = next++;
      results[index] = await run(items[index]!);
    }
  };
  await Promise.all(Array.from({ length: CONCURRENCY }, lane));
  return results;
}
