import { createWriteStream, readFileSync, type WriteStream } from 'node:fs';
import { once } from 'node:events';
import { status } from '@grpc/grpc-js';
import type { CommandModule } from 'yargs';
import { ConfigError } from '../../common/errors.js';
import { connect, type Credentials } from '../client.js';
import { type ConnectionArgs, connectionOptions, toCredentials } from '../connection-options.js';
import { isServiceError } from '../describe-error.js';
import { interruptible } from '../interrupt.js';
import { parseArrivals } from '../load/arrivals.js';
import { parseDistribution } from '../load/distribution.js';
import { grpcTarget } from '../load/grpc-target.js';
import { firstModel, httpTarget } from '../load/http-target.js';
import { formatReport, toReport } from '../load/report.js';
import { runLoad, type LoadProgress, type Pace } from '../load/run-load.js';
import { parseSlo } from '../load/slo.js';
import { e2eMs, summarize, tpotMs, ttftMs, type RequestRecord } from '../load/summary.js';
import type { LoadTarget, RequestShape } from '../load/target.js';
import type { PlannedRequest, PromptSource } from '../load/workload.js';
import { decimalNumber, wholeNumber } from '../number-option.js';
import { DEFAULT_ADDRESS } from '../default-address.js';

const MODES = ['fill-blanks', 'mask', 'gmask', 'unidirectional'] as const;
const DEFAULT_REQUESTS = 100;
const DEFAULT_CONCURRENCY = 8;
/** Masks, `<sop>` and the `</s>` that a prompt may get. */
const ADDED_TOKENS = 4;

interface LoadArgs extends ConnectionArgs {
  address: string;
  http: string | undefined;
  httpModel: string | undefined;
  httpBody: string;
  connections: number;
  concurrency: number | undefined;
  rate: number | undefined;
  arrivals: string;
  requests: number | undefined;
  durationS: number | undefined;
  warmUp: number;
  promptTokens: string;
  outputTokens: string;
  prompts: string | undefined;
  tokenRange: string | undefined;
  sharedContexts: number;
  uniquePrompts: number | undefined;
  mode: (typeof MODES)[number];
  temperature: number;
  beams: number;
  stopAtEnd: boolean;
  cancelFraction: number;
  keys: string | undefined;
  priority: number;
  timeoutMs: number;
  seed: number;
  slo: string | undefined;
  record: string | undefined;
  json: boolean;
}

