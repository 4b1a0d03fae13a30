import { chmodSync, lstatSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, expect, test, vi } from 'vitest';
import { findApiKey, readApiKeys } from '../../coordinator/access/api-keys.js';
import { keyCommand } from './key.js';

const dir = mkdtempSync(join(tmpdir(), 'tandem-key-test-'));
afterAll(() => rmSync(dir, { recursive: true }));
afterEach(() => void vi.restoreAllMocks());

/** Runs the command. @returns the key that it printed */
async function newKey(args: { name: string; roles?: string; weight?: number; file?: string }): Promise<string> {
  const printed: string[] = [];
  vi.spyOn(process.stdout, 'write').mockImplementation((text) => printed.push(String(text)) > 0);
  vi.spyOn(process.stderr, 'write').mockImplementation(() => true);
  await keyCommand.handler({ roles: 'infer', ...args } as never);
  return printed.join('').trim();
}

test('keys are added to the file, which is for its owner alone', async () => {
  const file = join(dir, 'keys.json');
  const a = await newKey({ name: 'a', file });
  chmodSync(file, 0o644);
  const b = await newKey({ name: 'b', roles: 'infer, observe', weight: 2.5, file });
  expect(statSync(file).mode & 0o777).toBe(0o600);
  const { keys } = readApiKeys(file);
  expect(findApiKey(keys, a)?.caller).toMatchObject({ name: 'a', roles: ['infer'], weight: 1 });
  expect(findApiKey(keys, b)?.caller).toMatchObject({ name: 'b', roles: ['infer', 'observe'], weight: 2.5 });
  expect(readFileSync(file, 'utf8')).not.toContain(a);
});

test('what serve would refuse changes nothing', async () => {
  const file = join(dir, 'refused.json');
  await newKey({ name: 'a', file });
  const before = readFileSync(file, 'utf8');
  await expect(async () => newKey({ name: 'a', file })).rejects.toThrow('keys[1].name is a, which another key has');
  await expect(async () => newKey({ name: 'b', roles: 'root', file })).rejects.toThrow('keys[1] (b).roles[0]');
  expect(readFileSync(file, 'utf8')).toBe(before);
  writeFileSync(file, 'not keys');
  await expect(async () => newKey({ name: 'b', file })).rejects.toThrow('refused.json is no JSON');
  expect(readFileSync(file, 'utf8')).toBe('not keys');
  await expect(async () => newKey({ name: 'b', file: join(dir, 'none', 'keys.json') })).rejects.toThrow('cannot be written (ENOENT)');
  expect(readdirSync(dir).filter((name) => name.endsWith('.partial'))).toEqual([]);
});

test('a link to the file stays a link', async () => {
  const file = join(dir, 'linked.json');
  const link = join(dir, 'link.json');
  await newKey({ name: 'a', file });
  symlinkSync(file, link);
  await newKey({ name: 'b', file: link });
  expect(lstatSync(link).isSymbolicLink()).toBe(true);
  expect(readApiKeys(file).keys).toHaveLength(2);
});
