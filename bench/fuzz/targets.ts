import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { TandemError } from '../../common/errors.js';
import { packageRoot } from '../../common/package-root.js';
import { layOutTorchFile, TorchFileWriter, type PlannedTorchTensor } from '../../model/export/write-torch.js';
import { writeTorchFile } from '../../model/import/fixtures/torch-archive.js';
import { parsePickle } from '../../model/import/pickle.js';
import { TorchFile } from '../../model/import/read-torch.js';
import { SatCheckpoint } from '../../model/import/sat-checkpoint.js';
import { glm130b } from '../../model/model-config.js';
import { readSafetensorsHeader } from '../../model/store/safetensors-header.js';
import { writeSyntheticSat } from '../../model/synth/write-synthetic.js';
import { parseSentencePieceModel } from '../../model/tokenizer/sentencepiece-model.js';
import { loadTokenizer } from '../../model/tokenizer/tokenizer.js';
import { mutate, randomIntegers } from './mutate.js';

/** A reader of files from elsewhere. */
export interface FuzzTarget {
  readonly name: string;
  /** In a run of 100 000. */
  readonly inputs: number;
  readonly corpus: readonly Uint8Array[];
  /** Reads everything that the input can make it read. May throw; what else than a {@link TandemError} is a defect. */
  read(input: Uint8Array): Promise<void>;
}

/** Opens the targets; they keep files in a folder of their own. */
export class FuzzTargets {
  private constructor(
    readonly dir: string,
    readonly all: readonly FuzzTarget[],
  ) {}

  /** @param parent where to make the folder: who owns that one cleans up if this process is killed. Files in memory are as good, and faster */
  static async open(parent = existsSync('/dev/shm') ? '/dev/shm' : tmpdir()): Promise<FuzzTargets> {
    const targets: FuzzTarget[] = [];
    const opened = new FuzzTargets(mkdtempSync(join(parent, 'tandem-fuzz-')), targets);
    const path = join(opened.dir, 'input');
    const archives = await torchArchives();
    const pickles = archives.map(({ pickle }) => pickle);
    const model = smallSentencePieceModel();
    targets.push(
      {
        name: 'pickle',
        inputs: 45_000,
        corpus: [...pickles, pickleOfAllOpcodes()],
        read: (input) => Promise.resolve(void parsePickle(input, 'input')),
      },
      { name: 'torch file', inputs: 25_000, corpus: archives.map(({ bytes }) => bytes), read: (input) => readTorch(path, input) },
      {
        name: 'pickle in an intact torch file',
        inputs: 15_000,
        corpus: pickles,
        read: (input) => {
          writeTorchFile(path, input, storages);
          return readTensors(path);
        },
      },
      {
        name: 'tar',
        inputs: 25_000,
        corpus: await tarArchives(opened.dir),
        read: async (input) => {
          writeFileSync(path, input);
          const checkpoint = await SatCheckpoint.open(path);
          try {
            for (const file of checkpoint.ranks) for (const tensor of file.tensors.values()) await file.readTensor(tensor);
          } finally {
            await checkpoint.close();
          }
        },
      },
      {
        name: 'safetensors',
        inputs: 25_000,
        corpus: safetensorsFiles(),
        read: async (input) => {
          writeFileSync(path, input);
          await readSafetensorsHeader(path);
        },
      },
      {
        name: 'SentencePiece',
        inputs: 25_000,
        corpus: [model],
        read: (input) => Promise.resolve(void parseSentencePieceModel(input, 'input')),
      },
      {
        name: 'tokenizer',
        inputs: 2_000,
        corpus: [model],
        read: async (input) => {
          writeFileSync(path, input);
          const { pieces } = parseSentencePieceModel(input, 'input');
          const tokenizer = await loadTokenizer(path, { file: 'input', imageTokenOffset: 0, numTextPieces: pieces.length });
          tokenizer.decode(tokenizer.encodePrompt('a text of 3 words, [MASK] 中文'));
        },
      },
    );
    return opened;
  }

