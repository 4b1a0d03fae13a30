import type { CommandModule } from 'yargs';
import { ConfigError } from '../../common/errors.js';
import { interruptible } from '../interrupt.js';
import { startLocalCluster } from '../local-cluster.js';
import { type EngineArgs, localEngineFlags, engineOptions } from '../engine-options.js';
import { wholeNumber } from '../number-option.js';

interface LogitsArgs extends EngineArgs {
  model: string | undefined;
  tokens: string;
  bidirectional: number;
  positions: string | undefined;
  worldSize: number;
  threads: number;
  all: boolean;
  json: boolean;
  noJson: boolean;
}

export const logitsCommand: CommandModule<unknown, LogitsArgs> = {
  command: 'logits',
  describe: 'Print the logits of a row of tokens: the window for verification',
  builder: (yargs) =>
    yargs
      .option('model', { type: 'string', describe: 'Model store (default: the tiny model)' })
      .option('tokens', { type: 'string', demandOption: true, describe: 'Token ids, e.g. 5,6,7' })
      .option(
        'bidirectional',
        wholeNumber('bidirectional', { min: 0, default: 0, describe: 'The first N tokens see each other; the rest is causal' }),
      )
      .option('positions', { type: 'string', describe: 'Position ids, one for each token (default: 0,1,2,...)' })
      .option('world-size', wholeNumber('world-size', { min: 1, default: 1, describe: 'Tensor-parallel workers to use' }))
      .option('threads', wholeNumber('threads', { min: 1, default: 1, describe: 'Threads of each worker' }))
      .options(engineOptions({ kvDtype: 'fp32', activations: 'float' }))
      .option('all', { type: 'boolean', default: false, describe: "Every position's logits, not only the last one's" })
      .option('json', { type: 'boolean', default: true, describe: 'Print {"shape":[rows,V],"logits":[[...]]}' })
      .option('no-json', { type: 'boolean', default: false, describe: 'Print the five largest of each row instead' }) as never,
  async handler(args) {
    const ids = parseIds('--tokens', args.tokens);
    const positions = args.positions === undefined ? [] : parseIds('--positions', args.positions);
    if (args.positions !== undefined && positions.length !== ids.length) {
      throw new ConfigError(`--positions has ${positions.length} entries for ${ids.length} tokens: give one for each`);
    }
    if (args.bidirectional > ids.length) {
      throw new ConfigError(`--bidirectional ${args.bidirectional}: there are ${ids.length} tokens, so at most that many see each other`);
    }
    await interruptible(async (signal) => {
      const cluster = await startLocalCluster({
        model: args.model ?? null,
        worldSize: args.worldSize,
        threads: args.threads,
        engine: localEngineFlags(args),
        signal,
      });
      try {
        const rows = await cluster.client.logits({
          ids,
          positions,
          bidirectionalTokens: args.bidirectional,
          rows: args.all ? ids.length : 1,
        });
        process.stdout.write(args.json && !args.noJson ? toJson(rows) : largest(rows, args.all ? 0 : ids.length - 1));
      } finally {
        await cluster.close();
      }
    });
  },
};

function toJson(rows: readonly Float32Array[]): string {
  return `${JSON.stringify({ shape: [rows.length, rows[0]?.length ?? 0], logits: rows.map((row) => Array.from(row)) })}\n`;
}

function largest(rows: readonly Float32Array[], firstRow: number): string {
  const lines = rows.map((row, i) => {
    const best = Array.from(row, (logit, token) => ({ logit, token }))
      .sort((a, b) => b.logit - a.logit)
      .slice(0, 5);
    return `${firstRow + i}: ${best.map(({ token, logit }) => `${token} ${logit.toFixed(4)}`).join('  ')}`;
  });
  return `${lines.join('\n')}\n`;
}

/** @throws ConfigError */
function parseIds(flag: string, text: string): number[] {
  return text.split(',').map((part) => {
    if (!/^\d{1,9}$/.test(part.trim()))
      throw new ConfigError(`${flag}: "${part}" is no id, write whole numbers with commas, such as 5,6,7`);
    return Number(part);
  });
}
