/** From results to wire messages. */
import type { GenerateResponse } from '../../proto/generated/tandem/v1/GenerateResponse.js';
import type { ScoreResponse } from '../../proto/generated/tandem/v1/ScoreResponse.js';
import type { Timings } from '../../proto/generated/tandem/v1/Timings.js';
import type { FinishReason, GenerationResult, ScoreResult } from '../generation/request.js';
import type { Completed } from '../job.js';
import type { RequestTimings } from '../status/observer.js';

const FINISH_REASONS = { end: 'FINISH_REASON_END', stop: 'FINISH_REASON_STOP', length: 'FINISH_REASON_LENGTH' } as const satisfies Record<
  FinishReason,
  string
>;

export function encodeFinish(requestId: string, { value, timings, cachedPromptTokens }: Completed<GenerationResult>): GenerateResponse {
  return {
    finish: {
      requestId,
      outputs: value.outputs.map((output) => ({
        reason: FINISH_REASONS[output.finish],
        text: output.text,
        styledText: output.styledText,
        ids: [...output.ids],
        blanks: output.blanks.map(({ text, tokens, maskPosition, finish }) => ({
          text,
          tokens: [...tokens],
          maskPosition,
          reason: FINISH_REASONS[finish],
        })),
        beams: output.beams.map(({ ids, text, blanks, score }) => ({ ids: [...ids], text, blanks: [...blanks], score })),
      })),
      usage: { promptTokens: value.promptTokens, generatedTokens: value.generatedTokens, cachedPromptTokens },
      timings: encodeTimings(timings),
    },
  };
}

export function encodeScore({ value, timings }: Completed<ScoreResult>): ScoreResponse {
  return {
    choices: value.choices.map(({ tokens, tokenLogprobs, logprob }) => ({
      tokens: [...tokens],
      tokenLogprobs: [...tokenLogprobs],
      logprob,
    })),
    contextTokens: value.contextTokens,
    timings: encodeTimings(timings),
  };
}

function encodeTimings({ queueMs, prefillMs, decodeMs, stallMs }: RequestTimings): Timings {
  return { queueMs, prefillMs, decodeMs, stallMs };
}
