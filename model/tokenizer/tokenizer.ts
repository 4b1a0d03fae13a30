import { readFile, stat } from 'node:fs/promises';
import { basename } from 'node:path';
import { SentencePieceProcessor } from '@agnai/sentencepiece-js';
import { CheckpointError, InvalidRequestError } from '../../common/errors.js';
import type { SpecialTokens, TokenizerConfig } from '../model-config.js';
import { extendModel, parseSentencePieceModel, PIECE_TYPE, type Piece, type SentencePieceModel } from './sentencepiece-model.js';
import { isPlain, SPACE, StreamDecoder, type Surface, type Surfaces, type TextStream } from './stream-decoder.js';

/** Text to token ids and back, as icetk does it for GLM-130B (model-spec section 8). */
export interface Tokenizer {
  /** Ids from here on are padding rows of the vocabulary: they have no text, but can be generated. */
  readonly numTokens: number;
  /**
   * Ids of a text. Never a control token: `[MASK]` or `<sop>` in it are ordinary text for it.
   * Time and memory are linear in the text. A lone surrogate is encoded as U+FFFD.
   */
  encode(text: string, options?: { readonly dummyPrefix?: boolean }): number[];
  /**
   * Ids of a prompt: `[MASK]`, `[gMASK]` and `[sMASK]` become their tokens, and the pieces between them are encoded each on its own, so
   * each has its own dummy prefix (section 6, rule 2).
   */
  encodePrompt(text: string): number[];
  /**
   * Text of ids, control tokens left out. Padding rows are U+FFFD each.
   * @throws InvalidRequestError an id is no integer, or below the image-token offset (image tokens have no text)
   */
  decode(ids: readonly number[]): string;
  /**
   * Text as generate.py prints it: control tokens, tabs and runs of blanks as names in brackets; the stretches between them are decoded
   * on their own. Serves generated rows, so it throws for no id: image tokens and padding rows are U+FFFD each.
   */
  detokenize(ids: readonly number[]): string;
  /** `decode` of ids as they are generated; image tokens are U+FFFD here too. */
  stream(): TextStream;
  /** Id of `[MASK]`, `sop`, `eos`, `<t>`, `<blank_2>`, ... (`get_command`). @throws InvalidRequestError unknown name */
  command(name: string): number;
}

/**
 * Loads a SentencePiece file and appends the pieces that icetk adds in memory.
 *
 * @param path of the model file; 64 MiB at most
 * @throws CheckpointError the file cannot be read, is no SentencePiece model, or has another number of pieces than the configuration says
 */
export async function loadTokenizer(path: string, config: TokenizerConfig): Promise<Tokenizer> {
  const bytes = await readModelFile(path);
  const name = basename(path);
  const model = parseSentencePieceModel(bytes, name);
  if (model.pieces.length !== config.numTextPieces) {
    throw new CheckpointError(
      `${name} has ${model.pieces.length} pieces, config.json says num_text_pieces ${config.numTextPieces}: take the tokenizer of this model`,
    );
  }
  const encoder = await loadEncoder(path, extendModel(bytes, APPENDED));
  const tokenizer = new IcetkTokenizer(encoder, model, config);
  const tab = tokenizer.encode('\t').at(-1); // a model that did not load is not reported, but encodes nothing
  if (tab !== tokenizer.command('<t>')) throw new CheckpointError(`${name} could not be extended: a tab is encoded as ${tab ?? 'nothing'}`);
  return tokenizer;
}

const MAX_MODEL_BYTES = 64 * 2 ** 20;
const LONGEST_BLANK = 80;
const SPECIALS = ['[MASK]', '[gMASK]', '[sMASK]', '<eod>', '<sop>', '<eop>', '<ENC>', '<dBLOCK>'];
const BLANKS = Array.from({ length: LONGEST_BLANK - 1 }, (_, i) => i + 2);

