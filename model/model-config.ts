import { z } from 'zod';
import { ConfigError } from '../common/errors.js';

/**
 * The shape and the conventions of one GLM model, independent of how it is split. Field names follow GLM-130B's own
 * configuration; `config.json` of a store holds the same fields in snake_case (see store/README.md).
 */
export interface ModelConfig {
  readonly numLayers: number;
  readonly hiddenSize: number;
  readonly numAttentionHeads: number;
  readonly innerHiddenSize: number;
  /** Rows of the embedding matrix, padding rows included: they take part in softmax and sampling like any token. */
  readonly vocabSize: number;
  readonly maxSequenceLength: number;
  readonly layernormEpsilon: number;
  readonly rotaryBase: number;
  /** How rotary angles are rounded: `half` is how GLM-130B was run, `fp32` what newer code does (model-spec section 2). */
  readonly rotaryPrecision: RotaryPrecision;
  readonly specialTokens: SpecialTokens;
  /** Null: the store has no tokenizer and is served by token ids alone. */
  readonly tokenizer: TokenizerConfig | null;
}

export type RotaryPrecision = 'fp32' | 'half' | 'half_freq';

/** Token ids of the words that steer generation. */
export interface SpecialTokens {
  readonly mask: number; // [MASK]
  readonly gmask: number; // [gMASK]
  readonly smask: number; // [sMASK]
  readonly eod: number;
  readonly sop: number;
  readonly eop: number;
  readonly enc: number; // <ENC>
  readonly dblock: number; // <dBLOCK>
  readonly eos: number; // </s>
}

/** The icetk layout of ids around one SentencePiece file (model-spec section 8). */
export interface TokenizerConfig {
  /** File name inside the store's folder. */
  readonly file: string;
  readonly imageTokenOffset: number;
  /** Pieces in the SentencePiece file itself. */
  readonly numTextPieces: number;
}

/** What one tensor-parallel rank holds of each dimension. */
export interface LocalShare {
  readonly localHeads: number;
  readonly localHidden: number;
  readonly localInner: number;
  readonly localVocab: number;
}

/** GLM-130B itself (model-spec sections 0, 2 and 8): used where a checkpoint of its shape comes without a configuration. */
export const glm130b: ModelConfig = {
  numLayers: 70,
  hiddenSize: 12288,
  numAttentionHeads: 96,
  innerHiddenSize: 32768,
  vocabSize: 150528,
  maxSequenceLength: 2048,
  layernormEpsilon: 1e-5,
  rotaryBase: 10000,
  rotaryPrecision: 'half',
  specialTokens: {
    mask: 150000,
    gmask: 150001,
    smask: 150002,
    eod: 150003,
    sop: 150004,
    eop: 150005,
    enc: 150006,
    dblock: 150007,
    eos: 20002,
  },
  tokenizer: { file: 'tokenizer.model', imageTokenOffset: 20000, numTextPieces: 130000 },
};

/**
 * Reads a model configuration: the `config.json` of a store, or one in the words of a GLM checkpoint (`special_tokens` or
 * `special`; `tokenizer_file`, `image_token_offset` and `num_text_pieces` at the top). Keys that describe something else are ignored.
 * Where `rotary_precision` is not given it is `half` for GLM-130B's own shape and `fp32` for any other.
 *
 * @param json the parsed file
 * @param source what to call the file in an error
 * @throws ConfigError names the key and what it may hold
 */
