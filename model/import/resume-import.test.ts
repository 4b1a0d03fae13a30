import { spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
  writeSync,
  closeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { ConfigError } from '../../common/errors.js';
import { packageRoot } from '../../common/package-root.js';
import { quantizedNames } from '../store/glm-tensors.js';
import { partialFolder } from '../store/partial-store.js';
import { writeSyntheticSat } from '../synth/write-synthetic.js';
import { goldenModel, sha256 } from './fixtures/golden-checkpoints.js';
import { importCheckpoint, outlineImport, type ImportOptions, type ImportProgress, type ImportResult } from './import-checkpoint.js';

const scratch = mkdtempSync(join(tmpdir(), 'resume-import-'));
afterAll(() => rmSync(scratch, { recursive: true }));

const config = { ...goldenModel('E').config, numLayers: 4, hiddenSize: 512, numAttentionHeads: 4, innerHiddenSize: 1024, vocabSize: 2048 };
const folder = join(scratch, 'folder');
const parts = join(scratch, 'parts');
const other = join(scratch, 'other');
const base = { quantize: 4 } as const;

let expected: Record<string, string>;
let total: number;
let to: string;
let partial: string;
let count = 0;
beforeAll(async () => {
  await writeSyntheticSat({ config, seed: 'a', bits: null, ranks: 2, to: folder }, null);
  await writeSyntheticSat({ config, seed: 'a', bits: null, ranks: 2, to: parts }, 5);
  await writeSyntheticSat({ config, seed: 'b', bits: null, ranks: 2, to: other }, null);
  total = (await importCheckpoint({ ...base, from: folder, to: join(scratch, 'expected') })).tensors;
  expected = filesOf(join(scratch, 'expected'));
});
beforeEach(() => {
  to = join(scratch, `store-${count++}`);
  partial = partialFolder(to);
});

describe('killed again and again', () => {
  test.each([
    { name: 'a folder', from: folder },
    { name: 'an archive', from: join(parts, '*.part_*') },
  ])('$name: the store is what it would have been, and nothing that was finished is made again', async ({ from }) => {
    let kills = 0;
    for (;;) {
      const before = recorded();
      const command = ['import', '--from', from, '--to', to, '--quantize', 'int4', '--threads', '2', '--memory-limit', '400MiB'];
      const child = spawn(process.execPath, [join(packageRoot, 'dist/cli/main.js'), ...command], { stdio: ['ignore', 'pipe', 'pipe'] });
      const output = { stdout: '', stderr: '' };
      child.stdout.on('data', (chunk) => (output.stdout += String(chunk)));
      child.stderr.on('data', (chunk) => (output.stderr += String(chunk)));
      const closed = once(child, 'close');
      // As soon as a few more tensors are finished: somewhere in the next ones. The first time, before there is anything.
      const wanted = before.size + 3 * kills;
      while (child.exitCode === null && kills < 10 && recorded().size < wanted) await setTimeout(1);
      if (kills < 10) child.kill('SIGKILL');
      const [code, signal] = (await closed) as [number | null, NodeJS.Signals | null];
      for (const [name, hash] of before) if (existsSync(partial)) expect(recorded().get(name)).toBe(hash);
      if (signal === null) {
        expect(code, output.stderr).toBe(0);
        expect(output.stdout).toContain(`(${before.size} were there already)`);
        break;
      }
      kills++;
      if (existsSync(to)) break; // between its last steps
    }
    expect(kills).toBeGreaterThan(3);
    if (existsSync(partial)) await importCheckpoint({ ...base, from, to });
    expect(filesOf(to)).toEqual(expected);
    expect(existsSync(partial)).toBe(false);
  });
});

/** The journal, as far as it is there. */
function recorded(): Map<string, string> {
  const path = join(partial, 'journal.jsonl');
  if (!existsSync(path)) return new Map();
  const lines = readFileSync(path, 'utf8').split('\n').slice(0, -1);
  return new Map(
    lines
      .filter((line) => line !== '')
      .map((line) => [(JSON.parse(line) as { name: string }).name, (JSON.parse(line) as { sha256: string }).sha256]),
  );
}

/** Stops after `tensors` tensors of the store. */
async function stopAfter(tensors: number, options: Partial<ImportOptions> = {}): Promise<void> {
  const stop = new AbortController();
  const onProgress = (progress: ImportProgress): void => {
    if (progress.tensors >= tensors) stop.abort(new ConfigError('stopped'));
  };
  const error: unknown = await importCheckpoint({ ...base, from: folder, to, ...options, onProgress, signal: stop.signal }).catch(
    (reason: unknown) => reason,
  );
  expect((error as Error).message).toBe('stopped');
  expect(existsSync(to)).toBe(false);
  expect(recorded().size).toBeGreaterThanOrEqual(tensors);
}

async function resume(options: Partial<ImportOptions> = {}): Promise<ImportResult> {
  const result = await importCheckpoint({ ...base, from: folder, to, ...options });
  expect(filesOf(to)).toEqual(expected);
  expect(existsSync(partial)).toBe(false);
  return result;
}

describe('an import that was stopped', () => {
  test.each([0, 3])('goes on, with %i threads', async (threads) => {
    await stopAfter(10, { threads });
    const keptNames = [...recorded().keys()];
    const seen: ImportProgress[] = [];
    const result = await resume({ threads, onProgress: (progress) => seen.push(progress) });
    expect(result).toMatchObject({ keptTensors: keptNames.length, tensors: total, warnings: [expect.stringContaining('no tokenizer')] });
    expect(seen[0]!.phase).toBe('check');
    for (const name of seen.filter(({ phase }) => phase === 'import').map((each) => each.name)) {
      expect(keptNames).not.toContain(quantizedNames(name).qweight);
      expect(keptNames).not.toContain(name);
    }
  });

  test('goes on from the archive that the folder was in', async () => {
    await stopAfter(10);
    expect((await resume({ from: join(parts, '*.part_*') })).keptTensors).toBeGreaterThanOrEqual(10);
  });

  test('says in its plan that it would go on', async () => {
    await stopAfter(10);
    const outline = await outlineImport({ ...base, from: folder, to });
    expect(outline.unfinished).toBe(partial);
    expect(outline.neededBytes).toBeLessThan(outline.plan.bytes);
    expect(existsSync(partial)).toBe(true);
  });

  test('makes a tensor again whose bytes are not what the journal says', async () => {
    await stopAfter(10);
    const file = join(
      partial,
      'store',
      readdirSync(join(partial, 'store')).find((name) => name.endsWith('.safetensors'))!,
    );
    const fd = openSync(file, 'r+');
    writeSync(fd, 'damage', 10_000);
    closeSync(fd);
    const { warnings, keptTensors } = await resume();
    expect(keptTensors).toBeGreaterThan(0);
    expect(warnings).toContain(
      'tensor transformer.word_embeddings.weight of the unfinished import is not what it was when it was written; it is made again',
    );
  });

  test.each(['{"name":"transformer.final_layernorm.bi', 'null\n', '{"name":"x","sha256":"1"}\n', '\0\0\0'])(
    'a journal that ends in %j',
    async (end) => {
      await stopAfter(10);
      appendFileSync(join(partial, 'journal.jsonl'), end);
      expect((await resume()).keptTensors).toBeGreaterThanOrEqual(10);
    },
  );

  test('was killed after its last step: the same command finds it done', async () => {
    await stopAfter(10);
    const provenance = readFileSync(join(partial, 'import.json'));
    await resume();
    const again = importCheckpoint({ ...base, from: folder, to });
    await expect(again).rejects.toThrow(`target ${to} exists and is not empty`);
    mkdirSync(partial);
    writeFileSync(join(partial, 'import.json'), provenance);
    expect((await resume()).keptTensors).toBe(total);
  });
});

describe('what an unfinished import does not go on with', () => {
  const restart = 'go on with the same command, or give --restart to throw away what is there';

  test('another checkpoint', async () => {
    await stopAfter(10);
    const error: unknown = await importCheckpoint({ ...base, from: other, to }).catch((reason: unknown) => reason);
    expect(error).toBeInstanceOf(ConfigError);
    expect((error as Error).message).toBe(`${partial} is an unfinished import of ${folder}, and ${other} holds something else: ${restart}`);
    await resume();
  });

  test.each([
    { name: 'other bits', options: { quantize: 8 }, label: 'INT8 weights for 2 ranks, 4 layers, no tokenizer' },
    { name: 'other groups', options: { group: 128 }, label: 'INT4 weights in groups of 128, 4 layers, no tokenizer' },
    { name: 'other ranks', options: { ranks: 4 }, label: 'INT4 weights for 4 ranks, 4 layers, no tokenizer' },
  ] as const)('$name', async ({ options, label }) => {
    await stopAfter(10);
    const error: unknown = await importCheckpoint({ ...base, from: folder, to, ...options }).catch((reason: unknown) => reason);
    expect((error as Error).message).toBe(
      `${partial} is an unfinished import with INT4 weights for 2 ranks, 4 layers, no tokenizer, this one would be with ${label}: ${restart}`,
    );
    await expect(outlineImport({ ...base, from: folder, to, ...options })).rejects.toThrow(restart);
    await importCheckpoint({ ...base, from: folder, to, ...options, restart: true });
    expect(filesOf(to)).not.toEqual(expected);
  });
});

function filesOf(store: string): Record<string, string> {
  return Object.fromEntries(readdirSync(store).map((name) => [name, sha256(readFileSync(join(store, name)))]));
}
