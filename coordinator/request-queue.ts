import { QueueFullError, RateLimitedError } from '../common/errors.js';
import { type ActiveRequest, insertByRank } from './active-request.js';
import type { Job } from './job.js';
import { MovingRate } from './scheduler/moving-rate.js';
import type { KeyShare } from './scheduler/schedule.js';
import { TokenBucket } from './scheduler/token-bucket.js';

export interface QueueLimits {
  readonly maxQueuedRequests: number;
  readonly maxQueuedTokens: number;
  readonly maxStreamsPerKey: number;
  /** 0: any. */
  readonly maxTokensPerMinute: number;
}

/** What is known of an API key. */
export interface KeyState extends KeyShare {
  readonly name: string;
  weight: number;
  /** Virtual token counter. */
  counter: number;
  /** Highest priority first, then oldest. */
  readonly queue: ActiveRequest[];
  /** Requests that wait or run. */
  streams: number;
  bucket: TokenBucket | null;
}

const LEAST_RETRY_MS = 1000;
const MOST_RETRY_MS = 60_000;
const RATE_WINDOW_MS = 10_000;
/** Keys come from a file, so there are few; but those that were taken out of it need not stay for ever. */
const MOST_IDLE_KEYS = 1000;

/** The requests that wait, by API key, and what every key has had: who may come in, and who is next. */
export class RequestQueue {
  readonly keys = new Map<string, KeyState>();
  private waitingRequests = 0;
  private waitingTokens = 0;
  private lastAdmitted: KeyState | null = null;
  /** How fast the backlog goes, measured while there are steps. */
  private readonly endRate = new MovingRate(RATE_WINDOW_MS);
  private busyMs = 0;

  constructor(private readonly limits: QueueLimits) {}

  get requests(): number {
    return this.waitingRequests;
  }

  /** Of the prompts of all that wait. */
  get tokens(): number {
    return this.waitingTokens;
  }

  /** Of the keys that have any, each with the highest priority first, then the oldest. */
  get queues(): readonly (readonly ActiveRequest[])[] {
    const queues: ActiveRequest[][] = [];
    if (this.waitingRequests > 0) for (const { queue } of this.keys.values()) if (queue.length > 0) queues.push(queue);
    return queues;
  }

  keyOf({ caller }: Job<unknown>, nowMs: number): KeyState {
    const perMinute = Math.min(caller.maxTokensPerMinute ?? Infinity, this.limits.maxTokensPerMinute || Infinity);
    let key = this.keys.get(caller.name);
    if (!key) this.keys.set(caller.name, (key = { name: caller.name, weight: 1, counter: 0, queue: [], streams: 0, bucket: null }));
    key.weight = caller.weight;
    if (key.bucket?.perMinute !== perMinute) key.bucket = perMinute === Infinity ? null : new TokenBucket(perMinute, nowMs);
    return key;
  }

  /** @throws RateLimitedError, QueueFullError */
  check({ caller, promptTokens }: Job<unknown>, key: KeyState, nowMs: number): void {
    const { limits } = this;
    const maxStreams = Math.min(caller.maxStreams ?? Infinity, limits.maxStreamsPerKey);
    if (key.streams >= maxStreams) {
      throw new RateLimitedError(
        `${of(key)} has ${key.streams} requests under way, allowed are ${maxStreams}: wait for one to end`,
        this.retryAfterMs(1),
      );
    }
    const waitMs = key.bucket?.waitMs(promptTokens, nowMs) ?? 0;
    if (waitMs > 0) {
      throw new RateLimitedError(
        `${of(key)} has used up its ${key.bucket!.perMinute} tokens per minute, the prompt has ${promptTokens}: try again in ${Math.ceil(waitMs / 1000)} s`,
        waitMs,
      );
    }
    const retryMs = this.retryAfterMs(this.waitingRequests);
    const retry = `try again in ${Math.ceil(retryMs / 1000)} s`;
    if (this.waitingRequests >= limits.maxQueuedRequests) {
      throw new QueueFullError(
        `${this.waitingRequests} requests are waiting, the queue takes ${limits.maxQueuedRequests}: ${retry}`,
        retryMs,
      );
    }
    if (this.waitingRequests > 0 && this.waitingTokens + promptTokens > limits.maxQueuedTokens) {
      throw new QueueFullError(
        `prompts of ${this.waitingTokens} tokens are waiting, the queue takes ${limits.maxQueuedTokens} and this one has ${promptTokens}: ${retry}`,
        retryMs,
      );
    }
  }

  /** A request that was checked comes in. */
  take(request: ActiveRequest, key: KeyState): void {
    if (key.queue.length === 0) this.activate(key);
    key.streams += 1;
    key.bucket?.take(request.job.promptTokens, request.arrivalMs);
    this.enqueue(request);
  }

  enqueue(request: ActiveRequest): void {
    insertByRank(this.keys.get(request.key)!.queue, request);
    request.state = 'waiting';
    this.waitingRequests += 1;
    this.waitingTokens += request.job.promptTokens;
  }

  dequeue(request: ActiveRequest): void {
    const { queue } = this.keys.get(request.key)!;
    queue.splice(queue.indexOf(request), 1);
    this.waitingRequests -= 1;
    this.waitingTokens -= request.job.promptTokens;
  }

  /** It leaves the queue and runs. */
  admit(request: ActiveRequest): void {
    this.dequeue(request);
    this.lastAdmitted = this.keys.get(request.key)!;
  }

  /** A request that neither waits nor runs any more. */
  ended({ key: name }: ActiveRequest): void {
    const key = this.keys.get(name)!;
    key.streams -= 1;
    this.forgetIfIdle(key);
    this.endRate.count(this.busyMs);
  }

  /** Keys come and go. */
  forgetIfIdle(key: KeyState): void {
    if (key.streams === 0 && !key.bucket && this.keys.size > MOST_IDLE_KEYS) this.keys.delete(key.name);
  }

  /** A step took so long. */
  stepped(ms: number): void {
    this.busyMs += ms;
  }

  charge(charges: ReadonlyMap<string, number>): void {
    for (const [name, charge] of charges) {
      const key = this.keys.get(name); // its last request may have failed just now
      if (key) key.counter += charge;
    }
  }

  generated({ key }: ActiveRequest, tokens: number, nowMs: number): void {
    this.keys.get(key)!.bucket?.take(tokens, nowMs);
  }

  /** When so many requests will have left, as fast as they do now. */
  private retryAfterMs(requests: number): number {
    const perMs = this.endRate.at(this.busyMs);
    return Math.min(MOST_RETRY_MS, Math.max(LEAST_RETRY_MS, perMs > 0 ? requests / perMs : 0));
  }

  /** A key that did not want more has no claim to what it did not use: its counter begins at the lowest of those who wait, or who was served last. */
  private activate(key: KeyState): void {
    let lowest = Infinity;
    for (const each of this.keys.values()) if (each.queue.length > 0) lowest = Math.min(lowest, each.counter);
    if (lowest === Infinity) lowest = this.lastAdmitted?.counter ?? 0;
    key.counter = Math.max(key.counter, lowest);
  }
}

function of({ name }: KeyState): string {
  return name === '' ? 'this server' : `key ${name}`;
}