export function parseModelConfig(json: unknown, source: string): ModelConfig {
  const parsed = configFile.safeParse(json);
  if (!parsed.success) throw new ConfigError(`${source}: ${describeIssue(parsed.error.issues[0])}`);
  const file = parsed.data;
  if (file.format !== undefined && file.format_version !== 1) {
    throw new ConfigError(
      `${source}: format_version is ${file.format_version ?? 'missing'}, this version of Tandem reads 1; import the model again`,
    );
  }
  const special = file.special_tokens ?? file.special;
  if (special === undefined) {
    throw new ConfigError(`${source}: special_tokens is missing; it maps [MASK], [gMASK], sop, eop, ... to token ids`);
  }
  const shape = {
    numLayers: file.num_layers,
    hiddenSize: file.hidden_size,
    numAttentionHeads: file.num_attention_heads,
    innerHiddenSize: file.inner_hidden_size,
    vocabSize: file.vocab_size,
    maxSequenceLength: file.max_sequence_length,
  };
  const config: ModelConfig = {
    ...shape,
    layernormEpsilon: file.layernorm_epsilon,
    rotaryBase: file.rotary_base,
    rotaryPrecision: file.rotary_precision ?? (hasShapeOfGlm130b(shape) ? 'half' : 'fp32'),
    specialTokens: {
      mask: special['[MASK]'],
      gmask: special['[gMASK]'],
      smask: special['[sMASK]'],
      eod: special.eod,
      sop: special.sop,
      eop: special.eop,
      enc: special.ENC,
      dblock: special.dBLOCK,
      eos: special.eos,
    },
    tokenizer: tokenizerOf(file, source),
  };
  checkConsistency(config, source);
  return config;
}

/** The `config.json` of a store without its `quantization`, keys in the order of store/README.md. */
export function modelConfigToJson(config: ModelConfig): Record<string, unknown> {
  const { specialTokens: special, tokenizer } = config;
  return {
    format: 'tandem-store',
    format_version: 1,
    num_layers: config.numLayers,
    hidden_size: config.hiddenSize,
    num_attention_heads: config.numAttentionHeads,
    inner_hidden_size: config.innerHiddenSize,
    vocab_size: config.vocabSize,
    max_sequence_length: config.maxSequenceLength,
    layernorm_epsilon: config.layernormEpsilon,
    rotary_base: config.rotaryBase,
    rotary_precision: config.rotaryPrecision,
    special_tokens: {
      '[MASK]': special.mask,
      '[gMASK]': special.gmask,
      '[sMASK]': special.smask,
      eod: special.eod,
      sop: special.sop,
      eop: special.eop,
      ENC: special.enc,
      dBLOCK: special.dblock,
      eos: special.eos,
    },
    tokenizer:
      tokenizer === null
        ? null
        : { file: tokenizer.file, image_token_offset: tokenizer.imageTokenOffset, num_text_pieces: tokenizer.numTextPieces },
  };
}

/**
 * What each of `worldSize` ranks holds.
 * @throws ConfigError where `worldSize` does not divide heads, inner size, vocabulary and hidden size; it names the world sizes that do
 */
export function localShare(config: ModelConfig, worldSize: number): LocalShare {
  const possible = possibleWorldSizes(config);
  if (!possible.includes(worldSize)) {
    throw new ConfigError(
      `world size ${worldSize} does not divide the model: ${config.numAttentionHeads} heads, inner size ${config.innerHiddenSize}, ` +
        `vocabulary ${config.vocabSize}, hidden size ${config.hiddenSize}; possible world sizes are ${possible.join(', ')}`,
    );
  }
  return {
    localHeads: config.numAttentionHeads / worldSize,
    localHidden: config.hiddenSize / worldSize,
    localInner: config.innerHiddenSize / worldSize,
    localVocab: config.vocabSize / worldSize,
  };
}

/** Ascending: every number of ranks that divides heads, inner size, vocabulary and hidden size (model-spec section 1.2). */
export function possibleWorldSizes(config: ModelConfig): number[] {
  const dimensions = [config.numAttentionHeads, config.innerHiddenSize, config.vocabSize, config.hiddenSize];
  const sizes: number[] = [];
  for (let size = 1; size <= config.numAttentionHeads; size++) {
    if (dimensions.every((dimension) => dimension % size === 0)) sizes.push(size);
  }
  return sizes;
}

/**
 * The icetk layout that the special tokens imply: `</s>` is piece 2 and the specials follow the last piece (model-spec section 8). For
 * configurations that name no tokenizer. Null where the ids fit no such layout.
 */
