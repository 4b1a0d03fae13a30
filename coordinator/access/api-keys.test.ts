import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, expect, test } from 'vitest';
import { ConfigError } from '../../common/errors.js';
import { createApiKey, findApiKey, parseApiKeys, readApiKeys } from './api-keys.js';

const dir = mkdtempSync(join(tmpdir(), 'tandem-api-keys-test-'));
afterAll(() => rmSync(dir, { recursive: true }));

function write(name: string, text: string, mode = 0o600): string {
  const path = join(dir, name);
  writeFileSync(path, text);
  chmodSync(path, mode);
  return path;
}

test('a key is found by its hash, with what its entry allows and the defaults for the rest', () => {
  const a = createApiKey({ name: 'a', roles: ['infer'] });
  const b = createApiKey({
    name: 'b',
    roles: ['infer', 'observe'],
    weight: 2,
    maxPriority: 10,
    maxStreams: 64,
    maxTokensPerMinute: 100_000,
  });
  expect(a.key).toMatch(/^tk_[A-Za-z0-9_-]{43}$/);
  expect(a.entry.sha256).toBe(createHash('sha256').update(a.key).digest('hex'));
  const { keys, isWorldReadable } = readApiKeys(write('two', JSON.stringify({ keys: [a.entry, b.entry] })));
  expect(isWorldReadable).toBe(false);
  expect(findApiKey(keys, a.key)?.caller).toEqual({
    ...{ name: 'a', roles: ['infer'], weight: 1, maxPriority: 0, maxStreams: null, maxTokensPerMinute: null },
  });
  expect(findApiKey(keys, b.key)?.caller).toEqual({
    ...{ name: 'b', roles: ['infer', 'observe'], weight: 2, maxPriority: 10, maxStreams: 64, maxTokensPerMinute: 100_000 },
  });
  expect(findApiKey(keys, a.entry.sha256)).toBeNull();
  expect(findApiKey(keys, `${a.key} `)).toBeNull();
  expect(findApiKey([], a.key)).toBeNull();
});

const sha256 = 'ab'.repeat(32);
const entry = { name: 'a', sha256, roles: ['infer'] };
test.each([
  { name: 'no JSON', text: '{', message: 'keys.json is no JSON' },
  { name: 'something else', text: '[]', message: 'keys.json: ' },
  { name: 'an unknown field of the file', text: { keys: [], more: 1 }, message: 'keys.json: Unrecognized key: "more"' },
  { name: 'an unknown field', text: { keys: [{ ...entry, role: 'x' }] }, message: 'keys.json: keys[0] (a): Unrecognized key: "role"' },
  { name: 'no name', text: { keys: [{ sha256, roles: ['infer'] }] }, message: 'keys.json: keys[0].name: ' },
  { name: 'a strange name', text: { keys: [{ ...entry, name: 'a b' }] }, message: 'keys.json: keys[0] (a b).name: allowed are' },
  {
    name: 'the key itself',
    text: { keys: [{ ...entry, sha256: 'tk_x' }] },
    message: 'keys[0] (a).sha256: the SHA-256 of the key is needed',
  },
  {
    name: 'an unknown role',
    text: { keys: [entry, { ...entry, name: 'b', roles: ['infer', 'root'] }] },
    message: 'keys[1] (b).roles[1]: ',
  },
  { name: 'no roles', text: { keys: [{ ...entry, roles: [] }] }, message: 'keys[0] (a).roles: ' },
  { name: 'a role twice', text: { keys: [{ ...entry, roles: ['infer', 'infer'] }] }, message: 'keys[0] (a).roles: a role is there twice' },
  { name: 'no weight at all', text: { keys: [{ ...entry, weight: 0 }] }, message: 'keys[0] (a).weight: ' },
  { name: 'a priority', text: { keys: [{ ...entry, maxPriority: 101 }] }, message: 'keys[0] (a).maxPriority: ' },
  { name: 'no streams', text: { keys: [{ ...entry, maxStreams: 0 }] }, message: 'keys[0] (a).maxStreams: ' },
  { name: 'half a token', text: { keys: [{ ...entry, maxTokensPerMinute: 0.5 }] }, message: 'keys[0] (a).maxTokensPerMinute: ' },
  {
    name: 'a name twice',
    text: { keys: [entry, { ...entry, sha256: 'cd'.repeat(32) }] },
    message: 'keys[1].name is a, which another key has',
  },
  { name: 'a hash twice', text: { keys: [entry, { ...entry, name: 'b' }] }, message: `keys[1].sha256 is ${sha256}, which another key has` },
])('$name is refused, and said where', ({ text, message }) => {
  const parse = () => parseApiKeys(typeof text === 'string' ? text : JSON.stringify(text), 'keys.json');
  expect(parse).toThrow(ConfigError);
  expect(parse).toThrow(message);
});

test('whatever is in the file, it is keys or a ConfigError of one line', () => {
  const near = fc.record(
    { keys: fc.array(fc.record({ name: fc.string(), sha256: fc.string(), roles: fc.array(fc.string()) }, { requiredKeys: [] })) },
    { requiredKeys: [] },
  );
  fc.assert(
    fc.property(fc.oneof(fc.json(), fc.string(), near.map(JSON.stringify)), (text) => {
      try {
        for (const { roles } of parseApiKeys(text, 'keys.json')) expect(roles.length).toBeGreaterThan(0);
      } catch (error) {
        expect(error).toBeInstanceOf(ConfigError);
      }
    }),
  );
});

test('what is no small regular file is refused', () => {
  expect(() => readApiKeys(join(dir, 'none'))).toThrow('cannot be opened (ENOENT)');
  expect(() => readApiKeys(dir)).toThrow('is not a regular file');
  expect(() => readApiKeys(write('large', ' '.repeat(1024 * 1024 + 1)))).toThrow('has 1048577 bytes, at most 1048576 are read');
  spawnSync('mkfifo', [join(dir, 'fifo')]);
  expect(() => readApiKeys(join(dir, 'fifo'))).toThrow('is not a regular file');
});

test('a file that everybody can read is noticed', () => {
  expect(readApiKeys(write('open', '{"keys":[]}', 0o644)).isWorldReadable).toBe(true);
  expect(readApiKeys(write('group', '{"keys":[]}', 0o640)).isWorldReadable).toBe(false);
});
