import type { CommandModule } from 'yargs';
import type { Status__Output } from '../../proto/generated/tandem/v1/Status.js';
import { connect } from '../client.js';
import { type ConnectionArgs, connectionOptions, toCredentials } from '../connection-options.js';
import { formatBytes, formatTable } from '../format.js';
import { DEFAULT_ADDRESS } from './serve.js';

interface StatusArgs extends ConnectionArgs {
  address: string;
  json: boolean;
}

export const statusCommand: CommandModule<unknown, StatusArgs> = {
  command: 'status',
  describe: 'Show what a running server does',
  builder: (yargs) =>
    yargs
      .option('address', { type: 'string', default: DEFAULT_ADDRESS, describe: 'The server: host:port or unix:/path' })
      .option('json', { type: 'boolean', default: false, describe: 'Print JSON' })
      .options(connectionOptions()) as never,
  async handler({ address, json, ...connection }) {
    const client = await connect(address, toCredentials(connection));
    try {
      const status = await client.status();
      process.stdout.write(json ? `${JSON.stringify(status, null, 2)}\n` : formatStatus(status));
    } finally {
      client.close();
    }
  },
};

function formatStatus(status: Status__Output): string {
  const { model, kv, requests, totals } = status;
  const lines = [
    `tandem ${status.version}: ${status.state}, up ${status.uptimeSeconds.toFixed(0)} s, epoch ${status.epoch}`,
    `model     ${model!.path} (${model!.weights}, ${model!.numLayers} layers, hidden ${model!.hiddenSize}, vocabulary ${model!.vocabSize})`,
    `requests  ${requests!.running} running, ${requests!.queued} queued, ${requests!.finished} finished, ${requests!.failed} failed, ${requests!.cancelled} cancelled`,
    `KV        ${kv!.usedBlocks} of ${kv!.totalBlocks} blocks of ${kv!.blockSize} tokens used, at most ${kv!.peakUsedBlocks}, ${kv!.cachedBlocks} cached`,
    `totals    ${totals!.steps} steps, ${totals!.promptTokens} prompt and ${totals!.generatedTokens} generated tokens, ${totals!.stepSeconds.toFixed(2)} s in steps, of which ${totals!.collectiveSeconds.toFixed(2)} s in collectives`,
    '',
    formatTable(
      ['rank', 'pid', 'state', 'device', 'weights', 'KV', 'workspace', 'resident', 'heartbeat', 'restarts'],
      status.workers.map((worker) => [
        String(worker.rank),
        String(worker.pid),
        worker.state,
        `${worker.device} ${worker.isa} x${worker.threads}`,
        formatBytes(worker.weightBytes),
        formatBytes(worker.kvBytes),
        formatBytes(worker.workspaceBytes),
        formatBytes(worker.rssBytes),
        `${worker.heartbeatAgeSeconds.toFixed(1)} s ago`,
        String(worker.restarts),
      ]),
    ),
  ];
  return `${lines.join('\n')}\n`;
}
