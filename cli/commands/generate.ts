import { accessSync, constants, createReadStream, mkdirSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { addAbortSignal } from 'node:stream';
import { status } from '@grpc/grpc-js';
import type { CommandModule, Options } from 'yargs';
import { ConfigError, InvalidRequestError } from '../../common/errors.js';
import type { Delta__Output } from '../../proto/generated/tandem/v1/Delta.js';
import type { Finish__Output } from '../../proto/generated/tandem/v1/Finish.js';
import type { TokenLogprob__Output } from '../../proto/generated/tandem/v1/TokenLogprob.js';
import { answerView } from '../answer-view.js';
import { connect, type TandemClient } from '../client.js';
import { type ConnectionArgs, connectionOptions, toCredentials } from '../connection-options.js';
import { describeError, isServiceError } from '../describe-error.js';
import { inLineTerms, isSeed, parseInputLine, toWireRequest, type GenerateParams, type PromptInput } from '../input-line.js';
import { interruptible } from '../interrupt.js';
import { startLocalCluster } from '../local-cluster.js';
import { type EngineArgs, localEngineFlags, engineOptions } from '../engine-options.js';
import { decimalNumber, wholeNumber } from '../number-option.js';
import { readLines } from '../read-lines.js';

interface GenerateArgs extends ConnectionArgs, EngineArgs {
  address: string | undefined;
  model: string | undefined;
  worldSize: number;
  threads: number;
  inputSource: string;
  withId: boolean;
  outputPath: string | undefined;
  printAllBeams: boolean;
  json: boolean;
  mode: string;
  outSeqLength: number;
  maxNewTokens: number;
  minGenLength: number;
  samplingStrategy: string;
  numBeams: number;
  lengthPenalty: number;
  noRepeatNgramSize: number;
  deterministic: boolean;
  topK: number;
  topP: number;
  temperature: number;
  seed: string;
  n: number;
  stop: string[];
}

const INPUT = 'Input and output:';
const GENERATION = 'Generation:';
const CONNECTION = 'To the server at --address:';
const SERVER = 'A server of its own, where no --address is given:';

export const generateCommand: CommandModule<unknown, GenerateArgs> = {
  command: 'generate',
  describe: 'Fill blanks and continue text, interactively or line by line from a file',
  builder: (yargs) =>
    yargs
      .options({
        'input-source': {
          ...{ group: INPUT, type: 'string', default: 'interactive' },
          describe: '"interactive", or a file with one text or JSON object per line',
        },
        'with-id': { group: INPUT, type: 'boolean', default: false, describe: 'Lines are id<TAB>text' },
        'output-path': { group: INPUT, type: 'string', describe: 'Folder that gets a file with the answers of each line' },
        'print-all-beams': { group: INPUT, type: 'boolean', default: false, describe: 'Beam search: all beams with their scores' },
        json: { group: INPUT, type: 'boolean', default: false, describe: 'Print one JSON object per input line' },
        address: { group: INPUT, type: 'string', describe: 'A running server: host:port or unix:/path (default: one of its own)' },
      })
      .options({
        mode: {
          ...{ group: GENERATION, choices: ['fill-blanks', 'mask', 'gmask', 'unidirectional'], requiresArg: true, default: 'fill-blanks' },
          describe: 'How the context is built; fill-blanks is what generate.py does',
        },
        'out-seq-length': whole('out-seq-length', 256, 'Most tokens of a row, the context included'),
        'max-new-tokens': whole('max-new-tokens', 0, 'Most new tokens of one blank (0: no limit of its own)'),
        'min-gen-length': whole('min-gen-length', 0, 'New tokens of a blank before it may end'),
        temperature: decimal('temperature', 1, '0 is greedy'),
        'top-k': whole('top-k', 0, 'Sample from the k most likely tokens (0: all)'),
        'top-p': decimal('top-p', 0, 'Sample from the most likely tokens whose probabilities exceed p (0: all)'),
        seed: { group: GENERATION, type: 'string', default: '1234', describe: '0 to 2^64 - 1; the same seed gives the same answer' },
        n: whole('n', 1, 'Independent samples'),
        stop: {
          ...{ group: GENERATION, type: 'string', array: true, default: [] as string[] },
          describe: 'Texts that end a blank, which is cut before the first of them',
        },
        'sampling-strategy': {
          ...{ group: GENERATION, choices: ['BaseStrategy', 'BeamSearchStrategy'], requiresArg: true, default: 'BaseStrategy' },
          describe: 'Sampling, or beam search with the flags below',
        },
        'num-beams': whole('num-beams', 1, 'Beams'),
        'length-penalty': decimal('length-penalty', 0, 'Scores are divided by ((5 + length) / 6) to this power'),
        'no-repeat-ngram-size': whole('no-repeat-ngram-size', 0, 'No run of so many tokens is generated twice (0: off)'),
        deterministic: { group: GENERATION, type: 'boolean', default: false, describe: 'Beam search without sampling' },
      })
      .options(connectionOptions(CONNECTION))
      .options({
        model: { group: SERVER, type: 'string', describe: 'Model store (default: the tiny model)' },
        'world-size': { group: SERVER, ...wholeNumber('world-size', { min: 1, default: 1, describe: 'Workers' }) },
        threads: { group: SERVER, ...wholeNumber('threads', { min: 1, default: 1, describe: 'Threads of each worker' }) },
        ...engineOptions({ kvDtype: 'fp16', activations: 'int8' }, SERVER),
      })
      .check(({ seed }) => {
        if (!isSeed(seed)) throw new ConfigError(`--seed ${seed}: a whole number from 0 to 2^64 - 1 is needed`);
        return true;
      }) as never,
  async handler(args) {
    if (args.inputSource !== 'interactive') checkReadable(args.inputSource);
    if (args.outputPath !== undefined) makeFolder(args.outputPath);
    const credentials = toCredentials(args);
    await interruptible(async (signal) => {
      const cluster = args.address === undefined ? await startLocalCluster({ ...clusterOptions(args), signal }) : null;
      const client = cluster?.client ?? (await connect(args.address!, credentials));
      try {
        if (args.inputSource !== 'interactive') await answerFile(client, args, signal);
        else if (process.stdin.isTTY === true) await answerTerminal(client, args, signal);
        else await answerPipe(client, args, signal);
      } finally {
        client.close();
        await cluster?.close();
      }
    });
  },
};

function whole(flag: string, value: number, describe: string): Options {
  return { group: GENERATION, ...wholeNumber(flag, { min: 0, default: value, describe }) };
}

function decimal(flag: string, value: number, describe: string): Options {
  return { group: GENERATION, ...decimalNumber(flag, { default: value, describe }) };
}

/** @throws ConfigError before anything is started */
function checkReadable(path: string): void {
  const advice = 'give a file, or "interactive"';
  try {
    accessSync(path, constants.R_OK);
  } catch (error) {
    throw new ConfigError(`--input-source ${path} cannot be read (${(error as NodeJS.ErrnoException).code}): ${advice}`);
  }
  if (statSync(path).isDirectory()) throw new ConfigError(`--input-source ${path} is a folder: ${advice}`);
}

/** @throws ConfigError */
function makeFolder(path: string): void {
  try {
    mkdirSync(path, { recursive: true });
    accessSync(path, constants.W_OK);
  } catch (error) {
    throw new ConfigError(`--output-path ${path} is no folder to write to (${(error as NodeJS.ErrnoException).code})`);
  }
}

/** Each line of the file in turn; the first failing one ends the run, as a script would want it. */
async function answerFile(client: TandemClient, args: GenerateArgs, signal: AbortSignal): Promise<void> {
  const { inputSource } = args;
  let lineNumber = 0;
  for await (const line of readLines(createReadStream(inputSource, { signal }), inputSource)) {
    lineNumber += 1;
    if (line.trim() === '') continue;
    try {
      await answerLine(client, line.trim(), args, signal, { echo: true });
    } catch (error) {
      if (!isRefusal(error)) throw error;
      throw new InvalidRequestError(`${inputSource}:${lineNumber}: ${inLineTerms(describeError(error))}`);
    }
  }
}

/** Each line that another program writes; one that is refused is reported, and is why the command fails in the end. */
async function answerPipe(client: TandemClient, args: GenerateArgs, signal: AbortSignal): Promise<void> {
  const stdin = addAbortSignal(signal, process.stdin);
  let lineNumber = 0;
  for await (const line of readLines(stdin as AsyncIterable<Uint8Array>, 'standard input')) {
    lineNumber += 1;
    if (line.trim() === '') continue;
    try {
      await answerLine(client, line.trim(), args, signal, { echo: false });
    } catch (error) {
      reportRefusal(error, `line ${lineNumber}: `);
      process.exitCode = 1;
    }
  }
}

/** A conversation: Ctrl-C ends the answer that is being generated, at the prompt it ends the command, as Ctrl-D does. */
async function answerTerminal(client: TandemClient, args: GenerateArgs, signal: AbortSignal): Promise<void> {
  const output = process.stdout.isTTY && !args.json ? process.stdout : process.stderr;
  const input = createInterface({ input: process.stdin, output, terminal: true });
  let answering: AbortController | null = null;
  input.on('SIGINT', () => (answering ? answering.abort() : input.close()));
  signal.addEventListener('abort', () => input.close());
  input.setPrompt('Please input a text with [MASK] or [gMASK] (Ctrl-D to exit) >>> ');
  input.prompt();
  for await (const line of input) {
    if (line.trim() !== '') {
      answering = new AbortController();
      try {
        await answerLine(client, line.trim(), args, AbortSignal.any([signal, answering.signal]), { echo: false });
      } catch (error) {
        if (!answering.signal.aborted) reportRefusal(error); // the next text may be a better one
      }
      answering = null;
    }
    input.prompt();
  }
  output.write('\n');
}

interface LineOptions {
  /** Show the prompt before its answer. */
  readonly echo: boolean;
}

async function answerLine(
  client: TandemClient,
  line: string,
  args: GenerateArgs,
  signal: AbortSignal,
  { echo }: LineOptions,
): Promise<void> {
  const { id, rest } = args.withId ? splitId(line) : { id: null, rest: line };
  const { prompt, params } = parseInputLine(rest, toParams(args));
  const stem = args.outputPath === undefined ? null : fileStem(id, prompt);
  const styled = process.stdout.isTTY === true;
  const text = args.json || !('text' in prompt) ? null : prompt.text;
  const streams = params.samplingStrategy === 'BaseStrategy' && params.mode === 'fill-blanks';
  const view = text !== null && streams ? answerView(text, (piece) => process.stdout.write(piece), styled) : null;
  let toEcho = echo && text !== null ? `${id === null ? '' : `${id}: `}${text}\n` : ''; // with the first news, as a refused line has no answer
  const showEcho = (): void => {
    if (toEcho !== '') process.stdout.write(toEcho);
    toEcho = '';
  };
  const logprobs: TokenLogprob__Output[][] = [];
  let finish: Finish__Output;
  try {
    const request = toWireRequest(prompt, params);
    const onDelta = (delta: Delta__Output): void => {
      showEcho();
      view?.delta(delta);
      if (params.logprobs !== null) (logprobs[delta.output] ??= []).push(...delta.logprobs);
    };
    finish = await client.generate(request, onDelta, signal);
  } catch (error) {
    view?.stop();
    throw error;
  }
  showEcho();
  view?.finish();

  if (args.json) process.stdout.write(`${JSON.stringify(toJson(id, finish, logprobs))}\n`);
  else if (!view || finish.outputs.length > 1 || args.printAllBeams) printAnswers(finish, args.printAllBeams, styled);
  if (stem !== null) writeAnswers(args.outputPath!, stem, finish, args.printAllBeams);
}

/** docs/generate.md. The fields of an output are the first one's; with n > 1 `outputs` has them all. */
function toJson(id: string | null, finish: Finish__Output, logprobs: readonly TokenLogprob__Output[][]): object {
  const outputs = finish.outputs.map((output, i) => ({
    text: output.text,
    ids: output.ids,
    generated: output.blanks.flatMap((blank) => blank.tokens),
    blanks: output.blanks.map((blank) => blank.text),
    beams: output.beams.map(({ ids, score, text, blanks }) => ({ ids, score, text, blanks })),
    finish: output.reason.replace('FINISH_REASON_', '').toLowerCase(),
    ...(logprobs[i] === undefined ? {} : { logprobs: logprobs[i] }),
  }));
  return {
    ...(id === null ? {} : { id }),
    ...outputs[0],
    ...(outputs.length > 1 ? { outputs } : {}),
    usage: { prompt_tokens: finish.usage!.promptTokens, generated_tokens: finish.usage!.generatedTokens },
    timings: {
      queue_ms: toMicroseconds(finish.timings!.queueMs),
      prefill_ms: toMicroseconds(finish.timings!.prefillMs),
      decode_ms: toMicroseconds(finish.timings!.decodeMs),
    },
  };
}

function toMicroseconds(ms: number): number {
  return Math.round(ms * 1000) / 1000;
}

function printAnswers(finish: Finish__Output, allBeams: boolean, styled: boolean): void {
  const [first] = finish.outputs;
  if (allBeams && first!.beams.length > 1) {
    first!.beams.forEach((beam, i) => process.stdout.write(`Beam ${i} (${beam.score.toFixed(4)}): ${beam.text || beam.ids.join(' ')}\n`));
    return;
  }
  finish.outputs.forEach((output, i) => {
    const text = (styled ? output.styledText : output.text) || output.ids.join(' ');
    process.stdout.write(`${finish.outputs.length > 1 ? `Sample ${i}` : 'Answer'}: ${text}\n`);
  });
}

/** The file appears complete or not at all. */
function writeAnswers(dir: string, stem: string, finish: Finish__Output, allBeams: boolean): void {
  const [first] = finish.outputs;
  const answers = allBeams && first!.beams.length > 0 ? first!.beams.map(({ text }) => text) : finish.outputs.map(({ text }) => text);
  const partial = join(dir, `.${stem}.partial`);
  try {
    writeFileSync(partial, `${answers.join('\n')}\n`);
    renameSync(partial, join(dir, `${stem}.txt`));
  } finally {
    rmSync(partial, { force: true });
  }
}

const stems = new Set<string>();

/**
 * The id, or as generate.py names its files: the time, and the beginning of the text.
 * @throws InvalidRequestError where an earlier line's file would be overwritten
 */
function fileStem(id: string | null, prompt: PromptInput): string {
  const start = 'text' in prompt ? prompt.text.slice(0, 20) : `ids-${prompt.ids.slice(0, 4).join('-')}`;
  const time = new Date().toISOString().replaceAll(/[-:]/g, '').slice(0, 15);
  const stem = id === null ? `${time}-${stems.size + 1}-${safeName(start)}` : safeName(id);
  if (stems.has(stem))
    throw new InvalidRequestError(`id ${id}: an earlier line's answers are in ${stem}.txt already, give each line its own id`);
  stems.add(stem);
  return stem;
}

function splitId(line: string): { id: string; rest: string } {
  const tab = line.indexOf('\t');
  if (tab <= 0) throw new InvalidRequestError('with --with-id a line is id<TAB>text, this one has no id');
  return { id: line.slice(0, tab).trim(), rest: line.slice(tab + 1).trim() };
}

/** Fit for a file name inside the output folder, whatever the text was. */
function safeName(text: string): string {
  return text.replaceAll(/[^\p{L}\p{N}._-]+/gu, '_').replace(/^\.+/, '_');
}

function clusterOptions(args: GenerateArgs) {
  return {
    model: args.model ?? null,
    worldSize: args.worldSize,
    threads: args.threads,
    engine: localEngineFlags(args),
  };
}

function toParams(args: GenerateArgs): GenerateParams {
  return {
    mode: args.mode as GenerateParams['mode'],
    outSeqLength: args.outSeqLength,
    maxNewTokens: args.maxNewTokens,
    minGenLength: args.minGenLength,
    samplingStrategy: args.samplingStrategy as GenerateParams['samplingStrategy'],
    numBeams: args.numBeams,
    lengthPenalty: args.lengthPenalty,
    noRepeatNgramSize: args.noRepeatNgramSize,
    deterministic: args.deterministic,
    considerEnd: true,
    bannedPrefixes: [],
    topK: args.topK,
    topP: args.topP,
    temperature: args.temperature,
    seed: args.seed,
    n: args.n,
    stop: args.stop,
    endTokens: null,
    bannedTokens: [],
    logprobs: null,
  };
}

function isRefusal(error: unknown): boolean {
  return error instanceof InvalidRequestError || (isServiceError(error) && REFUSALS.has(error.code));
}

/** Of this line alone; the next one may be taken. */
const REFUSALS: ReadonlySet<status> = new Set([status.INVALID_ARGUMENT, status.RESOURCE_EXHAUSTED]);

/** @throws the error where it is none */
function reportRefusal(error: unknown, where = ''): void {
  if (!isRefusal(error)) throw error;
  process.stderr.write(`tandem: ${where}${inLineTerms(describeError(error))}\n`);
}
