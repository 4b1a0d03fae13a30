/** Between the messages of `worker.proto` and the native engine's values. */
import { decodeStepBody, encodeResultBody } from '../common/step-codec.js';
import type { NativeStep, NativeStepResult } from '../native/binding/addon.js';
import type { Step__Output } from '../proto/generated/tandem/v1/Step.js';
import type { StepResult } from '../proto/generated/tandem/v1/StepResult.js';

export function decodeStep({ stepId, body }: Step__Output): NativeStep {
  return { stepId, ...decodeStepBody(body) };
}

export function encodeStepResult(result: NativeStepResult): StepResult {
  return {
    stepId: result.stepId,
    body: encodeResultBody(result.results),
    computeMicros: Math.round(result.computeMicros),
    collectiveMicros: Math.round(result.collectiveMicros),
    evaluateMicros: Math.round(result.evaluateMicros),
  };
}