export const loadCommand: CommandModule<unknown, LoadArgs> = {
  command: 'load',
  describe: 'Put load on a running server and report its latencies and throughput',
  builder: (yargs) =>
    yargs
      .option('address', { type: 'string', default: DEFAULT_ADDRESS, describe: 'The server (gRPC): host:port or unix:/path' })
      .option('http', { type: 'string', describe: "Instead: http://host:port, OpenAI's completions as a stream" })
      .option('http-model', { type: 'string', describe: 'With --http: the name of the model (default: the first that the server has)' })
      .option('http-body', { type: 'string', default: '{}', describe: 'With --http: a JSON object whose fields are added to every body' })
      .option('connections', wholeNumber('connections', { min: 1, default: 1, describe: 'gRPC connections that requests are spread over' }))
      .option(
        'concurrency',
        wholeNumber('concurrency', {
          min: 1,
          describe: `Closed loop: clients that each send their next request when the last one has ended (default: ${DEFAULT_CONCURRENCY})`,
        }),
      )
      .option('rate', decimalNumber('rate', { describe: 'Open loop: requests per second, not slowed by the server' }))
      .option('arrivals', {
        type: 'string',
        default: 'poisson',
        describe: 'With --rate: poisson, constant or gamma:BURSTINESS (below 1 in bursts)',
      })
      .option(
        'requests',
        wholeNumber('requests', { min: 1, describe: `Requests to send (default: ${DEFAULT_REQUESTS}, without end with --duration-s)` }),
      )
      .option('duration-s', decimalNumber('duration-s', { describe: 'Seconds after which none is sent any more' }))
      .option('warm-up', wholeNumber('warm-up', { min: 0, default: 0, describe: 'Requests before, left out of all figures' }))
      .option('prompt-tokens', {
        type: 'string',
        default: '64',
        describe: 'Tokens of a prompt: a number, uniform:LOW:HIGH or lognormal:MEAN:DEVIATION',
      })
      .option('output-tokens', { type: 'string', default: '64', describe: 'Tokens to generate, in the same way' })
      .option('prompts', { type: 'string', describe: 'File with one text per line, instead of random tokens' })
      .option('token-range', { type: 'string', describe: 'LOW:HIGH, the ids of random tokens (default: text tokens of the model)' })
      .option(
        'shared-contexts',
        wholeNumber('shared-contexts', {
          min: 0,
          default: 0,
          describe: 'Different prompts that requests share: hits of the context cache',
        }),
      )
      .option(
        'unique-prompts',
        decimalNumber('unique-prompts', { describe: 'Share of requests with a prompt of their own (default: 0 with --shared-contexts)' }),
      )
      .option('mode', { choices: MODES, requiresArg: true, default: 'gmask', describe: 'How the context is built from the prompt' })
      .option('temperature', decimalNumber('temperature', { default: 0, describe: 'Of the sampling; 0 is greedy' }))
      .option('beams', wholeNumber('beams', { min: 0, default: 0, describe: 'Beam search with so many beams; 0: sampling' }))
      .option('stop-at-end', {
        type: 'boolean',
        default: false,
        describe: 'Let the model end its outputs; else they are as long as --output-tokens says',
      })
      .option(
        'cancel-fraction',
        decimalNumber('cancel-fraction', { default: 0, describe: 'Share of requests whose client leaves in mid-stream' }),
      )
      .options(connectionOptions())
      .option('keys', { type: 'string', describe: 'File with one API key per line, taken in turn' })
      .option('priority', decimalNumber('priority', { default: 0, describe: 'Of all requests; higher goes first' }))
      .option('timeout-ms', wholeNumber('timeout-ms', { min: 0, default: 0, describe: 'Of each request; 0: none' }))
      .option('seed', wholeNumber('seed', { min: 0, default: 1, describe: 'The same seed gives the same requests' }))
      .option('slo', { type: 'string', describe: 'What a good request keeps to, such as ttft=200ms,tpot=50ms,e2e=3s' })
      .option('record', { type: 'string', describe: 'File to write: one JSON line for each request, with its times and tokens' })
      .option('json', { type: 'boolean', default: false, describe: 'Print JSON' }) as never,
  async handler(args) {
    checkArgs(args);
    const slo = args.slo === undefined ? null : parseSlo(args.slo);
    const pace = toPace(args);
    const keys = args.keys === undefined ? null : readList('keys', args.keys);
    const credentials = toCredentials(args);
    const prompts =
      args.prompts === undefined
        ? await randomPrompts(args, keys ? { ...credentials, apiKey: keys[0]! } : credentials)
        : textPrompts(args.prompts);
    const workload = {
      seed: args.seed,
      prompts,
      outputTokens: parseDistribution('output-tokens', args.outputTokens),
      cancelFraction: args.cancelFraction,
      keys: keys ?? (credentials.apiKey === null ? [] : [credentials.apiKey]),
    };
    const target = await toTarget(args, credentials, workload.keys[0] ?? null);
    const record = args.record === undefined ? null : await openRecord(args.record);
    const showsProgress = process.stderr.isTTY;
    await interruptible(async (signal) => {
      try {
        const result = await runLoad({
          target,
          workload,
          pace,
          requests: args.requests ?? (args.durationS === undefined ? DEFAULT_REQUESTS : null),
          durationMs: args.durationS === undefined ? null : args.durationS * 1000,
          warmUp: args.warmUp,
          signal,
          ...(showsProgress ? { onProgress: showProgress } : {}),
          ...(record ? { onTokens: (...ended) => void record.write(`${JSON.stringify(recordLine(...ended))}\n`) } : {}),
        });
        if (showsProgress) process.stderr.write('\r\x1b[K');
        const report = toReport({ target: args.http ?? args.address, load: describePace(pace) }, result, summarize(result.records, slo));
        process.stdout.write(args.json ? `${JSON.stringify(report, null, 2)}\n` : formatReport(report));
        if (report.requests.finished === 0 && !signal.aborted) process.exitCode = 1;
      } finally {
        target.close();
        if (record) await once(record.end(), 'close');
      }
    });
  },
};