export function impliedTokenizer(special: SpecialTokens): TokenizerConfig | null {
  const imageTokenOffset = special.eos - 2;
  const numTextPieces = special.mask - imageTokenOffset;
  if (imageTokenOffset < 0 || numTextPieces < 3) return null;
  return { file: 'tokenizer.model', imageTokenOffset, numTextPieces };
}

// Sizes far beyond any model still make products such as 2 * inner * hidden exact in a double.
const size = z
  .int()
  .min(1)
  .max(2 ** 24);
const tokenId = z
  .int()
  .min(0)
  .max(2 ** 24);
const plainFileName = z.string().regex(/^[A-Za-z0-9_][A-Za-z0-9._-]*$/, 'must be a plain file name');

const specialTokens = z.object({
  '[MASK]': tokenId,
  '[gMASK]': tokenId,
  '[sMASK]': tokenId,
  eod: tokenId,
  sop: tokenId,
  eop: tokenId,
  ENC: tokenId,
  dBLOCK: tokenId,
  eos: tokenId,
});

const configFile = z.object({
  format: z.literal('tandem-store').optional(),
  format_version: z.int().optional(),
  num_layers: z.int().min(1).max(10_000),
  hidden_size: size,
  num_attention_heads: z.int().min(1).max(65_536),
  inner_hidden_size: size,
  vocab_size: size,
  max_sequence_length: size,
  layernorm_epsilon: z.number().positive().max(1).default(1e-5),
  rotary_base: z.number().positive().default(10_000),
  rotary_precision: z.enum(['fp32', 'half', 'half_freq']).optional(),
  position_encoding_2d: z.literal(false).optional(), // GLM-130B has one position id per token; ChatGLM-6B, of another shape, has two
  special_tokens: specialTokens.optional(),
  special: specialTokens.optional(),
  tokenizer: z.object({ file: plainFileName, image_token_offset: tokenId, num_text_pieces: size }).nullable().optional(),
  tokenizer_file: plainFileName.optional(),
  image_token_offset: tokenId.optional(),
  num_text_pieces: size.optional(),
});
type ConfigFile = z.infer<typeof configFile>;

function tokenizerOf(file: ConfigFile, source: string): TokenizerConfig | null {
  if (file.tokenizer) {
    const { file: name, image_token_offset: imageTokenOffset, num_text_pieces: numTextPieces } = file.tokenizer;
    return { file: name, imageTokenOffset, numTextPieces };
  }
  if (file.tokenizer_file === undefined) return null;
  if (file.image_token_offset === undefined || file.num_text_pieces === undefined) {
    throw new ConfigError(`${source}: tokenizer_file is given without image_token_offset and num_text_pieces; give both or neither`);
  }
  return { file: file.tokenizer_file, imageTokenOffset: file.image_token_offset, numTextPieces: file.num_text_pieces };
}

function checkConsistency(config: ModelConfig, source: string): void {
  const { hiddenSize, numAttentionHeads, vocabSize } = config;
  if (hiddenSize % (2 * numAttentionHeads) !== 0) {
    throw new ConfigError(
      `${source}: hidden_size ${hiddenSize} with num_attention_heads ${numAttentionHeads}: the head size must be a whole even number`,
    );
  }
  for (const [name, id] of Object.entries(config.specialTokens)) {
    if (id >= vocabSize) throw new ConfigError(`${source}: special token ${name} is ${id}, vocab_size is ${vocabSize}`);
  }
}

function hasShapeOfGlm130b(
  shape: Pick<ModelConfig, 'numLayers' | 'hiddenSize' | 'numAttentionHeads' | 'innerHiddenSize' | 'vocabSize'>,
): boolean {
  const keys = ['numLayers', 'hiddenSize', 'numAttentionHeads', 'innerHiddenSize', 'vocabSize'] as const;
  return keys.every((key) => shape[key] === glm130b[key]);
}

function describeIssue(issue: z.core.$ZodIssue | undefined): string {
  if (issue === undefined) return 'is not a model configuration';
  const key = issue.path.join('.');
  return key === '' ? 'is not a JSON object' : `${key}: ${issue.message}`;
}
