/** The tiny model through the whole system: texts, logits and sampling, against what the original code computed. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { TandemClient } from '../cli/client.js';
import { startLocalCluster, type LocalCluster } from '../cli/local-cluster.js';
import { floats, maxDifference, readGolden, type GoldenFloats } from './support/golden.js';

const LOGITS = 1e-4;

interface GenerationCase {
  readonly text: string;
  readonly strategy: 'greedy' | 'beam';
  readonly out_seq_length: number;
  readonly answers: string[];
  readonly answers_with_style: string[];
  readonly blanks: string[][];
  readonly calls: { readonly rows: number[][]; readonly scores?: number[] }[];
}

const { cases } = readGolden<{ cases: GenerationCase[] }>('tiny/generations.json');
const BEAMS = { numBeams: 4, lengthPenalty: 1, noRepeatNgramSize: 3, deterministic: true };

describe.each([
  { worldSize: 1, kvDtype: 'fp32' as const, isa: 'generic', runAhead: 'on' },
  { worldSize: 2, kvDtype: 'fp16' as const, isa: 'auto', runAhead: 'on' },
  { worldSize: 4, kvDtype: 'fp16' as const, isa: 'auto', runAhead: 'off' },
])('$worldSize worker(s), $kvDtype cache, $isa kernels, running ahead $runAhead', ({ worldSize, kvDtype, isa, runAhead }) => {
  let cluster: LocalCluster;
  let client: TandemClient;
  beforeAll(async () => {
    cluster = await startLocalCluster({ model: null, worldSize, engine: { kvDtype, isa }, flags: [`--run-ahead=${runAhead}`] });
    client = cluster.client;
  });
  afterAll(() => cluster?.close());

  test('all 118 blank-filling goldens, text for text, in one big batch', async () => {
    expect(cases).toHaveLength(118);
    await Promise.all(
      cases.map(async (golden) => {
        const finish = await client.generate({
          text: golden.text,
          maxRowTokens: golden.out_seq_length,
          ...(golden.strategy === 'beam' ? { beamSearch: BEAMS } : { temperature: 0 }),
        });
        const [output] = finish.outputs;
        expect(output!.text, golden.text).toBe(golden.answers[0]);
        expect(output!.styledText).toBe(golden.answers_with_style[0]);
        expect(output!.blanks.map(({ text }) => text)).toEqual(golden.blanks[0]);
        if (golden.strategy === 'beam') {
          expect(output!.beams.map(({ text }) => text)).toEqual(golden.answers);
          expect(output!.beams.map(({ blanks }) => blanks)).toEqual(golden.blanks);
          const scores = output!.beams.map(({ score }) => score);
          expect(maxDifference(scores, golden.calls.at(-1)!.scores!)).toBeLessThan(kvDtype === 'fp32' ? 2e-4 : 2e-2);
        }
      }),
    );
  });

  test('pieces arrive as they are generated, and joined they are the blanks', async () => {
    const deltas: { blank: number; text: string }[] = [];
    const finish = await client.generate({ text: '中国的首都是[MASK]，中国在[MASK]。', temperature: 0 }, ({ blank, text }) =>
      deltas.push({ blank, text }),
    );
    const joined = [0, 1].map((blank) =>
      deltas
        .filter((delta) => delta.blank === blank)
        .map(({ text }) => text)
        .join(''),
    );
    expect(joined).toEqual(finish.outputs[0]!.blanks.map(({ text }) => text));
    expect(joined).toEqual(['北京', '亚洲']);
    expect(finish.usage).toMatchObject({ generatedTokens: expect.any(Number) as number });
    expect(finish.timings!.prefillMs).toBeGreaterThan(0);
  });
});

test('logits of the last four positions', async () => {
  const cluster = await startLocalCluster({ model: null, worldSize: 2, engine: { kvDtype: 'fp32' } });
  try {
    const logits = readGolden<{ cases: { tokens: number[]; position_ids: number[]; logits: GoldenFloats }[] }>('tiny/logits.json');
    for (const { tokens, position_ids: positions, logits: expected } of logits.cases) {
      const rows = await cluster.client.logits({ ids: tokens, positions, bidirectionalTokens: tokens.length - 1, rows: 4 });
      const got = rows.flatMap((row) => Array.from(row));
      expect(maxDifference(got, floats(expected))).toBeLessThan(LOGITS);
    }
  } finally {
    await cluster.close();
  }
});

describe('the same request gives the same tokens', () => {
  let cluster: LocalCluster;
  beforeAll(async () => {
    cluster = await startLocalCluster({ model: null, worldSize: 2, flags: ['--run-ahead=on'] });
  });
  afterAll(() => cluster?.close());

  const prompts = cases.filter(({ strategy }) => strategy === 'greedy').map(({ text }) => text);
  /** Ids of all outputs, and every log-probability that came with them: compared bit for bit. */
  const answerOf = async (text: string, temperature: number, seed: number) => {
    const logprobs: number[][] = [[], []];
    const request = { text, temperature, topP: temperature > 0 ? 0.9 : 0, seed, maxNewTokens: 24, logprobs: 2, n: temperature > 0 ? 2 : 1 };
    const finish = await cluster.client.generate(request, (delta) => {
      for (const { logprob, top } of delta.logprobs) logprobs[delta.output]!.push(logprob, ...top.map((each) => each.logprob));
    });
    return { ids: finish.outputs.map(({ ids }) => ids), logprobs };
  };
  const beamsOf = async (text: string, deterministic: boolean, seed: number) => {
    const finish = await cluster.client.generate({ text, seed, maxNewTokens: 12, beamSearch: { ...BEAMS, deterministic } });
    return finish.outputs[0]!.beams.map(({ ids, score }) => ({ ids, score }));
  };

  test.each([
    { name: 'greedy', ask: (text: string, seed: number) => answerOf(text, 0, seed) },
    { name: 'seeded sampling, two samples', ask: (text: string, seed: number) => answerOf(text, 1, seed) },
    { name: 'beams', ask: (text: string, seed: number) => beamsOf(text, true, seed) },
    { name: 'drawn beams', ask: (text: string, seed: number) => beamsOf(text, false, seed) },
  ])('alone, among 32 others and in any order of arrival: $name', async ({ ask }) => {
    const chosen = prompts.slice(0, 33);
    const alone: unknown[] = [];
    for (const [seed, text] of chosen.entries()) alone.push(await ask(text, seed));
    expect(JSON.stringify(alone)).toMatch(/-\d+\.\d+/); // there are log-probabilities to compare
    expect(await Promise.all<unknown>(chosen.map((text, seed) => ask(text, seed)))).toEqual(alone);
    const order = chosen.map((_, i) => (i * 14 + 5) % chosen.length);
    const shuffled = new Map<number, unknown>();
    await Promise.all(
      order.map(async (index, i) => {
        await new Promise((resolve) => setTimeout(resolve, i * 3));
        shuffled.set(index, await ask(chosen[index]!, index));
      }),
    );
    expect(chosen.map((_, i) => shuffled.get(i))).toEqual(alone);
  });

  test('another seed gives other tokens, and n samples differ', async () => {
    const text = 'Once upon a time, [gMASK]';
    const [{ ids: first }, { ids: second }] = [await answerOf(text, 1, 1), await answerOf(text, 1, 2)];
    expect(first).not.toEqual(second);
    expect(first[0]).not.toEqual(first[1]);
  });
});
