/** Between the engine boundary's values and the messages of `worker.proto`. */
import { EngineError } from '../../common/errors.js';
import type { Extend } from '../../proto/generated/tandem/v1/Extend.js';
import type { ExtendResult__Output } from '../../proto/generated/tandem/v1/ExtendResult.js';
import type { Noise as WireNoise } from '../../proto/generated/tandem/v1/Noise.js';
import type { Step } from '../../proto/generated/tandem/v1/Step.js';
import type { ExtendResult, Noise, Want } from '../generation/strategy.js';
import type { EngineExtend, EngineStep } from './engine.js';

export function encodeStep(stepId: number, step: EngineStep): Step {
  return { stepId, blockCopies: [...step.blockCopies], extends: step.extends.map(encodeExtend) };
}

function encodeExtend(extend: EngineExtend): Extend {
  return {
    tokens: extend.tokens as number[],
    positions: extend.positions as number[],
    blockTable: extend.blockTable as number[],
    cachedTokens: extend.cachedTokens,
    bidirectionalTokens: extend.bidirectionalTokens,
    ...encodeWant(extend.want),
  };
}

function encodeWant(want: Want): Partial<Extend> {
  switch (want.kind) {
    case 'none':
      return {};
    case 'sample': {
      const { temperature, topK, topP, bannedTokens } = want.params;
      return {
        sample: { temperature, topK, topP, bannedTokens: [...bannedTokens], noise: encodeNoise(want.noise), topLogprobs: want.topLogprobs },
      };
    }
    case 'candidates':
      return {
        candidates: { count: want.count, bannedTokens: [...want.bannedTokens], noise: want.noise ? encodeNoise(want.noise) : null },
      };
    case 'targets':
      return { targets: { tokens: [...want.tokens] } };
    case 'logits':
      return { logits: { rows: want.rows } };
  }
}

function encodeNoise({ seed, stream, position }: Noise): WireNoise {
  return { seedLow: Number(seed & 0xffffffffn), seedHigh: Number((seed >> 32n) & 0xffffffffn), stream, position };
}

/** The results of a step, one for each Extend. @throws EngineError if they are not what was asked for */
export function decodeResults(results: readonly ExtendResult__Output[], asked: readonly EngineExtend[], vocabSize: number): ExtendResult[] {
  if (results.length !== asked.length) throw new EngineError(`${results.length} results for ${asked.length} Extends`);
  return results.map((result, i) => decodeResult(result, asked[i]!.want, vocabSize));
}

function decodeResult(result: ExtendResult__Output, want: Want, vocabSize: number): ExtendResult {
  const { sample, candidates, targets, logits } = result;
  const areTokens = (tokens: readonly number[]): boolean => tokens.every((token) => token < vocabSize);
  switch (want.kind) {
    case 'none':
      return { kind: 'none' };
    case 'sample': {
      const isWhole = sample?.topTokens.length === want.topLogprobs && sample.topLogprobs.length === want.topLogprobs;
      if (sample && isWhole && areTokens([sample.token, ...sample.topTokens])) return { kind: 'sample', ...sample };
      break;
    }
    case 'candidates': {
      const isWhole = [candidates?.tokens, candidates?.logprobs, candidates?.keys].every((list) => list?.length === want.count);
      if (candidates && isWhole && areTokens(candidates.tokens)) return { kind: 'candidates', ...candidates };
      break;
    }
    case 'targets':
      if (targets?.logprobs.length === want.tokens.length) return { kind: 'targets', ...targets };
      break;
    case 'logits':
      if (logits?.logits.length === want.rows * vocabSize * 4) return { kind: 'logits', logits: toFloats(logits.logits) };
      break;
  }
  throw new EngineError(`the answer to a want of ${want.kind} is ${result.result ?? 'empty'} or of another size`);
}

/** A copy, because a float array has to be aligned and a message's bytes need not be. */
function toFloats(bytes: Uint8Array): Float32Array {
  return new Float32Array(Uint8Array.from(bytes).buffer);
}
