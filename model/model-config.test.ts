import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { ConfigError } from '../common/errors.js';
import { packageRoot } from '../common/package-root.js';
import { glm130b, impliedTokenizer, localShare, modelConfigToJson, parseModelConfig, possibleWorldSizes } from './model-config.js';

const tinyJson = JSON.parse(readFileSync(join(packageRoot, 'model/tiny/config.json'), 'utf8')) as Record<string, unknown>;
const randomJson = JSON.parse(readFileSync(join(packageRoot, 'test/golden/random/A/config.json'), 'utf8')) as Record<string, unknown>;

test('the tiny model’s own configuration', () => {
  expect(parseModelConfig(tinyJson, 'config.json')).toEqual({
    numLayers: 6,
    hiddenSize: 256,
    numAttentionHeads: 4,
    innerHiddenSize: 768,
    vocabSize: 4096,
    maxSequenceLength: 512,
    layernormEpsilon: 1e-5,
    rotaryBase: 10000,
    rotaryPrecision: 'fp32',
    specialTokens: { mask: 3740, gmask: 3741, smask: 3742, eod: 3743, sop: 3744, eop: 3745, enc: 3746, dblock: 3747, eos: 2 },
    tokenizer: { file: 'tokenizer.model', imageTokenOffset: 0, numTextPieces: 3740 },
  });
});

test('the form with "special", without rotary base and tokenizer', () => {
  expect(parseModelConfig(randomJson, 'config.json')).toMatchObject({
    numLayers: 3,
    rotaryBase: 10000,
    specialTokens: { mask: 500, dblock: 507, eos: 2 },
    tokenizer: null,
  });
});

test.each([{ config: glm130b }, { config: parseModelConfig(tinyJson, '') }, { config: parseModelConfig(randomJson, '') }])(
  'a store’s config.json says the same',
  ({ config }) => {
    expect(parseModelConfig(JSON.parse(JSON.stringify(modelConfigToJson(config))), 'config.json')).toEqual(config);
  },
);

test('rotary angles are in half precision for the shape of GLM-130B, unless the file says otherwise', () => {
  const { rotary_precision: _, ...json } = modelConfigToJson(glm130b);
  expect(parseModelConfig(json, '').rotaryPrecision).toBe('half');
  expect(parseModelConfig({ ...json, num_layers: 71 }, '').rotaryPrecision).toBe('fp32');
  expect(parseModelConfig({ ...json, rotary_precision: 'half_freq' }, '').rotaryPrecision).toBe('half_freq');
});

describe('what a configuration may not say', () => {
  test.each([
    { change: { num_layers: 0 }, message: 'c.json: num_layers: ' },
    { change: { hidden_size: '256' }, message: 'c.json: hidden_size: ' },
    { change: { vocab_size: 1e300 }, message: 'c.json: vocab_size: ' },
    {
      change: { num_attention_heads: 3 },
      message: 'c.json: hidden_size 256 with num_attention_heads 3: the head size must be a whole even number',
    },
    { change: { rotary_precision: 'fp8' }, message: 'c.json: rotary_precision: ' },
    { change: { position_encoding_2d: true }, message: 'c.json: position_encoding_2d: ' },
    { change: { special_tokens: undefined }, message: 'c.json: special_tokens is missing' },
    {
      change: { special_tokens: { ...(tinyJson['special_tokens'] as object), sop: 4096 } },
      message: 'c.json: special token sop is 4096, vocab_size is 4096',
    },
    { change: { special_tokens: { sop: 1 } }, message: 'c.json: special_tokens.[MASK]: ' },
    { change: { tokenizer_file: '../tokenizer.model' }, message: 'c.json: tokenizer_file: must be a plain file name' },
    { change: { num_text_pieces: undefined }, message: 'c.json: tokenizer_file is given without image_token_offset and num_text_pieces' },
    { change: { format: 'tandem-store', format_version: 2 }, message: 'c.json: format_version is 2, this version of Tandem reads 1' },
  ])('$message', ({ change, message }) => {
    const parse = () => parseModelConfig({ ...tinyJson, ...change }, 'c.json');
    expect(parse).toThrow(ConfigError);
    expect(parse).toThrow(message);
  });

  test.each([{ json: null }, { json: [] }, { json: 'text' }])('$json is no configuration', ({ json }) => {
    expect(() => parseModelConfig(json, 'c.json')).toThrow('c.json: is not a JSON object');
  });
});

describe('what one rank holds', () => {
  test('GLM-130B on 8 ranks', () => {
    expect(localShare(glm130b, 8)).toEqual({ localHeads: 12, localHidden: 1536, localInner: 4096, localVocab: 18816 });
    expect(possibleWorldSizes(glm130b)).toEqual([1, 2, 4, 8, 16, 32]);
  });

  test.each([3, 8, 0, -1, 1.5, NaN])('%d ranks do not divide the tiny model', (worldSize) => {
    const share = () => localShare(parseModelConfig(tinyJson, ''), worldSize);
    expect(share).toThrow(ConfigError);
    expect(share).toThrow(
      `world size ${worldSize} does not divide the model: 4 heads, inner size 768, vocabulary 4096, hidden size 256; possible world sizes are 1, 2, 4`,
    );
  });
});

test('the special tokens imply where the pieces lie', () => {
  expect(impliedTokenizer(glm130b.specialTokens)).toEqual(glm130b.tokenizer);
  expect(impliedTokenizer({ ...glm130b.specialTokens, eos: 1 })).toBeNull();
});