/** @throws ConfigError */
function checkArgs(args: LoadArgs): void {
  const inRange = (flag: string, value: number | undefined, low: number, high: number): void => {
    if (value !== undefined && !(value >= low && value <= high)) {
      throw new ConfigError(`--${flag} ${value}: a number from ${low} to ${high} is needed`);
    }
  };
  inRange('rate', args.rate, 0.001, 1_000_000);
  inRange('duration-s', args.durationS, 0.001, 1_000_000);
  inRange('unique-prompts', args.uniquePrompts, 0, 1);
  inRange('cancel-fraction', args.cancelFraction, 0, 1);
  inRange('temperature', args.temperature, 0, 1000);
  inRange('priority', args.priority, -100, 100);
  if (!Number.isInteger(args.priority)) throw new ConfigError(`--priority ${args.priority}: a whole number is needed`);
  const refuse = (flag: string, other: string, why: string): void => {
    throw new ConfigError(`--${flag} and --${other}: ${why}, leave one out`);
  };
  if (args.rate !== undefined && args.concurrency !== undefined) refuse('rate', 'concurrency', 'a loop is open or closed');
  if (args.apiKey !== undefined && args.keys !== undefined) refuse('api-key', 'keys', 'both name the keys');
  if (args.prompts !== undefined && args.sharedContexts > 0)
    refuse('prompts', 'shared-contexts', 'the lines of the file are what is shared');
  if (args.uniquePrompts !== undefined && args.sharedContexts === 0) {
    throw new ConfigError('--unique-prompts: only with --shared-contexts are there prompts that are not unique');
  }
  if (args.http === undefined) return;
  if (args.mode !== 'gmask') refuse('http', 'mode', "OpenAI's completions have no modes");
  if (args.beams > 0) refuse('http', 'beams', "OpenAI's completions have no beams");
  if (args.priority !== 0) refuse('http', 'priority', "OpenAI's completions have no priorities");
  if (args.prompts === undefined && args.tokenRange === undefined) {
    throw new ConfigError('--http: say what prompts are made of, with --prompts FILE or --token-range LOW:HIGH');
  }
}

function toPace({ rate, arrivals, concurrency }: LoadArgs): Pace {
  const kind = parseArrivals(arrivals);
  return rate === undefined ? { kind: 'closed', concurrency: concurrency ?? DEFAULT_CONCURRENCY } : { kind: 'open', rate, arrivals: kind };
}

function describePace(pace: Pace): string {
  return pace.kind === 'closed'
    ? `closed loop of ${pace.concurrency} clients`
    : `open loop of ${pace.rate} requests/s (${pace.arrivals.kind === 'gamma' ? `gamma:${pace.arrivals.burstiness}` : pace.arrivals.kind})`;
}

async function toTarget(args: LoadArgs, { tls }: Credentials, key: string | null): Promise<LoadTarget> {
  const { mode, temperature, seed, beams, priority, timeoutMs, stopAtEnd } = args;
  const shape: RequestShape = { mode, temperature, seed, beams, priority, timeoutMs, stopsAtEnd: stopAtEnd };
  if (args.http === undefined) return grpcTarget({ address: args.address, connections: args.connections, tls, shape });
  const server = { url: args.http, tls };
  const extraBody = parseBody(args.httpBody);
  return httpTarget({ ...server, model: args.httpModel ?? (await firstModel(server, key)), extraBody, shape });
}

/** @throws ConfigError */
function parseBody(text: string): Record<string, unknown> {
  let body: unknown = null;
  try {
    body = JSON.parse(text);
  } catch {
    // said below
  }
  if (typeof body === 'object' && body !== null && !Array.isArray(body)) return body as Record<string, unknown>;
  throw new ConfigError(`--http-body ${text}: a JSON object is needed, such as {"top_p":0.9}`);
}

