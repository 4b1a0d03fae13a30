import { packageVersion } from '../../../common/package-root.js';
import type { FinishReason, GenerationDelta, GenerationOutput, GenerationResult } from '../../generation/request.js';
import type { Completed } from '../../job.js';
import type { RequestTimings } from '../../status/observer.js';
import type { ChoicePart, ChoiceText } from './choice-text.js';
import type { CompletionCall } from './completion-body.js';
import { unixSeconds } from './models.js';

type Result = Completed<GenerationResult>;

/** The choices of all prompts of a call as they come, and the objects that tell of them. */
export class CompletionAnswer {
  private readonly created = unixSeconds();

  /** @param choices by prompt, then by sample (with beams: one, of the best beam) */
  constructor(
    readonly id: string,
    private readonly model: string,
    private readonly call: CompletionCall,
    private readonly choices: readonly (readonly ChoiceText[])[],
  ) {}

  add(prompt: number, delta: GenerationDelta): ChoicePart[] {
    return this.choices[prompt]![delta.output]!.add(delta);
  }

  /** Of a stream: what a delta comes to. */
  chunks(prompt: number, delta: GenerationDelta): object[] {
    const index = this.indexOf(prompt, delta.output);
    return this.add(prompt, delta).map((part) => this.chunk(this.partChoice(index, part)));
  }

  /** Of a stream: the ends of a prompt's choices; the last one has the timings of the prompt. */
  lastChunks(prompt: number, { value, timings }: Result): object[] {
    return value.outputs.flatMap((output, sample) => {
      const choice = this.choices[prompt]![sample]!;
      const index = this.indexOf(prompt, sample);
      const last = { index, text: '', logprobs: null, ...this.endFields(output, choice) };
      return [
        ...choice.finish(output.blanks.length).map((part) => this.chunk(this.partChoice(index, part))),
        this.chunk(last, sample === value.outputs.length - 1 ? { timings: encodeTimings([timings]) } : {}),
      ];
    });
  }

  /** Of a stream, where it was asked for. */
  usageChunk(results: readonly Result[]): object {
    return { ...this.head(), choices: [], ...this.totals(results) };
  }

  whole(results: readonly Result[]): object {
    const choices = results.flatMap(({ value }, prompt) =>
      (this.call.isBeamSearch ? this.beamChoices(prompt, value) : this.sampledChoices(prompt, value)).map((choice, i) => ({
        ...choice,
        index: this.indexOf(prompt, i),
      })),
    );
    return { ...this.head(), choices, ...this.totals(results) };
  }

  private sampledChoices(prompt: number, value: GenerationResult): object[] {
    const candidates = value.outputs.map((output, sample) => ({ output, choice: this.choices[prompt]![sample]! }));
    if (this.call.isBestOf) candidates.sort((a, b) => b.choice.meanLogprob - a.choice.meanLogprob);
    return candidates.slice(0, this.call.numChoices).map(({ output, choice }) => this.wholeChoice(output, choice));
  }

  /** Best first; of the others only the texts are known. */
  private beamChoices(prompt: number, value: GenerationResult): object[] {
    const output = value.outputs[0]!;
    const choice = this.choices[prompt]![0]!;
    const echoed = choice.text.slice(0, choice.text.length - choice.blanks.join('\n').length);
    return output.beams.slice(0, this.call.numChoices).map(({ blanks }, i) => {
      if (i === 0) return this.wholeChoice(output, choice);
      const own = this.call.hasOwnMasks ? { blanks: blanks.map((text) => ({ text })) } : {};
      return { text: echoed + blanks.join('\n'), logprobs: null, finish_reason: null, ...own };
    });
  }

  private wholeChoice(output: GenerationOutput, choice: ChoiceText): object {
    choice.finish(output.blanks.length);
    return {
      text: choice.text,
      logprobs: this.call.logprobs === null ? null : choice.logprobs,
      ...this.endFields(output, choice),
      ...(this.call.returnTokenIds ? { token_ids: choice.tokenIds } : {}),
    };
  }

  private endFields(output: GenerationOutput, choice: ChoiceText): object {
    const finish_reason = finishReason(output.finish);
    if (!this.call.hasOwnMasks) return { finish_reason };
    const blanks = output.blanks.map(({ tokens, maskPosition, finish }, i) => ({
      text: choice.blanks[i],
      token_ids: tokens,
      mask_position: maskPosition,
      finish_reason: finishReason(finish),
    }));
    return { finish_reason, blanks };
  }

  private partChoice(index: number, { text, blank, logprobs, tokenIds }: ChoicePart): object {
    return {
      index,
      text,
      logprobs: this.call.logprobs === null ? null : logprobs,
      finish_reason: null,
      ...(blank !== null && this.call.hasOwnMasks ? { blank } : {}),
      ...(this.call.returnTokenIds ? { token_ids: tokenIds } : {}),
    };
  }

  private chunk(choice: object, more: object = {}): object {
    return { ...this.head(), choices: [choice], ...(this.call.includeUsage ? { usage: null } : {}), ...more };
  }

  private head(): object {
    return {
      id: this.id,
      object: 'text_completion',
      created: this.created,
      model: this.model,
      system_fingerprint: `tandem-${packageVersion}`,
    };
  }

  private totals(results: readonly Result[]): object {
    const sum = (count: (result: Result) => number): number => results.reduce((total, result) => total + count(result), 0);
    const prompt_tokens = sum(({ value }) => value.promptTokens);
    const completion_tokens = sum(({ value }) => value.generatedTokens);
    return {
      usage: {
        prompt_tokens,
        completion_tokens,
        total_tokens: prompt_tokens + completion_tokens,
        prompt_tokens_details: { cached_tokens: sum(cachedPromptTokens) },
      },
      timings: encodeTimings(results.map(({ timings }) => timings)),
    };
  }

  private indexOf(prompt: number, choice: number): number {
    return prompt * this.call.numChoices + choice;
  }
}

/** The loop tells it once it has a context cache. */
function cachedPromptTokens(result: Result & { readonly cachedPromptTokens?: number }): number {
  return result.cachedPromptTokens ?? 0;
}

/** Several prompts run side by side: the longest of each. */
function encodeTimings(timings: readonly RequestTimings[]): object {
  const longest = (name: keyof RequestTimings): number => Math.max(...timings.map((each) => each[name]));
  return { queue_ms: longest('queueMs'), prefill_ms: longest('prefillMs'), decode_ms: longest('decodeMs'), stall_ms: longest('stallMs') };
}

function finishReason(finish: FinishReason): 'stop' | 'length' {
  return finish === 'length' ? 'length' : 'stop';
}
