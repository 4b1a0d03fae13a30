import { collectDefaultMetrics, Counter, Gauge, Registry } from 'prom-client';
import { packageVersion } from '../../common/package-root.js';
import { BucketHistogram } from './bucket-histogram.js';
import { EMPTY_LOOP, type LoopSnapshot } from './loop-snapshot.js';
import type { LoopObserver, RejectReason, RequestStats, StepStats } from './observer.js';
import { STEP_PARTS, stepParts, type StepPart } from './serving-stats.js';
import { SERVER_STATES, type StatusSources } from './snapshot.js';

const OUTCOMES = ['finished', 'failed', 'cancelled', 'expired'] as const satisfies readonly RequestStats['outcome'][];
const REJECT_REASONS: readonly RejectReason[] = [
  'invalid',
  'queue_full',
  'rate_limited',
  'not_ready',
  'unauthenticated',
  'forbidden',
  'too_large',
  'other',
];

const SECONDS = [
  ...[0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75],
  ...[1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 60],
];
/** A step of a tiny model takes less than a millisecond. */
const STEP_SECONDS = [0.0001, 0.0002, 0.0003, ...SECONDS];
const TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096];

/** Of prom-client's own: deprecated by Node, or gauges with the name of a counter. */
const UNWANTED = [
  'nodejs_active_handles',
  'nodejs_active_handles_total',
  'nodejs_active_requests',
  'nodejs_active_requests_total',
  'nodejs_active_resources_total',
];

/**
 * Everything that Prometheus gets. What the loop reports is added up here; what somebody else counts already is asked for when
 * it is scraped. Names are part of the interface: docs/operations.md lists them.
 */
export class Metrics implements LoopObserver {
  private readonly registry = new Registry();
  private readonly outcomes = new Map<RequestStats['outcome'], number>(OUTCOMES.map((outcome) => [outcome, 0]));
  private readonly errors = new Map<string, number>();
  private readonly rejections = new Map<RejectReason, number>(REJECT_REASONS.map((reason) => [reason, 0]));
  private readonly partSeconds = Object.fromEntries(STEP_PARTS.map((part) => [part, 0])) as Record<StepPart, number>;

  private readonly firstTokenSeconds = this.seconds('time_to_first_token', 'Arrival of a request to its first tokens');
  private readonly interTokenSeconds = this.seconds('inter_token_latency', 'Tokens of a running request to its next ones');
  private readonly endToEndSeconds = this.seconds('e2e_request_latency', 'Arrival to end of finished requests');
  private readonly queueSeconds = this.seconds('request_queue_time', 'Arrival to first step of finished requests');
  private readonly prefillSeconds = this.seconds('request_prefill_time', 'First step to first tokens of finished requests');
  private readonly decodeSeconds = this.seconds('request_decode_time', 'First tokens to end of finished requests');
  private readonly stallSeconds = this.seconds('request_stall_time', 'Time of finished requests after their first step without a step');
  private readonly promptTokens = this.histogram('request_prompt_tokens', 'Prompt tokens of finished requests', TOKENS);
  private readonly generationTokens = this.histogram(
    'request_generation_tokens',
    'Generated tokens of finished requests, all samples',
    TOKENS,
  );
  private readonly stepSeconds = this.histogram('step_seconds', 'Engine steps from schedule to emit', STEP_SECONDS);
  private readonly batchTokens = this.histogram('step_batch_tokens', 'Tokens of an engine step', TOKENS);

  /** As of the scrape that is answered. */
  private scraped: StatusSources;

  constructor(private readonly sources: () => StatusSources) {
    this.scraped = sources();
    this.addCounters();
    this.addGauges();
    this.addRankMetrics();
    collectDefaultMetrics({ register: this.registry });
    for (const name of UNWANTED) this.registry.removeSingleMetric(name);
  }

  step(step: StepStats): void {
    let totalMs = 0;
    const parts = stepParts(step);
    for (const part of STEP_PARTS) {
      totalMs += parts[part];
      this.partSeconds[part] += parts[part] / 1000;
    }
    this.stepSeconds.observe(totalMs / 1000);
    this.batchTokens.observe(step.decodeTokens + step.prefillTokens);
  }

  interToken(ms: number): void {
    this.interTokenSeconds.observe(ms / 1000);
  }

