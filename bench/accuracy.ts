/**
 * The tiny model's held-out accuracies through the server: FP16, INT8 and INT4 weights at 1 and 2 workers. Floating-point activations beside
 * what the original evaluation harness found (test/golden/tiny/evaluation.json); activations quantised to int8, and the embedding too, beside
 * floating point, with the share of tokens on which the two agree.
 */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import yargs from 'yargs';
import { hideBin } from 'yargs/helpers';
import { packageRoot } from '../common/package-root.js';
import type { TandemClient } from '../cli/client.js';
import { formatTable } from '../cli/format.js';
import { startLocalCluster } from '../cli/local-cluster.js';
import { blankContext } from '../model/tokenizer/blank-context.js';
import { importCheckpoint } from '../model/import/import-checkpoint.js';
import { parseModelConfig } from '../model/model-config.js';
import { tinyModelDir } from '../model/tiny/tiny-model.js';
import { buildContext } from '../model/tokenizer/prompt.js';
import { loadTokenizer } from '../model/tokenizer/tokenizer.js';
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
/** How quantised weights are computed with. */
const ENGINES = [
  { name: 'float', flags: { activations: 'float' } },
  { name: 'int8', flags: { activations: 'int8' } },
  { name: 'int8 + embedding', flags: { activations: 'int8', quantizeEmbedding: 'int8' } },
] as const;
const CONCURRENCY = 32;
const STORY_TOKENS = { prompt: 24, generated: 64 };
/** What int8 activations may cost: points over all items, percent of tokens. */
const MOST_POINTS = 0.5;
const LEAST_AGREEMENT = 99;

type Golden = { runs: Record<string, Record<string, Record<string, Record<string, [Record<string, number>, number]>>>> };
const golden = JSON.parse(readFileSync(join(packageRoot, 'test/golden/tiny/evaluation.json'), 'utf8')) as Golden;

const { only } = await yargs(hideBin(process.argv))
  .scriptName('npm run bench:accuracy --')
  .option('only', { choices: PRECISIONS.map(({ name }) => name), describe: 'Weights to measure with (default: all, one after the other)' })
  .strict()
  .parseAsync();

const scratch = mkdtempSync(join(tmpdir(), 'tandem-accuracy-'));
process.once('exit', () => rmSync(scratch, { recursive: true, force: true }));
const config = parseModelConfig(JSON.parse(readFileSync(join(tinyModelDir, 'config.json'), 'utf8')), 'config.json');
const tokenizer = await loadTokenizer(join(tinyModelDir, 'tokenizer.model'), config.tokenizer!);
const rows: string[][] = [];
const failures: string[] = [];
for (const { name, golden: goldenName, quantize } of PRECISIONS) {
  if (only !== undefined && only !== name) continue;
  const store = join(scratch, name);
  await importCheckpoint({
    from: join(tinyModelDir, 'sat'),
    to: store,
    configPath: join(tinyModelDir, 'config.json'),
    tokenizerPath: join(tinyModelDir, 'tokenizer.model'),
    quantize,
  });
  for (const worldSize of [1, 2]) {
    let reference: { correct: number; continuations: Continuation[] } | null = null;
    for (const engine of quantize === null ? ENGINES.slice(0, 1) : ENGINES) {
      const cluster = await startLocalCluster({ model: store, worldSize, engine: engine.flags });
      try {
        const { client } = cluster;
        const what = `${name}, ${worldSize} worker(s), ${engine.name}`;
        const sets = await measureSets(client);
        const correct = sets.reduce((sum, set) => sum + set.correct, 0);
        const items = sets.reduce((sum, set) => sum + set.items, 0);
        for (const set of sets) {
          const expected = expectedOf(goldenName, set.name, set.items);
          const percent = (100 * set.correct) / set.items;
          // With a cache in fp16 one item may fall on the other side.
          if (engine.name === 'float' && Math.abs(percent - expected) > 100 / set.items + 1e-4) {
            failures.push(`${what}, ${set.name}: ${percent.toFixed(1)} %, the reference has ${expected.toFixed(1)} %`);
          }
          rows.push([name, String(worldSize), engine.name, set.name, String(set.items), percent.toFixed(1), expected.toFixed(1), '']);
        }
        let agreement = '';
        if (reference) {
          const percent = await agreementWith(client, reference.continuations);
          agreement = percent.toFixed(2);
          if (percent < LEAST_AGREEMENT)
            failures.push(`${what}: agrees with float on ${agreement} % of tokens, aimed at ${LEAST_AGREEMENT}`);
          const points = (100 * Math.abs(correct - reference.correct)) / items;
          if (points > MOST_POINTS) failures.push(`${what}: ${points.toFixed(2)} points from float over all sets, aimed at ${MOST_POINTS}`);
        } else reference = { correct, continuations: await continuations(client) };
        const percent = ((100 * correct) / items).toFixed(2);
        rows.push([name, String(worldSize), engine.name, 'all', String(items), percent, '', agreement]);
        process.stderr.write(`accuracy: ${what}: ${percent} % of ${items}${agreement && `, agreement ${agreement} %`}\n`);
      } finally {
        await cluster.close();
      }
    }
  }
}
const header = ['weights', 'workers', 'activations', 'set', 'items', 'measured %', 'reference %', 'greedy agreement %'];
process.stdout.write(`${formatTable(header, rows)}\n`);
for (const failure of failures) process.stdout.write(`FAILED: ${failure}\n`);
if (failures.length === 0) {
  process.stdout.write(
    `All sets in floating point are within one item of the reference; int8 activations within ${MOST_POINTS} points and ${LEAST_AGREEMENT} % of tokens.\n`,
  );
}
process.exitCode = failures.length > 0 ? 1 : 0;

