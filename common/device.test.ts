import { describe, expect, test } from 'vitest';
import { formatDevice, parseDevice } from './device.js';

describe('devices', () => {
  test.each(['cpu', 'cuda:0', 'cuda:17'])('%s is read and written', (text) => {
    expect(formatDevice(parseDevice(text))).toBe(text);
  });

  test.each(['', 'cuda', 'cuda:', 'cuda:-1', 'cuda:1.5', 'cuda:1234', 'gpu:0', 'CPU', ' cpu', 'cuda:0 '])('%j is refused', (text) => {
    expect(() => parseDevice(text)).toThrow(`--device ${text}: a worker takes cpu or cuda:N, as in cuda:0`);
  });
});
