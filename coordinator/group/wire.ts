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

/** @throws EngineError if the worker answered something else than was asked for */
export function decodeResult(result: ExtendResult__Output, want: Want): ExtendResult {
  const { sample, candidates, targets, logits } = result;
  if (want.kind === 'none') return { kind: 'none' };
  if (want.kind === 'sample' && sample) return { kind: 'sample', ...sample };
  if (want.kind === 'candidates' && candidates) return { kind: 'candidates', ...candidates };
  if (want.kind === 'targets' && targets) return { kind: 'targets', ...targets };
  if (want.kind === 'logits' && logits) return { kind: 'logits', logits: toFloats(logits.logits) };
  throw new EngineError(`the worker answered ${result.result ?? 'nothing'} where ${want.kind} was asked for`);
}

/** A copy, because a float array has to be aligned and a message's bytes need not be. */
function toFloats(bytes: Uint8Array): Float32Array {
  return new Float32Array(Uint8Array.from(bytes).buffer);
}
