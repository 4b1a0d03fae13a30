import { pino } from 'pino';
import { expect, test } from 'vitest';
import { ConfigError } from '../common/errors.js';
import { checkGuard } from './listen.js';

const nothing = { hasKeys: false, hasTls: false, hasClientCa: false };

test.each([
  { name: 'loopback without anything', address: '127.0.0.1:7130', guard: nothing, result: 'listens' },
  { name: 'a socket without anything', address: 'unix:/run/tandem.sock', guard: nothing, result: 'listens' },
  { name: 'everywhere without anything', address: '0.0.0.0:7130', guard: nothing, result: 'is refused' },
  { name: 'everywhere with TLS alone', address: '0.0.0.0:7130', guard: { ...nothing, hasTls: true }, result: 'is refused' },
  { name: 'a name without anything', address: 'gpu-box:7130', guard: nothing, result: 'is refused' },
  { name: 'everywhere with keys', address: '0.0.0.0:7130', guard: { ...nothing, hasKeys: true }, result: 'warns' },
  { name: 'everywhere with keys and TLS', address: '[::]:7130', guard: { ...nothing, hasKeys: true, hasTls: true }, result: 'listens' },
  {
    name: 'everywhere with mutual TLS',
    address: '[::]:7130',
    guard: { hasKeys: false, hasTls: true, hasClientCa: true },
    result: 'listens',
  },
])('$name $result', ({ address, guard, result }) => {
  const warnings: string[] = [];
  const log = pino({}, { write: (line: string) => void warnings.push(line) });
  const check = () => checkGuard('--listen', address, guard, log);
  if (result === 'is refused') {
    expect(check).toThrow(ConfigError);
    expect(check).toThrow(/--api-keys FILE .*, or --tls-cert, --tls-key and --client-ca, or a loopback address/);
  } else {
    check();
    expect(warnings).toHaveLength(result === 'warns' ? 1 : 0);
  }
});