  close(): void {
    rmSync(this.dir, { recursive: true });
  }
}

/** Input `index` of a target: the same each time. */
export function inputOf({ name, corpus }: FuzzTarget, seed: number, index: number): Uint8Array {
  let hash = seed;
  for (const char of name) hash = Math.imul(hash ^ char.charCodeAt(0), 0x01000193);
  return mutate(corpus, randomIntegers(Math.imul(hash, 0x9e3779b1) + Math.imul(index, 0x85ebca6b)));
}

/** @returns whether it was refused @throws what a reader may not throw */
export async function tryInput(target: FuzzTarget, input: Uint8Array): Promise<boolean> {
  try {
    await target.read(input);
    return false;
  } catch (error) {
    if (error instanceof TandemError && !error.message.includes('\n')) return true;
    throw error;
  }
}

async function readTorch(path: string, input: Uint8Array): Promise<void> {
  writeFileSync(path, input);
  await readTensors(path);
}

async function readTensors(path: string): Promise<void> {
  const file = await TorchFile.open(path);
  try {
    for (const tensor of file.tensors.values()) await file.readTensor(tensor);
  } finally {
    await file.close();
  }
}

const tensors: readonly PlannedTorchTensor[] = [
  { name: 'transformer.word_embeddings.weight', dtype: 'float16', shape: [6, 4] },
  { name: 'transformer.layers.0.attention.dense.weight', dtype: 'int8', shape: [4, 2] },
  { name: 'transformer.layers.0.attention.dense.bias', dtype: 'float32', shape: [4] },
];
const contents = [Buffer.alloc(48, 1), Buffer.alloc(8, 2), Buffer.alloc(16, 3)];
const storages = Object.fromEntries(contents.map((content, key) => [String(key), content]));

interface TorchArchive {
  readonly bytes: Uint8Array;
  readonly pickle: Uint8Array;
}

/** A small file as torch.save writes it, and those that PyTorch wrote. */
async function torchArchives(): Promise<TorchArchive[]> {
  const layout = layOutTorchFile('archive', tensors);
  const pieces: Uint8Array[] = [];
  const writer = await TorchFileWriter.create({ write: (bytes) => Promise.resolve(void pieces.push(bytes)) }, layout);
  for (const [i, { name }] of tensors.entries()) await writer.append(name, contents[i]!);
  await writer.finish();
  const golden = join(packageRoot, 'test/golden/random/E/checkpoints/tp4-int4/release');
  const written = readdirSync(golden)
    .slice(0, 1)
    .map((name) => readFileSync(join(golden, name)))
    .map((bytes) => ({ bytes, pickle: pickleOf(bytes) }));
  return [{ bytes: Buffer.concat(pieces), pickle: layout.pickle }, ...written];
}

/** data.pkl is the first entry of what PyTorch writes; its sizes follow it. */
function pickleOf(archive: Buffer): Buffer {
  const begin = 30 + archive.readUInt16LE(26) + archive.readUInt16LE(28);
  const descriptor = archive.indexOf('PK\x07\x08', begin, 'latin1');
  return archive.subarray(begin, descriptor);
}

