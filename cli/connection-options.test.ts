import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, test } from 'vitest';
import { toCredentials } from './connection-options.js';

const dir = mkdtempSync(join(tmpdir(), 'tandem-connection-test-'));
afterAll(() => rmSync(dir, { recursive: true }));
const pem = join(dir, 'a.pem');
writeFileSync(pem, 'PEM');

const none = { apiKey: undefined, ca: undefined, clientCert: undefined, clientKey: undefined };

test('the key comes from the flag, else from the environment', () => {
  expect(toCredentials(none, {})).toEqual({ apiKey: null, tls: null });
  expect(toCredentials(none, { TANDEM_API_KEY: 'tk_e\n' }).apiKey).toBe('tk_e');
  expect(toCredentials({ ...none, apiKey: 'tk_f' }, { TANDEM_API_KEY: 'tk_e' }).apiKey).toBe('tk_f');
  expect(() => toCredentials(none, { TANDEM_API_KEY: 'tk e' })).toThrow('the API key in TANDEM_API_KEY has characters that no key has');
});

test('TLS is used when an authority or a certificate is given', () => {
  const text = Buffer.from('PEM');
  expect(toCredentials({ ...none, ca: pem }, {}).tls).toEqual({ ca: text, identity: null });
  expect(toCredentials({ ...none, clientCert: pem, clientKey: pem }, {}).tls).toEqual({ ca: null, identity: { cert: text, key: text } });
  expect(() => toCredentials({ ...none, clientCert: pem }, {})).toThrow('--client-cert and --client-key go together');
  expect(() => toCredentials({ ...none, ca: join(dir, 'none') }, {})).toThrow('cannot be read (ENOENT)');
});
