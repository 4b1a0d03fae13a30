import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { CommandModule } from 'yargs';
import { tinyModelDir } from '../../model/tiny/tiny-model.js';
import type { Status__Output } from '../../proto/generated/tandem/v1/Status.js';
import { answerView } from '../answer-view.js';
import { formatBytes, formatTable } from '../format.js';
import { interruptible } from '../interrupt.js';
import { startLocalCluster } from '../local-cluster.js';

const WORLD_SIZE = 2;
const MAX_NEW_TOKENS = 64;

export const demoCommand: CommandModule<unknown, object> = {
  command: 'demo',
  describe: 'Two workers answer a dozen prompts of the tiny model',
  async handler() {
    const prompts = readFileSync(join(tinyModelDir, 'prompts.txt'), 'utf8')
      .split('\n')
      .filter((line) => line.trim() !== '')
      .map((line) => line.replaceAll('<n>', '\n'));
    await interruptible(async (signal) => {
      const cluster = await startLocalCluster({ model: null, worldSize: WORLD_SIZE, signal });
      try {
        process.stdout.write(
          `A coordinator and ${WORLD_SIZE} workers (tensor parallel, CPU) serve the tiny model. Blanks are filled as tokens arrive:\n\n`,
        );
        const totals = { tokens: 0, decodeMs: 0, prefillMs: 0, promptTokens: 0 };
        for (const prompt of prompts) {
          const view = answerView(prompt, (text) => process.stdout.write(text), process.stdout.isTTY === true);
          const request = { text: prompt, temperature: 0, maxNewTokens: MAX_NEW_TOKENS };
          const finish = await cluster.client
            .generate(request, (delta) => view.delta(delta), signal)
            .catch((error: unknown) => {
              view.stop();
              throw error;
            });
          view.finish();
          process.stdout.write('\n');
          totals.tokens += finish.usage!.generatedTokens;
          totals.promptTokens += finish.usage!.promptTokens;
          totals.decodeMs += finish.timings!.decodeMs;
          totals.prefillMs += finish.timings!.prefillMs;
        }
        process.stdout.write(`${summary(await cluster.client.status(), totals)}\n`);
      } finally {
        await cluster.close();
      }
    });
  },
};

interface Totals {
  readonly tokens: number;
  readonly decodeMs: number;
  readonly prefillMs: number;
  readonly promptTokens: number;
}

function summary(status: Status__Output, { tokens, decodeMs, prefillMs, promptTokens }: Totals): string {
  const kv = status.kv!;
  return [
    formatTable(
      ['worker', 'device', 'weights', 'KV cache', 'workspace', 'resident'],
      status.workers.map(({ rank, device, isa, weightBytes, kvBytes, workspaceBytes, rssBytes }) => [
        String(rank),
        `${device} ${isa}`,
        ...[weightBytes, kvBytes, workspaceBytes, rssBytes].map(formatBytes),
      ]),
    ),
    '',
    formatTable(
      ['', 'value'],
      [
        ['generated tokens', String(tokens)],
        ['tokens per second, one request at a time', ((tokens * 1000) / (prefillMs + decodeMs)).toFixed(0)],
        ['prompt tokens', String(promptTokens)],
        ['KV blocks used at most', `${kv.peakUsedBlocks} of ${kv.totalBlocks}, ${kv.blockSize} tokens each`],
      ],
    ),
  ].join('\n');
}
