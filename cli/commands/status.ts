import type { CommandModule } from 'yargs';
import type { LatencyStatus__Output } from '../../proto/generated/tandem/v1/LatencyStatus.js';
import type { Percentiles__Output } from '../../proto/generated/tandem/v1/Percentiles.js';
import type { Status__Output } from '../../proto/generated/tandem/v1/Status.js';
import { connect } from '../client.js';
import { type ConnectionArgs, connectionOptions, toCredentials } from '../connection-options.js';
import { formatBytes, formatCount, formatDuration, formatMs, formatTable, formatWorkerState } from '../format.js';
import { printable } from '../terminal/text.js';
import { DEFAULT_ADDRESS } from '../default-address.js';

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
  const { model, kv, requests, totals, rates, step, contextCache, workers } = status;
  const parts = [
    ...[`${formatMs(step!.schedule)} schedule`, `${formatMs(step!.wire)} wire`, `${formatMs(step!.compute)} compute`],
    ...[`${formatMs(step!.allReduce)} all-reduce`, `${formatMs(step!.sample)} sample`, `${formatMs(step!.emit)} emit`],
  ];
  const lines = [
    `tandem ${status.version}: ${status.state}, up ${formatDuration(status.uptimeSeconds)}, epoch ${status.epoch}`,
    ...(status.reason ? [`reason    ${printable(status.reason)}`] : []),
    `model     ${model!.name}: ${printable(model!.path)} (${model!.weights}, ${model!.numLayers} layers, hidden ${model!.hiddenSize}, vocabulary ${model!.vocabSize}, context ${model!.maxSequenceLength})`,
    `requests  ${requests!.running} running, ${requests!.queued} queued (${requests!.queuedTokens} prompt tokens), ${requests!.finished} finished, ${requests!.failed} failed, ${requests!.cancelled} cancelled, ${requests!.expired} expired, ${requests!.rejected} rejected, ${requests!.preemptions} preempted`,
    `rates     ${formatCount(rates!.generatedTokensPerSecond)} generated and ${formatCount(rates!.promptTokensPerSecond)} prompt tokens, ${formatCount(rates!.requestsPerSecond)} requests, ${formatCount(rates!.stepsPerSecond)} steps a second`,
    `step      ${formatMs(step!.total)}: ${parts.join(', ')}; ${formatCount(step!.batchTokens)} tokens in ${formatCount(step!.batchExtends)} sequences`,
    `KV        ${kv!.usedBlocks} used, ${kv!.cachedBlocks} cached and ${kv!.freeBlocks} free of ${kv!.totalBlocks} blocks of ${kv!.blockSize} tokens, at most ${kv!.peakUsedBlocks} used`,
    `cache     ${contextCache!.contexts} contexts in at most ${contextCache!.maxBlocks} blocks, ${contextCache!.hits} hits (${contextCache!.hitTokens} tokens), ${contextCache!.misses} misses, ${contextCache!.evictions} evictions`,
    `totals    ${totals!.steps} steps, ${totals!.promptTokens} prompt and ${totals!.generatedTokens} generated tokens, ${totals!.stepSeconds.toFixed(2)} s in steps, of which ${totals!.collectiveSeconds.toFixed(2)} s in collectives`,
    '',
    latencyTable(status.latency!),
    '',
    formatTable(
      ['rank', 'pid', 'state', 'device', 'weights', 'KV', 'workspace', 'resident', 'compute', 'collectives', 'heartbeat', 'restarts'],
      workers.map((worker) => [
        String(worker.rank),
        String(worker.pid),
        formatWorkerState(worker),
        `${printable(worker.device)} ${worker.isa} x${worker.threads}`,
        formatBytes(worker.weightBytes),
        formatBytes(worker.kvBytes),
        formatBytes(worker.workspaceBytes),
        formatBytes(worker.rssBytes),
        `${worker.computeSeconds.toFixed(2)} s`,
        `${worker.collectiveSeconds.toFixed(2)} s`,
        `${worker.heartbeatAgeSeconds.toFixed(1)} s ago`,
        String(worker.restarts),
      ]),
    ),
  ];
  return `${lines.join('\n')}\n`;
}

function latencyTable({ timeToFirstToken, interToken, queue, endToEnd }: LatencyStatus__Output): string {
  const row = (name: string, { p50, p90, p99, count }: Percentiles__Output): string[] => [
    name,
    ...[p50, p90, p99].map((ms) => (count === 0 ? '-' : formatMs(ms))),
    String(count),
  ];
  return formatTable(
    ['last minute', 'p50', 'p90', 'p99', 'count'],
    [row('first token', timeToFirstToken!), row('next token', interToken!), row('in queue', queue!), row('end to end', endToEnd!)],
  );
}
