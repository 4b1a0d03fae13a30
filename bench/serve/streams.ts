import { median, type BenchContext, type Part, type PartReport } from './part.js';
import { tandemLoad, withCluster } from './processes.js';

const STREAMS = [1, 8, 16, 32, 64, 128] as const;
const OUTPUT_TOKENS = 192;
const PROMPT_TOKENS = 24;
const AIM = { streams: 64, ratio: 8 };

interface StreamsRun {
  readonly streams: number;
  readonly tokensPerSecond: number;
  readonly interTokenMs: { readonly p50: number; readonly p99: number };
  /** Means of the steps of this run, by the server's totals. */
  readonly tokensPerStep: number;
  readonly workerMsPerStep: number;
  readonly wallMsPerStep: number;
  readonly isClientSaturated: boolean;
}

/** All streams begin together and are equally long, so the figure has the prefill of all of them in it. */
export const streams: Part = {
  name: 'streams',
  title: 'Tokens per second of concurrent greedy streams (tiny model, 2 workers)',
  async run(context) {
    const repeats: StreamsRun[][] = [];
    for (let repeat = 0; repeat < context.repeats; repeat++) repeats.push(await runOnce(context, repeat));
    return report(repeats);
  },
};

function runOnce({ progress }: BenchContext, repeat: number): Promise<StreamsRun[]> {
  return withCluster({ model: null, worldSize: 2 }, async ({ address, client }) => {
    await tandemLoad(address, { concurrency: 32, requests: 64, 'output-tokens': 32, seed: 1000 + repeat }); // everything is compiled and paged in
    const runs: StreamsRun[] = [];
    for (const count of STREAMS) {
      const before = (await client.status()).totals!;
      const load = await tandemLoad(address, {
        concurrency: count,
        requests: count === 1 ? 10 : 2 * count,
        'warm-up': count === 1 ? 3 : count, // the client's own code is compiled in it
        'output-tokens': OUTPUT_TOKENS,
        'prompt-tokens': PROMPT_TOKENS,
        seed: 1 + repeat * STREAMS.length + runs.length,
      });
      const after = (await client.status()).totals!;
      if (load.requests.failed > 0) throw new Error(`${load.requests.failed} requests failed: ${load.errors[0]!.example}`);
      const steps = after.steps - before.steps;
      runs.push({
        streams: count,
        tokensPerSecond: load.throughput.outputTokensPerSecond,
        interTokenMs: load.latencyMs.interToken!,
        tokensPerStep: (after.generatedTokens - before.generatedTokens) / steps,
        workerMsPerStep: ((after.stepSeconds - before.stepSeconds) * 1000) / steps,
        wallMsPerStep: ((after.generatedTokens - before.generatedTokens) / steps / load.throughput.outputTokensPerSecond) * 1000,
        isClientSaturated: load.client.isSaturated,
      });
      progress(`streams: ${count}: ${load.throughput.outputTokensPerSecond.toFixed(0)} tokens/s`);
    }
    return runs;
  });
}

function report(repeats: readonly (readonly StreamsRun[])[]): PartReport {
  const measured = STREAMS.map((count, i) => {
    const of = (figure: (run: StreamsRun) => number): number => median(repeats.map((runs) => figure(runs[i]!)));
    return {
      streams: count,
      tokensPerSecond: of((run) => run.tokensPerSecond),
      ratio: median(repeats.map((runs) => runs[i]!.tokensPerSecond / runs[0]!.tokensPerSecond)),
      interTokenMsP50: of((run) => run.interTokenMs.p50),
      interTokenMsP99: of((run) => run.interTokenMs.p99),
      tokensPerStep: of((run) => run.tokensPerStep),
      wallMsPerStep: of((run) => run.wallMsPerStep),
      workerMsPerStep: of((run) => run.workerMsPerStep),
    };
  });
  const aimed = measured.find((each) => each.streams === AIM.streams)!;
  const saturated = repeats.flat().filter((run) => run.isClientSaturated).length;
  return {
    header: ['streams', 'tokens/s', 'of one stream', 'between tokens p50', 'p99 ms', 'tokens/step', 'ms/step', 'of which workers'],
    rows: measured.map((each) => [
      String(each.streams),
      each.tokensPerSecond.toFixed(0),
      `${each.ratio.toFixed(2)}`,
      each.interTokenMsP50.toFixed(2),
      each.interTokenMsP99.toFixed(2),
      each.tokensPerStep.toFixed(1),
      each.wallMsPerStep.toFixed(2),
      each.workerMsPerStep.toFixed(2),
    ]),
    notes: [
      `${AIM.streams} streams give ${aimed.ratio.toFixed(2)} times the tokens of one stream (aim: at least ${AIM.ratio})`,
      ...(saturated > 0 ? [`the load generator was short of processor time in ${saturated} of ${repeats.flat().length} runs`] : []),
    ],
    data: { outputTokens: OUTPUT_TOKENS, promptTokens: PROMPT_TOKENS, aim: AIM, measured, repeats },
    failures: [],
  };
}
