import { expect, test } from 'vitest';
import { isLoopback, parseAddress } from './address.js';

test.each([
  { text: 'unix:/run/a.sock', address: { kind: 'unix', path: '/run/a.sock' }, loopback: true },
  { text: 'unix:///run/a.sock', address: { kind: 'unix', path: '/run/a.sock' }, loopback: true },
  { text: '127.0.0.1:7130', address: { kind: 'tcp', host: '127.0.0.1', port: 7130 }, loopback: true },
  { text: '[::1]:0', address: { kind: 'tcp', host: '[::1]', port: 0 }, loopback: true },
  { text: 'localhost:65535', address: { kind: 'tcp', host: 'localhost', port: 65535 }, loopback: true },
  { text: '0.0.0.0:1', address: { kind: 'tcp', host: '0.0.0.0', port: 1 }, loopback: false },
  { text: '127.evil.example:1', address: { kind: 'tcp', host: '127.evil.example', port: 1 }, loopback: false },
  { text: '127.0.0.1.nip.io:1', address: { kind: 'tcp', host: '127.0.0.1.nip.io', port: 1 }, loopback: false },
])('$text', ({ text, address, loopback }) => {
  expect(parseAddress(text)).toEqual(address);
  expect(isLoopback(parseAddress(text))).toBe(loopback);
});

test.each(['', 'unix:', 'localhost', 'localhost:', 'localhost:65536', ':80', 'http://a:1', `unix:/${'x'.repeat(107)}`])(
  '"%s" is no address',
  (text) => {
    expect(() => parseAddress(text)).toThrow(/address|socket path/);
  },
);