  firstToken(ms: number): void {
    this.firstTokenSeconds.observe(ms / 1000);
  }

  ended({ outcome, errorCode, timings, promptTokens, generatedTokens }: RequestStats): void {
    this.outcomes.set(outcome, this.outcomes.get(outcome)! + 1);
    if (errorCode !== null) this.errors.set(errorCode, (this.errors.get(errorCode) ?? 0) + 1);
    if (outcome !== 'finished') return; // how long an answer takes that a client did not wait for says nothing
    const { queueMs, prefillMs, decodeMs, stallMs } = timings;
    this.endToEndSeconds.observe((queueMs + prefillMs + decodeMs) / 1000);
    this.queueSeconds.observe(queueMs / 1000);
    this.prefillSeconds.observe(prefillMs / 1000);
    this.decodeSeconds.observe(decodeMs / 1000);
    this.stallSeconds.observe(stallMs / 1000);
    this.promptTokens.observe(promptTokens);
    this.generationTokens.observe(generatedTokens);
  }

  rejected(reason: RejectReason): void {
    this.rejections.set(reason, this.rejections.get(reason)! + 1);
  }

  preempted(): void {}

  async text(): Promise<{ readonly contentType: string; readonly text: string }> {
    this.scraped = this.sources();
    return { contentType: this.registry.contentType, text: await this.registry.metrics() };
  }

  private addCounters(): void {
    this.counter('requests_total', 'Requests that were accepted and have ended, by how they ended', ['outcome'], () =>
      [...this.outcomes].map(([outcome, count]) => [{ outcome }, count]),
    );
    this.counter('request_errors_total', 'Requests that ended in an error, by its code', ['code'], () =>
      [...this.errors].map(([code, count]) => [{ code }, count]),
    );
    this.counter('rejections_total', 'Requests that were refused before they were queued, by reason', ['reason'], () =>
      [...this.rejections].map(([reason, count]) => [{ reason }, count]),
    );
    this.counter('step_part_seconds_total', 'Time of engine steps by what it went into; the parts follow one another', ['part'], () =>
      Object.entries(this.partSeconds).map(([part, seconds]) => [{ part: part === 'allReduce' ? 'all_reduce' : part }, seconds]),
    );
    const plain = (name: string, help: string, read: () => number): void => this.counter(name, help, [], () => [[{}, read()]]);
    plain(
      'epochs_total',
      'Times that all ranks were given their shards: at the start, and after each loss of a rank',
      () => this.scraped.epoch,
    );
    plain('steps_total', 'Engine steps', () => this.loop.steps);
    plain('preemptions_total', 'Times that a running request gave up its KV blocks', () => this.loop.preemptions);
    plain('prompt_tokens_total', 'Prompt tokens of requests', () => this.loop.promptTokens);
    plain('generation_tokens_total', 'Generated tokens of requests', () => this.loop.generatedTokens);
    plain('cached_prompt_tokens_total', 'Prompt tokens that the context cache held already', () => this.loop.contextCache.hitTokens);
    plain('context_cache_hits_total', 'Contexts that the context cache held', () => this.loop.contextCache.hits);
    plain('context_cache_misses_total', 'Contexts that the context cache did not hold', () => this.loop.contextCache.misses);
    plain('context_cache_evictions_total', 'Contexts that had to leave the context cache', () => this.loop.contextCache.evictions);
  }

