/** The command line as users meet it: real processes, what they print, and one clear line for everything that is wrong. */
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  readdirSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { createServer, type AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { status } from '@grpc/grpc-js';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { startLocalCluster, type LocalCluster } from '../cli/local-cluster.js';
import { packageRoot } from '../common/package-root.js';
import { global, modulePickle, op, text, tuple, writeTorchFile } from '../model/import/fixtures/torch-archive.js';
import { floats, maxDifference, readGolden, type GoldenFloats } from './support/golden.js';
import { runCli, startCli, type CliResult } from './support/run-cli.js';

const scratch = mkdtempSync(join(tmpdir(), 'tandem-test-cli-'));
afterAll(() => rmSync(scratch, { recursive: true, force: true }));

const tiny = join(packageRoot, 'model', 'tiny');
const fromTiny = ['--from', join(tiny, 'sat'), '--config', join(tiny, 'config.json')];
const RANK_0 = 'mp_rank_00_model_states.pt';
const RANK_1 = 'mp_rank_01_model_states.pt';

let store: string;
let cluster: LocalCluster;
beforeAll(async () => {
  store = join(scratch, 'fp16');
  await expectSuccess(runCli(['import', ...fromTiny, '--to', store]));
  cluster = await startLocalCluster({ model: store, worldSize: 2, engine: { kvDtype: 'fp32' } });
});
afterAll(() => cluster?.close());

/** An own folder below the scratch folder, which exists. */
function folder(name: string): string {
  const dir = join(scratch, name);
  mkdirSync(dir);
  return dir;
}

async function expectSuccess(running: Promise<CliResult>): Promise<string> {
  const { code, stdout, stderr } = await running;
  expect(stderr.replaceAll(/^(\d+\/\d+ tensors|[\d.]+ \w+ of [\d.]+ \w+), .*\n/gm, '')).toBe(''); // progress
  expect(code).toBe(0);
  return stdout;
}

let configFiles = 0;
function configFile(content: unknown): string {
  const path = join(scratch, `serve-${configFiles++}.json`);
  writeFileSync(path, JSON.stringify(content));
  return path;
}

/** Non-zero exit, and on stderr one line and no more; progress and warnings of an import apart. */
async function expectRefusal(running: Promise<CliResult>, ...words: string[]): Promise<void> {
  const { code, stdout, stderr } = await running;
  const lines = stderr.split('\n').filter((line) => line !== '' && !/^(\d+\/\d+ tensors, |warning: )/.test(line));
  expect(lines, stderr).toHaveLength(1);
  expect(lines[0]).toMatch(/^tandem: /);
  for (const word of words) expect(lines[0]).toContain(word);
  expect(stderr).not.toContain('    at ');
  expect(stdout).toBe('');
  expect(code).toBeGreaterThan(0);
}

describe('wrong command lines', () => {
  test.concurrent.each<{ args: string[]; words: string[] }>([
    { args: [], words: ['no command given', 'serve, worker, generate, import', 'see tandem --help'] },
    { args: ['generat'], words: ['unknown command generat', 'serve, worker, generate, import'] },
    { args: ['serve', '--wolrd-size', '2'], words: ['unknown argument: wolrd-size', 'see tandem serve --help'] },
    { args: ['serve', 'extra'], words: ['unknown argument: extra'] },
    {
      args: ['serve', '--world-size', '3'],
      words: ['world size 3 does not divide the model', '4 heads', 'possible world sizes are 1, 2, 4'],
    },
    { args: ['serve', '--world-size', 'two'], words: ['--world-size two: a whole number from 1 to 2147483647 is needed'] },
    { args: ['serve', '--world-size', '0'], words: ['--world-size 0: a whole number from 1'] },
    { args: ['serve', '--world-size'], words: ['--world-size needs a value'] },
    { args: ['serve', '--world-size', '1', '--world-size', '2'], words: ['--world-size is given 2 times (1, 2): give it once'] },
    { args: ['serve', '--cpus', '0-'], words: ['--cpus 0-: a list of CPUs as in 0-3,8 is needed'] },
    { args: ['serve', '--cpus', '1023'], words: ['--cpus 1023: this process may not use 1023, allowed are '] },
    {
      args: ['worker', '--coordinator', 'unix:/x', '--rank', '0', '--cpus', '1023'],
      words: ['this process may not use 1023, allowed are '],
    },
    {
      args: ['serve', '--cpus', '0', '--external-workers', '--worker-listen', 'unix:/x'],
      words: ['--cpus is for workers that this server starts'],
    },
    { args: ['serve', '--device', 'gpu'], words: ['--device "gpu"', 'allowed are "cpu", "cuda"'] },
    {
      args: ['worker', '--coordinator', 'unix:/x', '--rank', '0', '--device', 'cuda'],
      words: ['--device cuda: a worker takes cpu or cuda:N, as in cuda:0'],
    },
    { args: ['serve', '--kv-dtype', 'int8'], words: ['--kv-dtype int8 is for GPUs (--device cuda); CPUs have fp16 and fp32'] },
    { args: ['logits', '--device', 'cuda', '--tokens', '1'], words: ['--kv-dtype fp32 is for CPUs; GPUs have fp16 and int8'] },
    { args: ['serve', '--isa', 'sse'], words: ['--isa "sse"', 'allowed are "auto", "avx512vnni", "avx512", "avx2", "neon", "generic"'] },
    { args: ['serve', '--listen', '0.0.0.0:7130'], words: ['--listen 0.0.0.0:7130 is not this machine alone', 'give --api-keys FILE'] },
    {
      args: ['serve', '--http-listen', '0.0.0.0:7131'],
      words: ['--http-listen 0.0.0.0:7131 is not this machine alone', 'give --api-keys FILE'],
    },
    { args: ['serve', '--tls-cert', `${tiny}/config.json`], words: ['--tls-cert and --tls-key go together'] },
    { args: ['serve', '--client-ca', `${tiny}/config.json`], words: ['--client-ca needs --tls-cert and --tls-key'] },
    { args: ['serve', '--api-keys', `${tiny}/config.json`], words: ['config.json'] },
    { args: ['serve', '--max-queued-requests', '0'], words: ['--max-queued-requests 0: a whole number from 1 to 1000000 is needed'] },
    { args: ['serve', '--config', '/no/such.json'], words: ['--config /no/such.json', 'ENOENT'] },
    { args: ['serve', '--config', `${tiny}/config.json`], words: ['unknown argument'] },
    { args: ['serve', '--config', configFile({ 'world-size': '4' })], words: ['world-size is "4", a number is needed'] },
    { args: ['serve', '--config', configFile({ 'external-workers': 'yes' })], words: ['external-workers is "yes", a boolean is needed'] },
    { args: ['serve', '--config', configFile({ listen: null })], words: ['listen is null, a string is needed'] },
    { args: ['serve', '--config', configFile({ 'max-samples': 0.5 })], words: ['--max-samples 0.5: a whole number from 1'] },
    { args: ['serve', '--config', configFile({ worldSize: 4 })], words: ['unknown argument: worldSize'] },
    { args: ['serve', '--config', configFile({ config: 'other.json' })], words: ['unknown argument: config'] },
    { args: ['serve', '--config', configFile([])], words: ['a JSON object of flags is needed'] },
    { args: ['serve', '--otlp-endpoint', 'nowhere'], words: ['--otlp-endpoint nowhere is no http URL'] },
    { args: ['serve', '--listen', 'here'], words: ['address "here" is neither unix:/path nor host:port'] },
    { args: ['serve', '--listen', 'unix:/no/such/folder/s.sock'], words: ['there is no folder /no/such/folder'] },
    { args: ['serve', '--listen', `unix:${tiny}/config.json`], words: ['a file that is no socket is there'] },
    { args: ['serve', '--model', ''], words: ['--model is empty'] },
    { args: ['serve', '--external-workers'], words: ['--external-workers needs --worker-listen'] },
    { args: ['worker', '--rank', '0'], words: ['missing flag: --coordinator'] },
    { args: ['worker', '--rank', '-1', '--coordinator', 'unix:/x'], words: ['--rank -1: a whole number from 0'] },
    {
      args: ['worker', '--rank', '0', '--coordinator', 'unix:/no/such.sock', '--connect-timeout-ms', '50'],
      words: ['no coordinator at unix:/no/such.sock within 50 ms'],
    },
    { args: ['status', '--address', 'unix:/no/such.sock'], words: ['no server at unix:/no/such.sock', 'tandem serve', '--address'] },
    { args: ['status', '--json=yes'], words: ['--json=yes', '--json=true or --json=false'] },
    { args: ['inspect'], words: ['too few arguments: 0 given, 1 needed'] },
    { args: ['inspect', '/no/such/store'], words: ['model store /no/such/store does not exist', 'tandem import'] },
    { args: ['inspect', join(packageRoot, 'cli')], words: ['is no model store', 'config.json', 'tandem import'] },
    { args: ['inspect', join(tiny, 'config.json')], words: ['is no model store'] },
    { args: ['logits'], words: ['missing flag: --tokens'] },
    { args: ['logits', '--tokens', '5,x'], words: ['--tokens: "x" is no id', '5,6,7'] },
    { args: ['logits', '--tokens', '5', '--tokens', '6'], words: ['--tokens is given 2 times'] },
    { args: ['logits', '--tokens', '5,6', '--positions', '1'], words: ['--positions has 1 entries for 2 tokens'] },
    { args: ['logits', '--tokens', '5,6', '--bidirectional', '3'], words: ['--bidirectional 3', '2 tokens'] },
    { args: ['logits', '--tokens', '5,6', '--bidirectional', '-1'], words: ['--bidirectional -1: a whole number from 0'] },
    { args: ['logits', '--tokens', '5,4096'], words: ['INVALID_ARGUMENT', '4096', '0 to 4095'] },
    { args: ['logits', '--tokens', '5,6', '--world-size', '3'], words: ['world size 3 does not divide', '1, 2, 4'] },
    { args: ['generate', '--top-k', 'NaN'], words: ['--top-k NaN: a whole number'] },
    { args: ['generate', '--temperature='], words: ['--temperature "": a number is needed'] },
    { args: ['generate', '--top-p', '1e'], words: ['--top-p 1e: a number is needed'] },
    { args: ['generate', '--seed', '18446744073709551616'], words: ['--seed 18446744073709551616', '0 to 2^64 - 1'] },
    { args: ['generate', '--seed', '1', '--seed', '2'], words: ['--seed is given 2 times (1, 2)'] },
    {
      args: ['generate', '--input-source', '/no/such.txt'],
      words: ['--input-source /no/such.txt cannot be read (ENOENT)', '"interactive"'],
    },
    { args: ['generate', '--input-source', tiny], words: [`--input-source ${tiny} is a folder`] },
    { args: ['generate', '--output-path', join(tiny, 'config.json')], words: ['--output-path', 'is no folder to write to'] },
    { args: ['generate', '--model', '/no/such/store'], words: ['model store /no/such/store does not exist'] },
  ])('tandem $args', ({ args, words }) => expectRefusal(runCli(args), ...words));

  test.concurrent.each([
    '',
    'serve',
    'worker',
    'generate',
    'import',
    'export',
    'inspect',
    'verify',
    'plan',
    'synth',
    'status',
    'top',
    'logits',
    'demo',
  ])('%s --help', async (command) => {
    const help = await expectSuccess(runCli([...(command === '' ? [] : [command]), '--help']));
    expect(help).toMatch(new RegExp(`^tandem ${command || '<command>'}`));
    for (const line of help.split('\n')) expect(line).not.toMatch(/^ +--?[a-z-]+ +\[/); // every flag says what it is for
  });
});

describe('the native addon is not built', () => {
  let root: string;
  beforeAll(() => {
    root = folder('unbuilt');
    for (const part of ['dist', 'proto', 'package.json']) cpSync(join(packageRoot, part), join(root, part), { recursive: true });
    symlinkSync(join(packageRoot, 'node_modules'), join(root, 'node_modules'));
  });

  test.concurrent.each([['serve', '--log-level', 'info'], ['generate'], ['logits', '--tokens', '5']])('tandem %s', async (...args) =>
    expectRefusal(
      runCli([...args, '--model', store], { root }),
      'native addon not built',
      join(root, 'native', 'build', 'Release', 'tandem_addon.node'),
      'npm run build:native',
    ),
  );
});

describe('import', () => {
  test.concurrent.each([
    { flags: [], weights: 'F16', tensors: 75, bound: 1e-4 },
    { flags: ['--quantize', 'int8'], weights: 'INT8, vector-wise for 2 ranks', tensors: 99, bound: 0.15 },
    { flags: ['--quantize', 'int4', '--ranks', '1'], weights: 'INT4, vector-wise for 1 rank', tensors: 99, bound: 2 },
    { flags: ['--quantize', 'int4', '--group', '128'], weights: 'INT4, a scale for each 128 columns', tensors: 99, bound: 2 },
  ])('$weights, then inspect and logits of it', async ({ flags, weights, tensors, bound }) => {
    const to = join(scratch, `store${flags.join('')}`);
    const { code, stdout, stderr } = await runCli(['import', ...fromTiny, '--to', to, ...flags]);
    expect(stderr).toMatch(new RegExp(`^(\\d+/${tensors} tensors, .*\\n)*${tensors}/${tensors} tensors, .*\\n$`));
    expect(stdout).toMatch(new RegExp(`^imported ${tensors} tensors, \\d+ bytes \\(.*\\), in [\\d.]+ s to ${to}\\n$`));
    expect(code).toBe(0);
    expect(await expectSuccess(runCli(['inspect', to]))).toContain(`weights       ${weights}\n`);
    const verified = await expectSuccess(runCli(['verify', to]));
    expect(verified).toMatch(new RegExp(`^compared ${tensors} tensors, .*\\neverything is as it was written\\n$`));
    const { logits } = readGolden<LogitsGolden>('tiny/logits.json').cases[0]!;
    const got = await logitsOf(['--model', to, ...rowFlags(0)]);
    // Measured: 3e-6, 0.06, 1.2 and 1.1, with a standard deviation of the logits of 2.4; another row's logits differ by 19.
    expect(maxDifference(got.logits[0]!, lastRow(logits))).toBeLessThan(bound);
  });

  interface BadImport {
    readonly name: string;
    /** Damages a copy of the tiny checkpoint, whose ranks are in `ranks`. */
    readonly damage?: (from: string, ranks: string) => void;
    readonly flags?: string[];
    readonly words: string[];
  }
  const damaged: BadImport[] = [
    {
      name: 'an empty folder',
      damage: (from) => (rmSync(from, { recursive: true }), mkdirSync(from)),
      words: ['is no SAT checkpoint', 'latest'],
    },
    { name: 'no iteration', damage: (from) => writeFileSync(join(from, 'latest'), 'newest'), words: ['"newest"', 'iteration', 'release'] },
    { name: 'an iteration that is not there', damage: (from) => writeFileSync(join(from, 'latest'), '7'), words: ['/7', 'ENOENT'] },
    {
      name: 'a missing first rank',
      damage: (_, ranks) => rmSync(join(ranks, RANK_0)),
      words: [RANK_0, 'is missing', '1 rank files were found'],
    },
    {
      name: 'a missing last rank',
      damage: (_, ranks) => rmSync(join(ranks, RANK_1)),
      words: ['transformer.word_embeddings.weight', '[2048, 256]', '[4096, 256]'],
    },
    { name: 'a truncated rank', damage: (_, ranks) => truncateSync(join(ranks, RANK_1), 1_000_000), words: [RANK_1] },
    { name: 'an empty rank', damage: (_, ranks) => truncateSync(join(ranks, RANK_1), 0), words: [RANK_1] },
    { name: 'a damaged rank', damage: (_, ranks) => flipByte(join(ranks, RANK_1), 3_000_000), words: [RANK_1, 'CRC-32'] },
    { name: 'a rank that is no archive', damage: (_, ranks) => writeFileSync(join(ranks, RANK_0), 'weights'), words: [RANK_0] },
    {
      name: 'a forbidden global',
      damage: (_, ranks) => writeTorchFile(join(ranks, RANK_0), systemPickle(join(scratch, 'executed')), {}),
      words: [RANK_0, 'os.system'],
    },
    {
      name: "another model's configuration",
      flags: ['--config', join(packageRoot, 'test', 'golden', 'random', 'B', 'config.json')],
      words: ['transformer.word_embeddings.weight', '[2048, 256]', '128'],
    },
    { name: 'no configuration', flags: ['--config', '/no/such/config.json'], words: ['/no/such/config.json does not exist'] },
    { name: 'ranks that do not divide', flags: ['--quantize', 'int8', '--ranks', '3'], words: ['world size 3 does not divide', '1, 2, 4'] },
    { name: 'three bits', flags: ['--quantize', 'int3'], words: ['--quantize "int3"', '"int8", "int4"'] },
    { name: 'groups without bits', flags: ['--group', '128'], words: ['give --quantize int8 or int4'] },
  ];
  test.concurrent.each(damaged)('$name', async ({ name, damage, flags = [], words }) => {
    const dir = folder(`import ${name}`);
    const from = join(dir, 'sat');
    cpSync(join(tiny, 'sat'), from, { recursive: true });
    damage?.(from, join(from, '4904'));
    const config = flags.includes('--config') ? [] : ['--config', join(tiny, 'config.json')];
    await expectRefusal(runCli(['import', '--from', from, '--to', join(dir, 'store'), ...config, ...flags]), ...words);
    expect(readdirSync(dir).filter((entry) => entry !== '.store.partial')).toEqual(['sat']); // what was finished before a damaged tensor is kept
    expect(existsSync(join(scratch, 'executed'))).toBe(false);
  });

  test('a target that is taken, or cannot be', async () => {
    await expectRefusal(runCli(['import', ...fromTiny, '--to', tiny]), tiny, 'exists and is not empty');
    await expectRefusal(runCli(['import', ...fromTiny, '--to', join(tiny, 'config.json', 'store')]), 'ENOTDIR');
  });
});

describe('a damaged store', () => {
  const data = 'model-00001-of-00001.safetensors';
  const index = 'model.safetensors.index.json';
  test.concurrent.each<{ name: string; damage: (dir: string) => void; words: string[] }>([
    { name: 'no data', damage: (dir) => rmSync(join(dir, data)), words: [data, 'does not exist'] },
    { name: 'truncated data', damage: (dir) => truncateSync(join(dir, data), 10_000_000), words: [data, '10000000'] },
    { name: 'data that goes on', damage: (dir) => writeFileSync(join(dir, data), 'x', { flag: 'a' }), words: [data] },
    { name: 'no index', damage: (dir) => rmSync(join(dir, index)), words: [index, 'does not exist'] },
    { name: 'an index that is no JSON', damage: (dir) => truncateSync(join(dir, index), 100), words: [index, 'is not JSON'] },
    {
      name: 'an index that leads out of the folder',
      damage: (dir) => edit(join(dir, index), data, `../${data}`),
      words: [index, 'files of the same folder'],
    },
    {
      name: 'a header that lies about a shape',
      damage: (dir) => edit(join(dir, data), '"shape":[4096,256]', '"shape":[9096,256]'),
      words: [data, 'transformer.word_embeddings.weight', '9096'],
    },
    {
      name: 'a configuration of another shape',
      damage: (dir) => edit(join(dir, 'config.json'), '"num_layers": 6', '"num_layers": 7'),
      words: ['transformer.layers.6.'],
    },
    { name: 'a tokenizer that is missing', damage: (dir) => rmSync(join(dir, 'tokenizer.model')), words: ['tokenizer.model'] },
  ])('$name', async ({ name, damage, words }) => {
    const dir = join(scratch, `store with ${name}`);
    cpSync(store, dir, { recursive: true });
    damage(dir);
    await expectRefusal(runCli(['inspect', dir]), ...words);
    await expectRefusal(runCli(['serve', '--model', dir, '--listen', `unix:${join(scratch, 'never.sock')}`]), ...words);
  });

  test('a changed byte is found by verify', async () => {
    const dir = join(scratch, 'store with a changed byte');
    cpSync(store, dir, { recursive: true });
    flipByte(join(dir, data), 5_000_000);
    expect(await expectSuccess(runCli(['inspect', dir]))).toContain('75 tensors');
    const { code, stdout, stderr } = await runCli(['verify', dir]);
    expect(code).toBe(1);
    expect(stderr).toMatch(/^tandem: .* is damaged \(transformer\.layers\.\S+\): import it again\n$/);
    expect(stdout).toMatch(new RegExp(`^tensor transformer\\.layers\\..* in .*${data} has SHA-256`));
  });

  test('inspect --json', async () => {
    const shown = JSON.parse(await expectSuccess(runCli(['inspect', store, '--json']))) as { tensors: { bytes: number; sha256: string }[] };
    expect(shown).toMatchObject({ dir: store, world_sizes: [1, 2, 4], config: { num_layers: 6 }, total_bytes: 12367872, manifest: true });
    expect(shown.tensors).toHaveLength(75);
    expect(shown.tensors.reduce((sum, { bytes }) => sum + bytes, 0)).toBe(12367872);
    for (const { sha256 } of shown.tensors) expect(sha256).toMatch(/^[0-9a-f]{64}$/);
  });
});

interface LogitsGolden {
  readonly cases: { readonly tokens: number[]; readonly position_ids: number[]; readonly logits: GoldenFloats }[];
}
interface PrintedLogits {
  readonly shape: [rows: number, vocabSize: number];
  readonly logits: number[][];
}

/** The row of a golden case as flags of `tandem logits`: `<sop>` is seen by no other token. */
function rowFlags(index: number): string[] {
  const { tokens, position_ids: positions } = readGolden<LogitsGolden>('tiny/logits.json').cases[index]!;
  return ['--tokens', tokens.join(','), '--positions', positions.join(','), '--bidirectional', String(tokens.length - 1)];
}

async function logitsOf(flags: string[]): Promise<PrintedLogits> {
  return JSON.parse(await expectSuccess(runCli(['logits', ...flags]))) as PrintedLogits;
}

function lastRow(golden: GoldenFloats): Float32Array {
  return floats(golden).slice(-golden.shape[1]!);
}

describe('logits', () => {
  const { cases } = readGolden<LogitsGolden>('tiny/logits.json');

  test.each([
    { name: 'the tiny model by default', index: 0, flags: [] },
    { name: 'two workers', index: 1, flags: ['--world-size', '2', '--threads', '1', '--json'] },
  ])("$name: the last position's", async ({ index, flags }) => {
    const { shape, logits } = await logitsOf([...rowFlags(index), ...flags]);
    expect(shape).toEqual([1, 4096]);
    expect(maxDifference(logits[0]!, lastRow(cases[index]!.logits))).toBeLessThan(1e-4);
  });

  test("--all: every position's, and --no-json the best of each", async () => {
    const { tokens, logits: golden } = cases[2]!;
    const { shape, logits } = await logitsOf([...rowFlags(2), '--model', store, '--all']);
    expect(shape).toEqual([tokens.length, 4096]);
    expect(maxDifference(logits.slice(-4).flat(), floats(golden))).toBeLessThan(1e-4);
    const best = await expectSuccess(runCli(['logits', ...rowFlags(2), '--all', '--no-json']));
    const lines = best.trimEnd().split('\n');
    expect(lines).toHaveLength(tokens.length);
    const last = logits.at(-1)!;
    const largest = Math.max(...last);
    expect(lines.at(-1)).toMatch(new RegExp(`^${tokens.length - 1}: ${last.indexOf(largest)} ${largest.toFixed(4)} `));
  });
});

interface GenerationCase {
  readonly text: string;
  readonly strategy: 'greedy' | 'beam';
  readonly out_seq_length: number;
  readonly answers: string[];
  readonly blanks: string[][];
  readonly calls: { readonly input: number[]; readonly mask_position: number; readonly rows: number[][]; readonly scores?: number[] }[];
}
interface PrintedAnswer {
  readonly id?: string;
  readonly text: string;
  readonly ids: number[];
  readonly generated: number[];
  readonly blanks: string[];
  readonly beams: { readonly ids: number[]; readonly score: number; readonly text: string; readonly blanks: string[] }[];
  readonly finish: string;
  readonly usage: { readonly prompt_tokens: number; readonly generated_tokens: number };
  readonly timings: Readonly<Record<string, number>>;
}

describe('generate', () => {
  const { cases, end_tokens: endTokens } = readGolden<{ cases: GenerationCase[]; end_tokens: number[] }>('tiny/generations.json');
  const EOS = endTokens[1]!;
  const greedy = cases.filter(({ strategy }) => strategy === 'greedy').slice(0, 16);
  const beam = cases.filter(({ strategy }) => strategy === 'beam').slice(0, 4);
  const BEAM_FLAGS = [
    '--sampling-strategy',
    'BeamSearchStrategy',
    '--num-beams',
    '4',
    '--length-penalty',
    '1',
    '--no-repeat-ngram-size',
    '3',
  ];
  const tokyo = 'The capital of Japan is [MASK], and the capital of France is [MASK].';

  let files = 0;
  function inputFile(lines: readonly (string | object)[]): string {
    const path = join(scratch, `input-${++files}.txt`);
    writeFileSync(path, lines.map((line) => `${typeof line === 'string' ? line : JSON.stringify(line)}\n`).join(''));
    return path;
  }
  function generate(lines: readonly (string | object)[], flags: readonly string[]): Promise<CliResult> {
    return runCli(['generate', '--address', cluster.address, '--input-source', inputFile(lines), ...flags]);
  }
  async function answersOf(lines: readonly (string | object)[], flags: readonly string[]): Promise<PrintedAnswer[]> {
    const stdout = await expectSuccess(generate(lines, ['--json', ...flags]));
    return stdout
      .trimEnd()
      .split('\n')
      .map((line) => JSON.parse(line) as PrintedAnswer);
  }
  function generatedOf({ input, rows }: GenerationCase['calls'][number]): number[] {
    return rows[0]!.slice(input.length).filter((token, i, all) => i < all.length - 1 || !endTokens.includes(token));
  }
  /** The row with its last blank filled in: without `<sop>`, and without the `</s>` of texts that do not end in a mask. */
  function filledRow(golden: GenerationCase): number[] {
    const call = golden.calls.at(-1)!;
    const row = call.input.slice(0, -1);
    row.splice(call.mask_position, 1, ...generatedOf(call));
    return row.at(-1) === EOS ? row.slice(0, -1) : row;
  }

  test('texts as {"text"} lines with parameters: every field, against the goldens', async () => {
    const lines = greedy.map(({ text: prompt, out_seq_length }) => ({ text: prompt, out_seq_length, temperature: 0 }));
    const answers = await answersOf(lines, []);
    expect(answers.map(({ text: answer }) => answer)).toEqual(greedy.map(({ answers: [first] }) => first));
    for (const [i, answer] of answers.entries()) {
      const golden = greedy[i]!;
      expect(Object.keys(answer)).toEqual(['text', 'ids', 'generated', 'blanks', 'beams', 'finish', 'usage', 'timings']);
      expect(answer.blanks).toEqual(golden.blanks[0]);
      expect(answer.ids, golden.text).toEqual(filledRow(golden));
      expect(answer.generated).toEqual(golden.calls.flatMap(generatedOf));
      expect(answer.beams).toEqual([]);
      expect(['end', 'length']).toContain(answer.finish);
      expect(answer.usage.prompt_tokens).toBe(golden.calls[0]!.input.length - 1); // all but `<sop>`
      expect(Object.keys(answer.timings)).toEqual(['queue_ms', 'prefill_ms', 'decode_ms']);
    }
  });

  test('texts, and the same as {"ids"}', async () => {
    const golden = greedy[0]!;
    const ids = golden.calls[0]!.input.slice(0, -1);
    const flags = ['--temperature', '0', '--out-seq-length', String(golden.out_seq_length)];
    const [fromText, fromIds] = await answersOf([golden.text, '', { ids }], flags);
    expect(fromText!.text).toBe(golden.answers[0]);
    expect({ ...fromIds!, timings: null }).toEqual({ ...fromText!, timings: null });
  });

  test('beam search, against the goldens', async () => {
    const lines = beam.map(({ text: prompt, out_seq_length }) => ({ text: prompt, out_seq_length }));
    const answers = await answersOf(lines, [...BEAM_FLAGS, '--deterministic']);
    for (const [i, { text: answer, beams }] of answers.entries()) {
      const golden = beam[i]!;
      expect(answer).toBe(golden.answers[0]);
      expect(beams.map(({ text: each }) => each)).toEqual(golden.answers);
      expect(beams.map(({ blanks }) => blanks)).toEqual(golden.blanks);
      expect(beams[0]!.ids).toEqual(filledRow(golden));
      expect(
        maxDifference(
          beams.map(({ score }) => score),
          golden.calls.at(-1)!.scores!,
        ),
      ).toBeLessThan(2e-4);
    }
    const shown = await expectSuccess(generate([lines[0]!], [...BEAM_FLAGS, '--deterministic', '--print-all-beams']));
    const expected = answers[0]!.beams.map(({ text: each, score }, i) => `Beam ${i} (${score.toFixed(4)}): ${each}\n`);
    expect(shown).toBe(`${beam[0]!.text}\n${expected.join('')}`);
  });

  test('--with-id, --output-path and every other flag of generate.py', async () => {
    const out = join(scratch, 'answers', 'of ids');
    const flags = [
      ...['--with-id', '--output-path', out, '--print-all-beams', '--out-seq-length', '87', '--min-gen-length', '0', ...BEAM_FLAGS],
      ...['--deterministic', '--top-k', '0', '--top-p', '0.7', '--temperature', '1', '--seed', '1234'],
    ];
    const shown = await expectSuccess(generate([`first\t${beam[0]!.text}`, `../x y\t${beam[1]!.text}`], flags));
    expect(shown).toContain(`first: ${beam[0]!.text}\nBeam 0 `);
    expect(readdirSync(out).sort()).toEqual(['__x_y.txt', 'first.txt']);
    expect(readFileSync(join(out, 'first.txt'), 'utf8')).toBe(`${beam[0]!.answers.join('\n')}\n`);
    const [answer] = await answersOf([`../x y\t${tokyo}`], ['--with-id', '--temperature', '0']);
    expect(answer!.id).toBe('../x y');
    await expectSuccess(generate([tokyo], ['--temperature', '0', '--json', '--output-path', join(scratch, 'named')]));
    const [named] = readdirSync(join(scratch, 'named'));
    expect(named).toMatch(/^\d{8}T\d{6}-1-The_capital_of_Japan\.txt$/);
    expect(readFileSync(join(scratch, 'named', named!), 'utf8')).toBe(`${greedy[0]!.answers[0]}\n`);
  });

  test('shows the text with its blanks filled in', async () => {
    const shown = await expectSuccess(generate([tokyo, '中国的首都是[MASK]，中国在[MASK]。'], ['--temperature', '0']));
    expect(shown).toBe(
      `${tokyo}\nThe capital of Japan is Tokyo, and the capital of France is Paris.\n` +
        '中国的首都是[MASK]，中国在[MASK]。\n中国的首都是北京，中国在亚洲。\n',
    );
  });

  test('line ends of Windows, a mark of the byte order, no last line end and U+2028 in a JSON text', async () => {
    const path = join(scratch, 'windows.txt');
    writeFileSync(path, `\ufeffThe capital of Japan is [MASK].\r\n{"text": "a\u2028b [MASK]", "max_new_tokens": 1}`);
    const stdout = await expectSuccess(
      runCli(['generate', '--address', cluster.address, '--input-source', path, '--json', '--temperature', '0']),
    );
    const [first, second, ...more] = stdout.trimEnd().split('\n');
    expect(more).toEqual([]);
    expect((JSON.parse(first!) as PrintedAnswer).text).toBe('The capital of Japan is Tokyo .');
    expect((JSON.parse(second!) as PrintedAnswer).usage.generated_tokens).toBe(1);
  });

  test('a seed keeps all of its 64 bits', async () => {
    const ask = (seed: string) => answersOf([{ text: 'Once upon a time', max_new_tokens: 12 }], ['--seed', seed]);
    const [largest, large, next] = [await ask('18446744073709551615'), await ask('9007199254740992'), await ask('9007199254740993')];
    expect(large[0]!.ids).not.toEqual(next[0]!.ids); // the same number in 53 bits
    const lines = ['18446744073709551615', '9007199254740993', 9007199254740991].map((seed) => ({
      ...{ text: 'Once upon a time', max_new_tokens: 12 },
      seed,
    }));
    const inLines = await answersOf(lines, []);
    expect(inLines[0]!.ids).toEqual(largest[0]!.ids);
    expect(inLines[1]!.ids).toEqual(next[0]!.ids);
  });

  test('log-probabilities of each token', async () => {
    const [answer] = (await answersOf([{ text: 'Once upon a time', max_new_tokens: 3, logprobs: 2, temperature: 0 }], [])) as [
      PrintedAnswer & { logprobs: { token: number; logprob: number; top: { token: number; logprob: number }[] }[] },
    ];
    expect(answer.logprobs.map(({ token }) => token)).toEqual(answer.generated);
    for (const { token, logprob, top } of answer.logprobs) {
      expect(top).toHaveLength(2);
      expect(top[0]).toEqual({ token, logprob }); // greedy
      expect(logprob).toBeLessThan(0);
      expect(top[1]!.logprob).toBeLessThan(logprob);
    }
  });

  test('several samples and stop texts', async () => {
    const [answer] = (await answersOf([{ text: 'Once upon a time', n: 3, max_new_tokens: 8 }], [])) as [
      PrintedAnswer & { outputs: object[] },
    ];
    expect(answer.outputs).toHaveLength(3);
    expect(answer.outputs[0]).toMatchObject({ text: answer.text, ids: answer.ids });
    const [stopped] = await answersOf(['Once upon a time'], ['--temperature', '0', '--stop', 'small', '--stop', 'never']);
    expect(stopped!.finish).toBe('stop');
    expect(stopped!.text).not.toContain('small');
  });

  test.each<{ name: string; line: string; flags?: string[]; words: string[] }>([
    {
      name: 'a prompt that is too long',
      line: `${'word '.repeat(600)}[MASK]`,
      flags: ['--out-seq-length', '0'],
      words: ['602 tokens', '512'],
    },
    { name: 'a prompt with no room', line: tokyo, flags: ['--out-seq-length', '18'], words: ['18 tokens', 'no room', 'out_seq_length'] },
    { name: 'a line of 5 MB', line: 'x'.repeat(5_000_000), words: ['RESOURCE_EXHAUSTED', '4194304'] },
    { name: 'no JSON', line: '{"text": "a",', words: ['not JSON', '"text"'] },
    { name: 'an unknown parameter', line: '{"text": "a", "top_q": 1}', words: ['top_q'] },
    { name: 'a parameter of another type', line: '{"text": "a", "top_k": "5"}', words: ['top_k', 'number', 'string'] },
    { name: 'neither text nor ids', line: '{"top_k": 5}', words: ['either "text" or "ids"'] },
    { name: 'a seed beyond JSON', line: '{"text": "a", "seed": 9007199254740993}', words: ['seed', '2^53', 'string'] },
    { name: 'an id that is none', line: '{"ids": [5000]}', words: ['5000', '0 to 4095'] },
    { name: 'a temperature below 0', line: 'a', flags: ['--temperature', '-1'], words: ['temperature is -1', '0 to 1000'] },
    { name: 'too many beams', line: 'a', flags: [...BEAM_FLAGS.slice(0, 2), '--num-beams', '65'], words: ['num_beams is 65', '1 to 64'] },
    { name: 'no id', line: tokyo, flags: ['--with-id'], words: ['id<TAB>text'] },
  ])('$name ends the run with the place', async ({ line, flags = [], words }) => {
    const out = folder(`refused ${files}`);
    const running = generate([line], ['--output-path', out, ...flags]);
    await expectRefusal(running, `input-${files}.txt:1: `, ...words);
    expect(readdirSync(out)).toEqual([]);
  });

  test('an id that was there before, and text that is no UTF-8', async () => {
    const result = await generate([`a\t${tokyo}`, `a\t${tokyo}`], ['--with-id', '--output-path', folder('twice')]);
    expect(result.stderr).toMatch(/^tandem: .*:2: id a: an earlier line's answers are in a\.txt already.*\n$/);
    expect(result.code).toBe(1);
    const path = join(scratch, 'latin1.txt');
    writeFileSync(path, Buffer.from('caf\xe9 [MASK]\n', 'latin1'));
    await expectRefusal(runCli(['generate', '--address', cluster.address, '--input-source', path]), 'latin1.txt is not UTF-8 text');
  });

  test('over gRPC, a prompt without room has a typed status', async () => {
    const long = { text: `${'word '.repeat(600)}[MASK]` };
    await expect(cluster.client.generate(long)).rejects.toMatchObject({ code: status.INVALID_ARGUMENT });
    await expect(cluster.client.generate({ text: tokyo, maxRowTokens: 18 })).rejects.toMatchObject({ code: status.INVALID_ARGUMENT });
  });

  test('reads what is piped to it, and goes on after a line that is refused', async () => {
    const input = `The capital of Japan is [MASK].\n{"text": "x", "foo": 1}\n中国的首都是[MASK]，中国在[MASK]。`;
    const { code, stdout, stderr } = await runCli(['generate', '--address', cluster.address, '--temperature', '0'], { input });
    expect(stdout).toBe('The capital of Japan is Tokyo.\n中国的首都是北京，中国在亚洲。\n');
    expect(stderr).toMatch(/^tandem: line 2: .*foo.*\n$/);
    expect(code).toBe(1);
    expect(await expectSuccess(runCli(['generate', '--address', cluster.address]))).toBe('');
  });

  test('starts a server of its own, and Ctrl-C leaves nothing of it', async () => {
    const temp = folder('interrupted');
    const path = inputFile([tokyo, ...Array.from({ length: 50 }, () => ({ text: 'Once', out_seq_length: 512, min_gen_length: 500 }))]);
    const flags = ['--temperature', '0', '--model', store, '--world-size', '2', '--threads', '1', '--kv-dtype', 'fp32', '--isa', 'generic'];
    const running = startCli(['generate', '--input-source', path, '--json', ...flags], { env: { TMPDIR: temp } });
    await running.waitFor(/Tokyo , and .* Paris \./);
    running.child.kill('SIGINT');
    const { code, stderr } = await running.result;
    expect({ code, stderr }).toEqual({ code: 130, stderr: '' });
    await expectGone(temp);
  });

  test('a reader that goes away is no error to talk about', async () => {
    const running = startCli([
      'generate',
      '--address',
      cluster.address,
      '--input-source',
      inputFile(Array.from({ length: 50 }, () => tokyo)),
    ]);
    running.child.stdout.once('data', () => running.child.stdout.destroy());
    expect(await running.result).toMatchObject({ code: 141, stderr: '' });
  });

  test('status shows what was done', async () => {
    const shown = await expectSuccess(runCli(['status', '--address', cluster.address]));
    expect(shown).toMatch(/^tandem \d+\.\d+\.\d+: ready, up [\dms]+, epoch 1\n/);
    expect(shown).toContain(`model     fp16: ${store} (FP16, 6 layers, hidden 256, vocabulary 4096, context 512)`);
    expect(shown).toMatch(/\nrank +pid +state +device +weights .*\n +0 +\d+ +ready .*\n +1 +\d+ +ready .*\n$/);
    const json = JSON.parse(await expectSuccess(runCli(['status', '--address', cluster.address, '--json']))) as Record<string, unknown>;
    expect(json).toMatchObject({ state: 'ready', model: { path: store, numLayers: 6 }, requests: { running: 0 } });
    expect(json['workers']).toHaveLength(2);
  });
});

describe('serve', () => {
  test('refuses a TCP port in use', async () => {
    const holder = createServer();
    await new Promise<void>((resolve) => holder.listen(0, '127.0.0.1', resolve));
    const { port } = holder.address() as AddressInfo;
    await expectRefusal(runCli(['serve', '--listen', `127.0.0.1:${port}`]), `127.0.0.1:${port}`, 'address is in use');
    await new Promise((resolve) => holder.close(resolve));
  });

  test('refuses a socket that a server has', () => expectRefusal(runCli(['serve', '--listen', cluster.address]), 'another server uses it'));

  test('takes over the socket of a killed server, and SIGINT leaves no process and no file', async () => {
    const temp = folder('served');
    const listen = ['serve', '--model', store, '--world-size', '2', '--listen', `unix:${join(scratch, 'api.sock')}`];
    const killed = startCli(listen);
    await killed.waitFor(/"ready"/);
    killed.child.kill('SIGKILL');
    await killed.result;
    expect(existsSync(join(scratch, 'api.sock'))).toBe(true);

    const server = startCli(listen, { env: { TMPDIR: temp } });
    await server.waitFor(/"ready"/);
    expect(readdirSync(temp)).toHaveLength(1);
    server.child.kill('SIGINT');
    const { code, stdout, stderr } = await server.result;
    expect(code).toBe(0);
    expect(stdout).toBe('');
    const log = stderr
      .trimEnd()
      .split('\n')
      .map((line) => JSON.parse(line) as { msg: string; pid?: number });
    const workers = log.filter(({ msg }) => msg === 'worker attached').map(({ pid }) => pid!);
    expect(workers).toHaveLength(2);
    for (const pid of workers) expect(() => process.kill(pid, 0)).toThrow('ESRCH');
    await expectGone(temp);
    expect(existsSync(join(scratch, 'api.sock'))).toBe(false);
  });

  test.skipIf(allowedCpuList() === null)('puts the threads of each worker on its share of the CPUs', async () => {
    const [first, second] = allowedCpuList()!;
    const cpus = ['--cpus', `${first},${second}`, '--world-size', '2', '--threads', '2'];
    const server = startCli(['serve', '--model', store, ...cpus, '--listen', `unix:${join(scratch, 'pinned.sock')}`]);
    await server.waitFor(/"ready"/);
    const status = await runCli(['status', '--json', '--address', `unix:${join(scratch, 'pinned.sock')}`]);
    const { workers } = JSON.parse(status.stdout) as { workers: { pid: number }[] };
    const pinned = workers.map(({ pid }) =>
      readdirSync(`/proc/${pid}/task`)
        .map((task) => /^Cpus_allowed_list:\s*(\S+)$/m.exec(readFileSync(`/proc/${pid}/task/${task}/status`, 'utf8'))![1]!)
        .filter((list) => /^\d+$/.test(list)),
    );
    server.child.kill('SIGTERM');
    await server.result;
    expect(pinned).toEqual([
      [`${first}`, `${first}`],
      [`${second}`, `${second}`],
    ]);
  });

  test('SIGTERM, twice, ends it with status 0 too', async () => {
    const temp = folder('terminated');
    const server = startCli(['serve', '--model', store, '--world-size', '1', '--listen', '127.0.0.1:0'], { env: { TMPDIR: temp } });
    await server.waitFor(/"address":"127.0.0.1:[1-9]\d*".*"ready"/);
    server.child.kill('SIGTERM');
    server.child.kill('SIGTERM');
    expect((await server.result).code).toBe(0);
    await expectGone(temp);
  });
});

/** The first two CPUs that this process may use; null: there are not two, or the system does not tell. */
function allowedCpuList(): readonly [number, number] | null {
  const status = existsSync('/proc/self/status') ? readFileSync('/proc/self/status', 'utf8') : '';
  const [, list = ''] = /^Cpus_allowed_list:\s*(\S+)$/m.exec(status) ?? [];
  const cpus = list.split(',').flatMap((part) => {
    const [begin = NaN, end = begin] = part.split('-').map(Number);
    return Array.from({ length: end - begin + 1 || 0 }, (_, i) => begin + i);
  });
  return cpus.length < 2 ? null : [cpus[0]!, cpus[1]!];
}

/** Whatever was in the folder of a command that has ended; a server of its own may need a moment longer. */
async function expectGone(temp: string): Promise<void> {
  await expect.poll(() => readdirSync(temp), { timeout: 5_000 }).toEqual([]);
}

function flipByte(path: string, at: number): void {
  const bytes = readFileSync(path);
  bytes.writeUInt8(bytes.readUInt8(at) ^ 1, at);
  writeFileSync(path, bytes);
}

/** Replaces bytes in a file, which has to have them. */
function edit(path: string, from: string, to: string): void {
  const before = readFileSync(path, 'latin1');
  const after = before.replaceAll(from, to);
  expect(after).not.toBe(before);
  writeFileSync(path, after, 'latin1');
}

/** A pickle that would create a file if anything executed it. */
function systemPickle(path: string): Buffer {
  return modulePickle({ x: Buffer.concat([global('os', 'system'), tuple(text(`touch '${path}'`)), op.reduce]) });
}