/** The appended pieces in the order of their ids. */
const APPENDED: readonly Piece[] = [
  ...SPECIALS.map((text) => ({ text, type: PIECE_TYPE.control })),
  { text: '<|tab|>', type: PIECE_TYPE.userDefined },
  ...BLANKS.map((i) => ({ text: `<|blank_${i}|>`, type: PIECE_TYPE.userDefined })),
  ...Array.from({ length: 256 }, (_, i) => ({ text: `<0x${i.toString(16).toUpperCase().padStart(2, '0')}>`, type: PIECE_TYPE.byte })),
];

/** Names of the ids from the first special on (`get_command`, and in brackets in `detokenize`). */
const COMMANDS = [...SPECIALS.map((text) => text.replace(/[<>]/g, '')), '<t>', ...BLANKS.map((i) => `<blank_${i}>`)];
const EOS_PIECE = 2;

class IcetkTokenizer implements Tokenizer {
  readonly numTokens: number;
  private readonly surfaces: Surfaces;
  private readonly commands: ReadonlyMap<string, number>;
  /** What `detokenize` writes for special ids, by the distance from the offset; empty for the others. */
  private readonly bracketed: readonly string[];

  constructor(
    private readonly encoder: SentencePieceProcessor,
    model: SentencePieceModel,
    private readonly config: TokenizerConfig,
  ) {
    const offset = config.imageTokenOffset;
    const surfaces = [...model.pieces, ...APPENDED].map((piece) => surfaceOf(piece, model.unknownSurface));
    this.numTokens = offset + surfaces.length;
    const first = model.removeExtraWhitespaces ? 'all' : 'first';
    this.surfaces = {
      of: (id) => surfaces[id - offset] ?? NO_TEXT,
      droppedSpaces: model.removeExtraWhitespaces || model.addDummyPrefix ? first : 'none',
    };
    const firstSpecial = offset + config.numTextPieces;
    this.commands = new Map([...COMMANDS.map((name, i) => [name, firstSpecial + i] as const), ['eos', offset + EOS_PIECE]]);
    const bracketed = surfaces.map(() => '');
    for (const [name, id] of this.commands) bracketed[id - offset] = name === 'eos' ? '[</s>]' : `[${name}]`;
    this.bracketed = bracketed;
  }

  encode(text: string, { dummyPrefix = true }: { readonly dummyPrefix?: boolean } = {}): number[] {
    if (text === '') return [];
    const escaped = text
      .replaceAll('\n', '<n>')
      .replaceAll('\t', '<|tab|>')
      .replace(
        / {2,}/g,
        (run) => `<|blank_${LONGEST_BLANK}|>`.repeat(Math.floor(run.length / LONGEST_BLANK)) + blanks(run.length % LONGEST_BLANK),
      );
    const wellFormed = Buffer.from(dummyPrefix ? escaped : `<n>${escaped}`).toString(); // lone surrogates become U+FFFD
    const ids = this.encoder.encodeIds(wellFormed).map((id) => id + this.config.imageTokenOffset);
    return dummyPrefix ? ids : ids.slice(2); // `▁`, `<n>`
  }

  encodePrompt(text: string): number[] {
    // Split with a capturing group: texts and mask words take turns.
    return text.split(/(\[[gs]?MASK\])/).flatMap((part, i) => (i % 2 === 1 ? [this.command(part)] : this.encode(part)));
  }

  decode(ids: readonly number[]): string {
    for (const [i, id] of ids.entries()) {
      if (!Number.isInteger(id) || id < this.config.imageTokenOffset) {
        throw new InvalidRequestError(`id ${i} is ${id}, text ids are integers from ${this.config.imageTokenOffset}`);
      }
    }
    return this.textOf(ids);
  }

  detokenize(ids: readonly number[]): string {
    let text = '';
    let begin = 0;
    for (let i = 0; i < ids.length; i++) {
      const special = this.bracketed[ids[i]! - this.config.imageTokenOffset] ?? '';
      if (special === '') continue;
      text += this.textOf(ids.slice(begin, i)) + special;
      begin = i + 1;
    }
    return text + this.textOf(ids.slice(begin));
  }

