import { median, type BenchContext, type Part, type PartReport } from './part.js';
import { tandemLoad, withCluster } from './processes.js';

const STREAMS = [1, 8, 64] as const;
const OUTPUT_TOKENS = 192;
const PROMPT_TOKENS = 24;
const WORLD_SIZES = [1, 2] as const;

interface AheadRun {
  readonly tokensPerSecond: number;
  readonly firstTokenMs: number;
}

interface Pair {
  readonly on: AheadRun;
  readonly off: AheadRun;
}

interface Measured {
  readonly worldSize: number;
  readonly streams: number;
  readonly pairs: readonly Pair[];
}

/** Two servers at once, of which one sends steps while others run and the other one by one; they are asked in turn, and the idle one takes no time. */
export const ahead: Part = {
  name: 'ahead',
  title: 'Steps sent while others run, against steps sent one by one (tiny model)',
  async run(context) {
    const measured: Measured[] = [];
    for (const worldSize of WORLD_SIZES) {
      await withServer(worldSize, true, (on) =>
        withServer(worldSize, false, async (off) => {
          for (const streams of STREAMS)
            measured.push({ worldSize, streams, pairs: await runPairs(context, { on, off }, worldSize, streams) });
        }),
      );
    }
    return report(measured);
  },
};

function withServer(worldSize: number, isOn: boolean, use: (address: string) => Promise<void>): Promise<void> {
  return withCluster({ model: null, worldSize, flags: [`--run-ahead=${isOn ? 'on' : 'off'}`] }, async ({ address }) => {
    await tandemLoad(address, { concurrency: 32, requests: 64, 'output-tokens': 32, seed: 1000 }); // everything is compiled and paged in
    await use(address);
  });
}

async function runPairs(
  { repeats, progress }: BenchContext,
  servers: { on: string; off: string },
  worldSize: number,
  streams: number,
): Promise<Pair[]> {
  const pairs: Pair[] = [];
  for (let repeat = 0; repeat < 2 * repeats; repeat++) {
    const first = repeat % 2 === 0;
    const one = await runOnce(first ? servers.on : servers.off, streams, 2 * repeat);
    const other = await runOnce(first ? servers.off : servers.on, streams, 2 * repeat + 1);
    const pair = first ? { on: one, off: other } : { on: other, off: one };
    progress(
      `ahead: ${worldSize} workers, ${streams} streams: ${pair.on.tokensPerSecond.toFixed(0)} and ${pair.off.tokensPerSecond.toFixed(0)} tokens/s`,
    );
    pairs.push(pair);
  }
  return pairs;
}

async function runOnce(address: string, streams: number, seed: number): Promise<AheadRun> {
  const load = await tandemLoad(address, {
    concurrency: streams,
    requests: streams === 1 ? 6 : 2 * streams,
    'warm-up': streams === 1 ? 2 : streams,
    'output-tokens': OUTPUT_TOKENS,
    'prompt-tokens': PROMPT_TOKENS,
    seed,
  });
  if (load.requests.failed > 0) throw new Error(`${load.requests.failed} requests failed: ${load.errors[0]!.example}`);
  return { tokensPerSecond: load.throughput.outputTokensPerSecond, firstTokenMs: load.latencyMs.ttft!.p50 };
}

function report(measured: readonly Measured[]): PartReport {
  const rows = measured.map(({ worldSize, streams, pairs }) => ({
    worldSize,
    streams,
    on: median(pairs.map(({ on }) => on.tokensPerSecond)),
    off: median(pairs.map(({ off }) => off.tokensPerSecond)),
    ratio: median(pairs.map(({ on, off }) => on.tokensPerSecond / off.tokensPerSecond)),
    firstTokenMs: median(pairs.map(({ on }) => on.firstTokenMs)),
    firstTokenMsOff: median(pairs.map(({ off }) => off.firstTokenMs)),
  }));
  return {
    header: ['workers', 'streams', 'tokens/s ahead', 'one by one', 'ratio', 'first token p50 ms ahead', 'one by one'],
    rows: rows.map((each) => [
      String(each.worldSize),
      String(each.streams),
      each.on.toFixed(0),
      each.off.toFixed(0),
      each.ratio.toFixed(2),
      each.firstTokenMs.toFixed(1),
      each.firstTokenMsOff.toFixed(1),
    ]),
    notes: [],
    data: { outputTokens: OUTPUT_TOKENS, promptTokens: PROMPT_TOKENS, measured: rows },
    failures: [],
  };
}
