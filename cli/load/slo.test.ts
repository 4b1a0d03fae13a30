import { expect, test } from 'vitest';
import { parseSlo } from './slo.js';

test.each([
  { text: 'ttft=200ms', slo: { ttftMs: 200, tpotMs: null, e2eMs: null } },
  { text: 'ttft=0.2s, tpot=50ms,e2e=3s', slo: { ttftMs: 200, tpotMs: 50, e2eMs: 3000 } },
])('$text', ({ text, slo }) => expect(parseSlo(text)).toEqual(slo));

test.each(['', 'ttft', 'ttft=200', 'ttft=-1ms', 'itl=3ms', 'ttft=1s,ttft=2s', 'ttft=1s,', 'ttft=1s;tpot=2s'])('"%s" is refused', (text) => {
  expect(() => parseSlo(text)).toThrow(/^--slo /);
});