  stream(): TextStream {
    return new StreamDecoder(this.surfaces);
  }

  command(name: string): number {
    const id = this.commands.get(name);
    if (id === undefined)
      throw new InvalidRequestError(`no token is called ${JSON.stringify(name)}: known are ${[...this.commands.keys()].join(' ')}`);
    return id;
  }

  private textOf(ids: readonly number[]): string {
    const stream = this.stream();
    let text = '';
    for (const id of ids) text += stream.push(id);
    return text + stream.flush();
  }
}

/** Image tokens and padding rows. */
const NO_TEXT = literal('\ufffd');

function surfaceOf(piece: Piece, unknownSurface: string): Surface {
  if (piece.type === PIECE_TYPE.control) return literal('');
  if (piece.type === PIECE_TYPE.unknown) return literal(unknownSurface);
  if (piece.type === PIECE_TYPE.byte) return { kind: 'byte', value: Number.parseInt(piece.text.slice(3, 5), 16) };
  const text = piece.text.replaceAll(SPACE, ' ');
  return { kind: 'piece', text, isSpaceFirst: piece.text.startsWith(SPACE), isPlain: isPlain(text) };
}

function literal(text: string): Surface {
  return { kind: 'literal', text, isPlain: isPlain(text) };
}

/** The rest of a run of blanks: 0 to 79 of them; a single one stays a blank. */
function blanks(count: number): string {
  return count < 2 ? ' '.repeat(count) : `<|blank_${count}|>`;
}

/** @throws CheckpointError if the tokenizer has other ids for the words that steer generation than the configuration says */
export function checkSpecialTokens(tokenizer: Tokenizer, special: SpecialTokens): void {
  const names = {
    '[MASK]': special.mask,
    '[gMASK]': special.gmask,
    '[sMASK]': special.smask,
    sop: special.sop,
    eop: special.eop,
    eos: special.eos,
  };
  for (const [name, id] of Object.entries(names)) {
    const own = tokenizer.command(name);
    if (own !== id)
      throw new CheckpointError(
        `config.json says that ${name} is token ${id}, for the tokenizer it is ${own}: take the tokenizer of this model`,
      );
  }
}

async function readModelFile(path: string): Promise<Uint8Array> {
  try {
    const { size } = await stat(path);
    if (size > MAX_MODEL_BYTES) throw new Error(`it has ${size} bytes, at most ${MAX_MODEL_BYTES} are read`);
    return await readFile(path);
  } catch (error) {
    throw new CheckpointError(`tokenizer ${path} cannot be read: ${(error as Error).message}`);
  }
}

/**
 * The package loads files only, so the extended model goes into the file system of its WebAssembly instance.
 * @throws CheckpointError the C++ code does not take the model; its exceptions arrive as numbers
 */
async function loadEncoder(path: string, extended: Uint8Array): Promise<SentencePieceProcessor> {
  const encoder = new SentencePieceProcessor();
  let message: string;
  try {
    await encoder.load(path);
    message = loadFromMemory(encoder, extended);
  } catch (error) {
    message = error instanceof Error ? error.message : `SentencePiece threw ${String(error)}`;
  }
  if (message !== 'OK') throw new CheckpointError(`${basename(path)} could not be loaded, it is damaged: ${message}`);
  return encoder;
}

/** @returns `OK`, or what is wrong */
function loadFromMemory(encoder: SentencePieceProcessor, model: Uint8Array): string {
  const { FS, StringView } = encoder.sentencepiece;
  const file = 'extended.model';
  FS.writeFile(file, model);
  const name = new StringView(file);
  const view = name.getView();
  const status = encoder.processor.Load(view);
  const message = status.ToString();
  for (const handle of [status, view, name]) handle.delete();
  FS.unlink(file);
  return message;
}