/** @throws ConfigError */
function textPrompts(path: string): PromptSource {
  return { kind: 'texts', texts: readList('prompts', path) };
}

/** @throws ConfigError */
async function randomPrompts(args: LoadArgs, credentials: Credentials): Promise<PromptSource> {
  const lengths = parseDistribution('prompt-tokens', args.promptTokens);
  const given = args.tokenRange === undefined ? null : parseRange(args.tokenRange);
  const { low, high, maxTokens } =
    args.http === undefined ? await askModel(args.address, credentials, given) : { ...given!, maxTokens: null };
  const uniqueFraction = args.uniquePrompts ?? 0;
  return { kind: 'ids', lengths, low, high, maxTokens, sharedContexts: args.sharedContexts, uniqueFraction };
}

interface TokenRange {
  readonly low: number;
  readonly high: number;
}

/**
 * What random prompts may be made of. Special tokens follow the text tokens in every GLM tokenizer, and what is not text (image tokens,
 * control tokens) comes before them within the first quarter.
 * @throws ConfigError where the server does not tell
 */
async function askModel(
  address: string,
  credentials: Credentials,
  given: TokenRange | null,
): Promise<TokenRange & { readonly maxTokens: number | null }> {
  const client = await connect(address, credentials);
  try {
    const { vocabSize, maxSequenceLength, hasTokenizer } = (await client.status()).model!;
    const [mask = null] = hasTokenizer && !given ? await client.tokenize('[MASK]', true) : [];
    const high = mask === null ? Math.floor(vocabSize * WITHOUT_SPECIALS) : mask - 1;
    return { low: Math.floor(high / 4), high, ...given, maxTokens: maxSequenceLength - ADDED_TOKENS };
  } catch (error) {
    const isRefused = isServiceError(error) && [status.UNAUTHENTICATED, status.PERMISSION_DENIED].includes(error.code);
    if (!isRefused) throw error;
    if (given) return { ...given, maxTokens: null };
    throw new ConfigError('the server does not tell this caller what its tokens are: give --token-range LOW:HIGH');
  } finally {
    client.close();
  }
}

/** Part of a vocabulary that has no special tokens, where there is no tokenizer to ask. */
const WITHOUT_SPECIALS = 0.85;

/** @throws ConfigError */
function parseRange(text: string): TokenRange {
  const { low, high } = /^(?<low>\d{1,9}):(?<high>\d{1,9})$/.exec(text)?.groups ?? {};
  if (low === undefined || Number(low) > Number(high)) throw new ConfigError(`--token-range ${text}: write LOW:HIGH, both included`);
  return { low: Number(low), high: Number(high) };
}

/** Lines that are not empty. @throws ConfigError */
function readList(flag: string, path: string): string[] {
  const lines = readFileSync(path, 'utf8')
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '');
  if (lines.length === 0) throw new ConfigError(`--${flag} ${path}: the file is empty`);
  return lines;
}

async function openRecord(path: string): Promise<WriteStream> {
  const stream = createWriteStream(path);
  await once(stream, 'open');
  return stream;
}

function recordLine(record: RequestRecord, request: PlannedRequest, tokens: readonly number[]) {
  const { index, outcome, error, intendedMs, promptTokens, outputTokens, tokenTimesMs } = record;
  return {
    index,
    outcome,
    ...(error ? { code: error.code } : {}),
    intendedUnixMs: performance.timeOrigin + intendedMs,
    ...{ promptTokens, outputTokens },
    ttftMs: ttftMs(record),
    tpotMs: tpotMs(record),
    e2eMs: e2eMs(record),
    tokenTimesMs: tokenTimesMs.map((ms) => ms - intendedMs),
    prompt: request.prompt,
    tokens,
  };
}

function showProgress({ isWarmUp, sent, ended, failed, elapsedMs }: LoadProgress): void {
  const what = isWarmUp ? 'warm-up: ' : '';
  process.stderr.write(
    `\r\x1b[K${what}${ended} ended, ${sent - ended} under way${failed > 0 ? `, ${failed} failed` : ''}, ${(elapsedMs / 1000).toFixed(0)} s`,
  );
}