interface SetResult {
  readonly name: string;
  readonly items: number;
  readonly correct: number;
}

async function measureSets(client: TandemClient): Promise<SetResult[]> {
  const results: SetResult[] = [];
  const add = (name: string, correct: readonly boolean[]): void => {
    results.push({ name, items: correct.length, correct: correct.filter(Boolean).length });
  };
  for (const { name } of BLANK_SETS) add(name, await blankAccuracy(client, name));
  for (const set of MMLU_SETS) add(`mmlu/${set}`, await choiceAccuracy(client, `mmlu/${set}`));
  return results;
}

/** Percent, of the original harness. */
function expectedOf(goldenName: string, set: string, items: number): number {
  const run = golden.runs[goldenName]!;
  const blank = BLANK_SETS.find(({ name }) => name === set);
  const group = set.replace('mmlu/', '');
  const [metrics, count] = blank ? run[blank.task]!['all']!['test.jsonl']! : run['mmlu/mmlu.yaml']![group]![`${group}/test.jsonl`]!;
  if (count !== items) throw new Error(`${set} has ${items} items, the reference ${count}`);
  return metrics['EM'] ?? metrics['Accuracy']!;
}

/** What was generated greedily, as a row to look at again: logits of the last `tokens.length` positions are the tokens'. */
interface Continuation {
  readonly ids: readonly number[];
  readonly positions: readonly number[];
  readonly bidirectionalTokens: number;
  readonly tokens: readonly number[];
}

/** The blanks of the blank sets, and stories that go on. */
async function continuations(client: TandemClient): Promise<Continuation[]> {
  const blanks = BLANK_SETS.flatMap(({ name }) =>
    readItems<{ inputs: number[] }>(name).map(({ inputs }) => ({ ids: inputs, mode: 'mask' as const, maxNewTokens: 12 })),
  );
  const stories = ['en', 'zh'].flatMap((language) =>
    readLines(join('lm', `stories-${language}.txt`)).map((story) => {
      const ids = tokenizer.encode(story).slice(0, STORY_TOKENS.prompt);
      return { ids, mode: 'gmask' as const, maxNewTokens: STORY_TOKENS.generated };
    }),
  );
  return inParallel([...blanks, ...stories], async ({ ids, mode, maxNewTokens }) => {
    const wireMode = mode === 'mask' ? 'MODE_MASK' : 'MODE_GMASK';
    const finish = await client.generate({ ids: { ids }, mode: wireMode, temperature: 0, maxNewTokens });
    const { tokens, maskPosition } = finish.outputs[0]!.blanks[0]!;
    const { row, ...context } = buildContext({ kind: 'ids', ids }, mode, { config, tokenizer });
    const blank = blankContext(row, maskPosition, { row, ...context }, config.specialTokens.sop);
    return {
      ids: [...blank.tokens, ...tokens.slice(0, -1)],
      positions: [...blank.positions, ...tokens.slice(0, -1).map((_, i) => blank.positionOf(i))],
      bidirectionalTokens: blank.bidirectionalTokens,
      tokens,
    };
  });
}

/** Percent of tokens that would be drawn alike behind the same tokens. */
async function agreementWith(client: TandemClient, all: readonly Continuation[]): Promise<number> {
  const counts = await inParallel(
    all.filter(({ tokens }) => tokens.length > 0),
    async ({ ids, positions, bidirectionalTokens, tokens }) => {
      const logits = await client.logits({ ids: [...ids], positions: [...positions], bidirectionalTokens, rows: tokens.length });
      return { same: tokens.filter((token, i) => logits[i]!.indexOf(Math.max(...logits[i]!)) === token).length, of: tokens.length };
    },
  );
  const sum = (field: 'same' | 'of'): number => counts.reduce((total, count) => total + count[field], 0);
  return (100 * sum('same')) / sum('of');
}

function blankAccuracy(client: TandemClient, set: string): Promise<boolean[]> {
  return inParallel(
    readItems<{ inputs: number[]; targets_pretokenized: string[] }>(set),
    async ({ inputs, targets_pretokenized: targets }) => {
      const finish = await client.generate({ ids: { ids: inputs }, mode: 'MODE_MASK', temperature: 0, maxNewTokens: 12 });
      return targets.some((target) => exactMatch(finish.outputs[0]!.blanks[0]!.text, target));
    },
  );
}

function choiceAccuracy(client: TandemClient, set: string): Promise<boolean[]> {
  type Item = { inputs_pretokenized: string; choices_pretokenized: string[]; label: number };
  return inParallel(readItems<Item>(set), async ({ inputs_pretokenized: text, choices_pretokenized: choices, label }) => {
    const { choices: scored } = await client.score({ text, mode: 'MODE_MASK', choices: choices.map((choice) => ({ text: choice })) });
    const logprobs = scored.map(({ logprob }) => logprob);
    return logprobs.indexOf(Math.max(...logprobs)) === label;
  });
}

function readItems<T>(set: string): T[] {
  return readLines(join(set, 'test.jsonl')).map((line) => JSON.parse(line) as T);
}

/** Of a file below eval/data. */
function readLines(file: string): string[] {
  const text = readFileSync(join(tinyModelDir, 'eval', 'data', file), 'utf8');
  return text.split('\n').filter((line) => line !== '');
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
