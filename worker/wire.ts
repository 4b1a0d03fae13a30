/** Between the messages of `worker.proto` and the native engine's values. */
import type { NativeExtend, NativeExtendResult, NativeNoise, NativeStep, NativeStepResult, NativeWant } from '../native/binding/addon.js';
import type { Extend__Output } from '../proto/generated/tandem/v1/Extend.js';
import type { ExtendResult } from '../proto/generated/tandem/v1/ExtendResult.js';
import type { Noise__Output } from '../proto/generated/tandem/v1/Noise.js';
import type { Step__Output } from '../proto/generated/tandem/v1/Step.js';
import type { StepResult } from '../proto/generated/tandem/v1/StepResult.js';

export function decodeStep(step: Step__Output): NativeStep {
  return { stepId: step.stepId, blockCopies: Uint32Array.from(step.blockCopies), extends: step.extends.map(decodeExtend) };
}

function decodeExtend(extend: Extend__Output): NativeExtend {
  return {
    tokens: Uint32Array.from(extend.tokens),
    positions: Uint32Array.from(extend.positions),
    blockTable: Uint32Array.from(extend.blockTable),
    cachedTokens: extend.cachedTokens,
    bidirectionalTokens: extend.bidirectionalTokens,
    want: decodeWant(extend),
  };
}

function decodeWant({ sample, candidates, targets, logits }: Extend__Output): NativeWant {
  if (sample) {
    const { temperature, topK, topP, bannedTokens, noise, topLogprobs } = sample;
    return {
      kind: 'sample',
      params: { temperature, topK, topP, bannedTokens: Uint32Array.from(bannedTokens) },
      noise: decodeNoise(noise),
      topLogprobs,
    };
  }
  if (candidates) {
    const { count, bannedTokens, noise } = candidates;
    return { kind: 'candidates', count, bannedTokens: Uint32Array.from(bannedTokens), noise: noise ? decodeNoise(noise) : null };
  }
  if (targets) return { kind: 'targets', tokens: Uint32Array.from(targets.tokens) };
  if (logits) return { kind: 'logits', rows: logits.rows };
  return { kind: 'none' };
}

function decodeNoise(noise: Noise__Output | null): NativeNoise {
  if (!noise) return { seed: 0n, stream: 0, position: 0 };
  return { seed: (BigInt(noise.seedHigh) << 32n) | BigInt(noise.seedLow), stream: noise.stream, position: noise.position };
}

export function encodeStepResult(result: NativeStepResult): StepResult {
  return {
    stepId: result.stepId,
    results: result.results.map(encodeResult),
    computeMicros: Math.round(result.computeMicros),
    collectiveMicros: Math.round(result.collectiveMicros),
  };
}

function encodeResult(result: NativeExtendResult): ExtendResult {
  switch (result.kind) {
    case 'none':
      return {};
    case 'sample':
      return {
        sample: {
          token: result.token,
          logprob: result.logprob,
          topTokens: Array.from(result.topTokens),
          topLogprobs: Array.from(result.topLogprobs),
        },
      };
    case 'candidates':
      return {
        candidates: { tokens: Array.from(result.tokens), logprobs: Array.from(result.logprobs), keys: Array.from(result.keys) },
      };
    case 'targets':
      return { targets: { logprobs: Array.from(result.logprobs) } };
    case 'logits':
      return { logits: { logits: Buffer.from(result.logits.buffer, result.logits.byteOffset, result.logits.byteLength) } };
  }
}