  private addGauges(): void {
    this.gauge('build_info', 'Constant 1; the labels say what runs', ['version', 'node'], () => [
      [{ version: packageVersion, node: process.version }, 1],
    ]);
    this.gauge('model_info', 'Constant 1; the labels say what model is served', ['model_name', 'weights'], () => [
      [{ model_name: this.scraped.model.name, weights: this.scraped.model.weights }, 1],
    ]);
    this.gauge('server_state', 'What the server does: 1 for its state, 0 for the others', ['state'], () =>
      SERVER_STATES.map((state) => [{ state }, state === this.scraped.state ? 1 : 0]),
    );
    this.gauge(
      'cache_config_info',
      'Constant 1; the labels give the tokens of a KV block and the blocks',
      ['block_size', 'num_blocks'],
      () => [[{ block_size: this.loop.kv.blockSize, num_blocks: this.loop.kv.totalBlocks }, 1]],
    );
    this.gauge('kv_blocks', 'KV blocks: held by requests, by the context cache alone, by nobody', ['state'], () => [
      [{ state: 'used' }, this.loop.kv.usedBlocks],
      [{ state: 'cached' }, this.loop.kv.cachedBlocks],
      [{ state: 'free' }, this.loop.kv.freeBlocks],
    ]);
    const plain = (name: string, help: string, read: () => number): void => this.gauge(name, help, [], () => [[{}, read()]]);
    plain('num_requests_waiting', 'Requests in the queue', () => this.loop.queued);
    plain('num_requests_running', 'Requests that are being served', () => this.loop.running);
    plain('kv_cache_usage_ratio', 'KV blocks held by requests, of all: 1 is full', () =>
      this.loop.kv.totalBlocks === 0 ? 0 : this.loop.kv.usedBlocks / this.loop.kv.totalBlocks,
    );
    plain('queued_prompt_tokens', 'Prompt tokens of the requests in the queue', () => this.loop.queuedTokens);
    plain('kv_capacity_blocks', 'All KV blocks: used, cached and free', () => this.loop.kv.totalBlocks);
    plain('kv_used_peak_blocks', 'KV blocks held by requests, at most since the start', () => this.loop.kv.peakUsedBlocks);
    plain('context_cache_contexts', 'Contexts in the context cache', () => this.loop.contextCache.contexts);
  }

  private addRankMetrics(): void {
    this.gauge('rank_up', '1: the rank is loaded and answers', ['rank'], () =>
      this.scraped.ranks.map(({ rank, state }) => [{ rank }, state === 'ready' ? 1 : 0]),
    );
    this.gauge('rank_heartbeat_age_seconds', 'Time since the rank was last heard of; absent ranks have none', ['rank'], () =>
      this.scraped.ranks.filter(({ state }) => state !== 'absent').map(({ rank, heartbeatAgeMs }) => [{ rank }, heartbeatAgeMs / 1000]),
    );
    this.gauge('rank_memory_bytes', 'Memory of a rank by kind; resident is of the whole process', ['rank', 'kind'], () =>
      this.scraped.ranks.flatMap(({ rank, memory }) => [
        [{ rank, kind: 'weights' }, memory.weightBytes],
        [{ rank, kind: 'kv' }, memory.kvBytes],
        [{ rank, kind: 'workspace' }, memory.workspaceBytes],
        [{ rank, kind: 'resident' }, memory.rssBytes],
      ]),
    );
    this.counter('rank_restarts_total', 'Times that the process of a rank was started again', ['rank'], () =>
      this.scraped.ranks.map(({ rank }) => [{ rank }, this.scraped.restarts(rank)]),
    );
    this.counter('rank_compute_seconds_total', 'Time of a rank in engine steps, collectives included', ['rank'], () =>
      this.scraped.stats.ranks.map(({ computeSeconds }, rank) => [{ rank }, computeSeconds]),
    );
    this.counter('rank_collective_wait_seconds_total', 'Time of a rank in collectives, waiting for others included', ['rank'], () =>
      this.scraped.stats.ranks.map(({ collectiveSeconds }, rank) => [{ rank }, collectiveSeconds]),
    );
  }

  private get loop(): LoopSnapshot {
    return this.scraped.loop ?? EMPTY_LOOP;
  }

  private seconds(name: string, help: string): BucketHistogram {
    return this.histogram(`${name}_seconds`, help, SECONDS);
  }

  private histogram(name: string, help: string, bounds: readonly number[]): BucketHistogram {
    return new BucketHistogram(`tandem_${name}`, help, bounds, this.registry);
  }

  private counter(name: string, help: string, labelNames: readonly string[], read: () => Values): void {
    new Counter({
      ...{ name: `tandem_${name}`, help, labelNames, registers: [this.registry] },
      collect() {
        this.reset();
        for (const [labels, value] of read()) this.inc(labels, value);
      },
    });
  }

  private gauge(name: string, help: string, labelNames: readonly string[], read: () => Values): void {
    new Gauge({
      ...{ name: `tandem_${name}`, help, labelNames, registers: [this.registry] },
      collect() {
        this.reset();
        for (const [labels, value] of read()) this.set(labels, value);
      },
    });
  }
}

type Values = readonly (readonly [labels: Readonly<Record<string, string | number>>, value: number])[];