/** Every opcode that the reader takes and torch.save does not write. */
function pickleOfAllOpcodes(): Uint8Array {
  const parts = [
    '\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00', // PROTO 4, FRAME
    '}\x94', // EMPTY_DICT, MEMOIZE
    '\x8c\x04list](K\x01M\x02\x00J\x03\x00\x00\x00\x8a\x01\x04\x8b\x01\x00\x00\x00\x05es', // APPENDS of numbers, SETITEM
    '\x8c\x05tuple(N\x88\x89G?\xf0\x00\x00\x00\x00\x00\x00ts', // NONE, NEWTRUE, NEWFALSE, BINFLOAT, TUPLE
    '\x8c\x05bytesC\x01aB\x02\x00\x00\x00bc\x86s', // SHORT_BINBYTES, BINBYTES, TUPLE2
    '\x8c\x04longB\x00\x00\x00\x00\x8e\x01\x00\x00\x00\x00\x00\x00\x00d\x86s', // BINBYTES8
    '\x8c\x04text\x8d\x01\x00\x00\x00\x00\x00\x00\x00eU\x01fT\x01\x00\x00\x00g\x87s', // BINUNICODE8, SHORT_BINSTRING, BINSTRING, TUPLE3
    '\x8c\x04more(K\x01(K\x02K\x0312l(K\x04K\x05d0s', // MARK, POP_MARK, DUP, LIST, DICT, POP
    '\x8c\x06append]K\x01as', // APPEND
    '\x8c\x04memo]q\x07r\x08\x00\x00\x00h\x07j\x08\x00\x00\x00\x87s', // BINPUT, LONG_BINPUT, BINGET, LONG_BINGET
    '\x8c\x02od\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R}bs', // STACK_GLOBAL, EMPTY_TUPLE, REDUCE, BUILD
    '\x85.', // TUPLE1, STOP
  ];
  return Buffer.concat(parts.map((part) => Buffer.from(part, 'latin1')));
}

function safetensorsFiles(): Uint8Array[] {
  const file = (header: unknown, dataBytes: number): Buffer => {
    const json = Buffer.from(JSON.stringify(header));
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(json.length));
    return Buffer.concat([length, json, Buffer.alloc(dataBytes, 7)]);
  };
  return [
    file({ __metadata__: { format: 'tandem-store' }, a: { dtype: 'F16', shape: [3, 4], data_offsets: [0, 24] } }, 24),
    file(
      {
        a: { dtype: 'U8', shape: [2, 2], data_offsets: [0, 4] },
        b: { dtype: 'F32', shape: [], data_offsets: [4, 8] },
        c: { dtype: 'I8', shape: [0, 9], data_offsets: [8, 8] },
      },
      8,
    ),
  ];
}

/** Of a small checkpoint: as `tandem synth` writes it, and as tar does with long names and pax records. */
async function tarArchives(dir: string): Promise<Uint8Array[]> {
  const to = join(dir, 'tar');
  const config = { ...glm130b, numLayers: 1, hiddenSize: 8, numAttentionHeads: 2, innerHiddenSize: 8, vocabSize: 16 };
  await writeSyntheticSat({ config, seed: '0', bits: 4, ranks: 2, to }, 1);
  const plain = readFileSync(join(to, 'glm-130b-sat.tar.part_00'));
  const unpacked = join(dir, 'unpacked', 'a-folder-with-a-long-name'.repeat(5));
  mkdirSync(unpacked, { recursive: true });
  execFileSync('tar', ['xf', '-', '-C', unpacked], { input: plain });
  const repacked = (format: string): Uint8Array =>
    execFileSync('tar', [`--format=${format}`, '-cf', '-', '-C', join(dir, 'unpacked'), '.'], { maxBuffer: 2 ** 24 });
  return [plain, repacked('pax'), repacked('gnu')];
}

/** The tiny model's, with the first of its pieces: a whole one has four thousand. */
function smallSentencePieceModel(): Uint8Array {
  const bytes = readFileSync(join(packageRoot, 'model/tiny/tokenizer.model'));
  const fields: { isPiece: boolean; bytes: Buffer }[] = [];
  for (let at = 0; at < bytes.length;) {
    const begin = at;
    const tag = bytes[at++]!;
    let length = 0;
    for (let shift = 0; ; shift += 7) {
      length += (bytes[at]! & 0x7f) << shift;
      if (bytes[at++]! < 0x80) break;
    }
    at += length;
    fields.push({ isPiece: tag === 10, bytes: bytes.subarray(begin, at) });
  }
  const pieces = fields.filter(({ isPiece }) => isPiece).slice(0, 40);
  return Buffer.concat([...pieces, ...fields.filter(({ isPiece }) => !isPiece)].map((field) => field.bytes));
}
