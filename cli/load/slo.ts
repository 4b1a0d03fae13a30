import { ConfigError } from '../../common/errors.js';

/** What a good request keeps to, in milliseconds; null: not asked for. */
export interface Slo {
  readonly ttftMs: number | null;
  readonly tpotMs: number | null;
  readonly e2eMs: number | null;
}

const UNIT_MS: Readonly<Record<string, number>> = { ms: 1, s: 1000 };

/** @throws ConfigError */
export function parseSlo(text: string): Slo {
  const slo = { ttft: null, tpot: null, e2e: null } as Record<string, number | null>;
  for (const part of text.split(',')) {
    const { name, value, unit } = /^(?<name>ttft|tpot|e2e)=(?<value>\d{1,9}(\.\d{1,6})?)(?<unit>ms|s)$/.exec(part.trim())?.groups ?? {};
    if (name === undefined || slo[name] !== null) {
      throw new ConfigError(
        `--slo ${text}: write each of ttft, tpot and e2e at most once with ms or s, such as ttft=200ms,tpot=50ms,e2e=3s`,
      );
    }
    slo[name] = Number(value) * UNIT_MS[unit!]!;
  }
  return { ttftMs: slo['ttft']!, tpotMs: slo['tpot']!, e2eMs: slo['e2e']! };
}
