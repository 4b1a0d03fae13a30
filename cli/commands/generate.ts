import { accessSync, constants, createReadStream, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import type { ServiceError } from '@grpc/grpc-js';
import type { CommandModule } from 'yargs';
import { ConfigError, InvalidRequestError, TandemError } from '../../common/errors.js';
import type { Finish__Output } from '../../proto/generated/tandem/v1/Finish.js';
import { answerView } from '../answer-view.js';
import { connect, type TandemClient } from '../client.js';
import { parseInputLine, toWireRequest, type GenerateParams, type PromptInput } from '../input-line.js';
import { startLocalCluster } from '../local-cluster.js';

interface GenerateArgs {
  address: string | undefined;
  model: string | undefined;
  worldSize: number;
  threads: number;
  kvDtype: string;
  isa: string;
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

export const generateCommand: CommandModule<unknown, GenerateArgs> = {
  command: 'generate',
  describe: 'Fill blanks and continue text, interactively or line by line from a file',
  builder: (yargs) =>
    yargs
      .option('address', { type: 'string', describe: 'A running server: host:port or unix:/path (default: start one for this command)' })
      .option('model', { type: 'string', describe: 'Model store for a server of its own (default: the tiny model)' })
      .option('world-size', { type: 'number', default: 1, describe: 'Workers of a server of its own' })
      .option('threads', { type: 'number', default: 1, describe: 'Threads of each of these workers' })
      .option('kv-dtype', { choices: ['fp16', 'fp32'] as const, default: 'fp16', describe: 'Precision of their KV cache' })
      .option('isa', {
        choices: ['auto', 'avx512', 'avx2', 'generic'] as const,
        default: 'auto',
        describe: 'Instruction set of their kernels',
      })
      .option('input-source', {
        type: 'string',
        default: 'interactive',
        describe: '"interactive", or a file with one text or JSON object per line',
      })
      .option('with-id', { type: 'boolean', default: false, describe: 'Lines are id<TAB>text' })
      .option('output-path', { type: 'string', describe: 'Folder that gets a file with the answers of each line' })
      .option('print-all-beams', { type: 'boolean', default: false })
      .option('json', { type: 'boolean', default: false, describe: 'Print one JSON object per input line' })
      .option('mode', { choices: ['fill-blanks', 'mask', 'gmask', 'unidirectional'] as const, default: 'fill-blanks' })
      .option('out-seq-length', { type: 'number', default: 256, describe: 'Most tokens of a row, the context included' })
      .option('max-new-tokens', { type: 'number', default: 0, describe: 'Most new tokens of one blank (0: no limit of its own)' })
      .option('min-gen-length', { type: 'number', default: 0 })
      .option('sampling-strategy', { choices: ['BaseStrategy', 'BeamSearchStrategy'] as const, default: 'BaseStrategy' })
      .option('num-beams', { type: 'number', default: 1 })
      .option('length-penalty', { type: 'number', default: 0 })
      .option('no-repeat-ngram-size', { type: 'number', default: 0 })
      .option('deterministic', { type: 'boolean', default: false, describe: 'Beam search without sampling' })
      .option('top-k', { type: 'number', default: 0 })
      .option('top-p', { type: 'number', default: 0 })
      .option('temperature', { type: 'number', default: 1, describe: '0 is greedy' })
      .option('seed', { type: 'string', default: '1234' })
      .option('n', { type: 'number', default: 1, describe: 'Independent samples' })
      .option('stop', { type: 'string', array: true, default: [] as string[], describe: 'Generation of a blank ends before this text' })
      .check((args) => {
        for (const flag of [
          'out-seq-length',
          'max-new-tokens',
          'min-gen-length',
          'num-beams',
          'no-repeat-ngram-size',
          'top-k',
          'n',
        ] as const) {
          const value = args[flag] as number;
          if (!Number.isInteger(value) || value < 0) throw new ConfigError(`--${flag} ${value}: a whole number from 0 on is needed`);
        }
        for (const flag of ['length-penalty', 'top-p', 'temperature'] as const) {
          if (!Number.isFinite(args[flag])) throw new ConfigError(`--${flag}: a number is needed`);
        }
        if (!/^\d{1,20}$/.test(args.seed) || BigInt(args.seed) >= 2n ** 64n)
          throw new ConfigError(`--seed ${args.seed}: a whole number below 2^64 is needed`);
        return true;
      }) as never,
  async handler(args) {
    if (args.inputSource !== 'interactive') checkReadable(args.inputSource);
    const cluster = args.address === undefined ? await startLocalCluster(clusterOptions(args)) : null;
    const client = cluster?.client ?? (await connect(args.address!));
    try {
      if (args.outputPath !== undefined) mkdirSync(args.outputPath, { recursive: true });
      if (args.inputSource === 'interactive') await interact(client, args);
      else await runFile(client, args);
    } finally {
      client.close();
      await cluster?.close();
    }
  },
};

/** @throws ConfigError before anything is started */
function checkReadable(path: string): void {
  try {
    accessSync(path, constants.R_OK);
  } catch (error) {
    throw new ConfigError(
      `--input-source ${path} cannot be read (${(error as NodeJS.ErrnoException).code}): give a file, or "interactive"`,
    );
  }
}

/** Each line of the file in turn; the first failing one ends the run, as a script would want it. */
async function runFile(client: TandemClient, args: GenerateArgs): Promise<void> {
  const lines = createInterface({ input: createReadStream(args.inputSource, 'utf8'), crlfDelay: Infinity });
  let lineNumber = 0;
  for await (const raw of lines) {
    lineNumber += 1;
    const line = raw.trim();
    if (line === '') continue;
    try {
      await answerLine(client, line, args, { echo: true });
    } catch (error) {
      throw withLine(error, `${args.inputSource}:${lineNumber}`);
    }
  }
}

async function interact(client: TandemClient, args: GenerateArgs): Promise<void> {
  const isTerminal = process.stdin.isTTY === true;
  const input = createInterface({
    input: process.stdin,
    output: isTerminal && !args.json ? process.stdout : undefined,
    terminal: isTerminal,
  });
  input.setPrompt('Please input a text with [MASK] or [gMASK] (Ctrl-D to exit) >>> ');
  if (!args.json) input.prompt();
  for await (const raw of input) {
    const line = raw.trim();
    if (line !== '') {
      try {
        await answerLine(client, line, args, { echo: false });
      } catch (error) {
        if (!isRefusal(error)) throw error;
        process.stderr.write(`tandem: ${error.message}\n`); // the next text may be a better one
      }
    }
    if (!args.json) input.prompt();
  }
}

async function answerLine(client: TandemClient, line: string, args: GenerateArgs, { echo }: { echo: boolean }): Promise<void> {
  const { id, rest } = args.withId ? splitId(line) : { id: null, rest: line };
  const { prompt, params } = parseInputLine(rest, toParams(args));
  const styled = process.stdout.isTTY === true;
  const streams = !args.json && 'text' in prompt && params.samplingStrategy === 'BaseStrategy';
  if (echo && !args.json && 'text' in prompt) process.stdout.write(`${id === null ? '' : `${id}: `}${prompt.text}\n`);
  const view = streams ? answerView((prompt as { text: string }).text, (text) => process.stdout.write(text), styled) : null;
  const finish = await client.generate(toWireRequest(prompt, params), (delta) => view?.delta(delta));
  view?.finish();

  if (args.json) process.stdout.write(`${JSON.stringify(toJson(id, finish))}\n`);
  else if (!view || finish.outputs.length > 1 || args.printAllBeams) printAnswers(finish, args.printAllBeams, styled);
  if (args.outputPath !== undefined) writeAnswers(args.outputPath, id ?? fileStem(prompt), finish, args.printAllBeams);
}

/** `text`, `ids`, `generated`, `blanks`, `beams` and `finish` are the first output's; with n > 1 `outputs` has them all. */
function toJson(id: string | null, finish: Finish__Output): object {
  const outputs = finish.outputs.map((output) => ({
    text: output.text,
    ids: output.ids,
    generated: output.blanks.flatMap((blank) => blank.tokens),
    blanks: output.blanks.map((blank) => blank.text),
    beams: output.beams.map(({ ids, score, text, blanks }) => ({ ids, score, text, blanks })),
    finish: output.reason.replace('FINISH_REASON_', '').toLowerCase(),
  }));
  return {
    ...(id === null ? {} : { id }),
    ...outputs[0],
    ...(outputs.length > 1 ? { outputs } : {}),
    usage: { prompt_tokens: finish.usage?.promptTokens, generated_tokens: finish.usage?.generatedTokens },
    timings: { queue_ms: finish.timings?.queueMs, prefill_ms: finish.timings?.prefillMs, decode_ms: finish.timings?.decodeMs },
  };
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

function writeAnswers(dir: string, stem: string, finish: Finish__Output, allBeams: boolean): void {
  const [first] = finish.outputs;
  const answers = allBeams && first!.beams.length > 0 ? first!.beams.map(({ text }) => text) : finish.outputs.map(({ text }) => text);
  writeFileSync(join(dir, `${stem}.txt`), `${answers.join('\n')}\n`);
}

let answersWritten = 0;

/** As generate.py names its files: the time, and the beginning of the text. */
function fileStem(prompt: PromptInput): string {
  const start = 'text' in prompt ? prompt.text.slice(0, 20) : `ids-${prompt.ids.slice(0, 4).join('-')}`;
  const time = new Date().toISOString().replaceAll(/[-:]/g, '').slice(0, 15);
  return `${time}-${++answersWritten}-${safeName(start)}`;
}

function splitId(line: string): { id: string; rest: string } {
  const tab = line.indexOf('\t');
  if (tab <= 0) throw new InvalidRequestError('with --with-id a line is id<TAB>text, this one has no id');
  return { id: safeName(line.slice(0, tab)), rest: line.slice(tab + 1) };
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
    kvDtype: args.kvDtype === 'fp32' ? ('fp32' as const) : ('fp16' as const),
    isa: args.isa,
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

function isRefusal(error: unknown): error is Error {
  return error instanceof TandemError || (error instanceof Error && 'code' in error && (error as ServiceError).code === 3);
}

function withLine(error: unknown, where: string): unknown {
  if (error instanceof InvalidRequestError) return new InvalidRequestError(`${where}: ${error.message}`);
  if (error instanceof Error && 'details' in error) Object.assign(error, { details: `${where}: ${String(error.details)}` });
  return error;
}
