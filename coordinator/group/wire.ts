/** Between the engine boundary's values and the messages of `worker.proto`. */
import { EngineError } from '../../common/errors.js';
import { WorkerLink } from '../../common/services.js';
import { decodeResultBody, encodeStepBody } from '../../common/step-codec.js';
import type { CoordinatorMessage } from '../../proto/generated/tandem/v1/CoordinatorMessage.js';
import type { Step } from '../../proto/generated/tandem/v1/Step.js';
import { BackwardWriter, VARINT_BYTES, WIRE_TYPE } from '../backward-writer.js';
import type { ExtendResult, Want } from '../generation/strategy.js';
import type { EngineExtend, EngineStep } from './engine.js';

const { Attach } = WorkerLink.service;

/** `WorkerLink` as the coordinator serves it. All ranks get the same steps, one after another: each is encoded once. */
export const linkService = { ...WorkerLink.service, Attach: { ...Attach, responseSerialize: serialize } };

let last: { readonly step: Step; readonly bytes: Buffer } | null = null;

function serialize(message: CoordinatorMessage): Buffer {
  const { step } = message;
  if (!step) return Attach.responseSerialize(message);
  if (last?.step !== step) last = { step, bytes: encodeStepMessage(step) };
  return last.bytes;
}

function encodeStepMessage({ stepId = 0, body }: Step): Buffer {
  const bytes = body as Uint8Array;
  const out = new BackwardWriter(bytes.length + 5 * VARINT_BYTES);
  out.bytes(FIELD.body, bytes);
  out.uint32(FIELD.stepId, stepId);
  out.message(FIELD.step, 0);
  return out.finish();
}

const FIELD = {
  step: (2 << 3) | WIRE_TYPE.bytes,
  stepId: (1 << 3) | WIRE_TYPE.varint,
  body: (2 << 3) | WIRE_TYPE.bytes,
} as const;

export function encodeStep(stepId: number, step: EngineStep): Step {
  return { stepId, body: encodeStepBody(step) };
}

/**
 * The results of a step, one for each Extend; none for Extends that end before the last layer.
 * @throws EngineError if they are not what was asked for
 */
export function decodeResults(
  body: Uint8Array,
  asked: readonly EngineExtend[],
  size: { vocabSize: number; numLayers: number },
): ExtendResult[] {
  const results = decodeResultBody(body);
  if (results.length !== asked.length) throw new EngineError(`${results.length} results for ${asked.length} Extends`);
  for (let i = 0; i < results.length; i++) {
    const { want, endLayer } = asked[i]!;
    if (!answers(results[i]!, endLayer < size.numLayers ? NOTHING : want, size.vocabSize)) {
      throw new EngineError(`the answer to a want of ${want.kind} is ${results[i]!.kind}, or of another size`);
    }
  }
  return results;
}

const NOTHING: Want = { kind: 'none' };

function answers(result: ExtendResult, want: Want, vocabSize: number): boolean {
  if (result.kind === 'error') return want.kind !== 'none';
  if (result.kind !== want.kind) return false;
  const areTokens = (tokens: ArrayLike<number>): boolean => Array.prototype.every.call(tokens, (token: number) => token < vocabSize);
  switch (result.kind) {
    case 'none':
      return true;
    case 'sample': {
      const { topLogprobs } = want as Extract<Want, { kind: 'sample' }>;
      const isWhole = result.topTokens.length === topLogprobs && result.topLogprobs.length === topLogprobs;
      return isWhole && result.token < vocabSize && (topLogprobs === 0 || areTokens(result.topTokens));
    }
    case 'candidates': {
      const { count } = want as Extract<Want, { kind: 'candidates' }>;
      const isWhole = [result.tokens, result.logprobs, result.keys].every((list) => list.length === count);
      return isWhole && areTokens(result.tokens);
    }
    case 'targets':
      return result.logprobs.length === (want as Extract<Want, { kind: 'targets' }>).tokens.length;
    case 'logits':
      return result.logits.length === (want as Extract<Want, { kind: 'logits' }>).rows * vocabSize;
  }
}
