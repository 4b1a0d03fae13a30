import { InvalidRequestError, PromptTooLongError } from '../../common/errors.js';
import type { ModelConfig } from '../../model/model-config.js';
import type { Sequences, Strategy } from './strategy.js';

/** One run of tokens, as given: no mask, `<sop>` or position is added. */
export interface LogitsRequest {
  readonly ids: readonly number[];
  readonly positions: readonly number[];
  readonly bidirectionalTokens: number;
  /** How many last positions to report. */
  readonly rows: number;
}

/** Most bytes of logits in one answer: they travel through the coordinator in one piece. */
const MAX_LOGITS_BYTES = 256 * 1024 * 1024;

/** Raw logits of the last `rows` positions, [rows, vocabSize]. @throws InvalidRequestError, PromptTooLongError at once */
export function* logits(request: LogitsRequest, config: ModelConfig, sequences: Sequences): Strategy<Float32Array> {
  checkLogitsRequest(request, config);
  const { ids, positions, bidirectionalTokens, rows } = request;
  const sequence = sequences.create();
  const [result] = yield [{ sequence, tokens: ids, positions, bidirectionalTokens, want: { kind: 'logits', rows } }];
  if (result?.kind !== 'logits') throw new Error('an Extend that wanted logits gave something else');
  return result.logits;
}

/** @throws InvalidRequestError, PromptTooLongError */
export function checkLogitsRequest({ ids, positions, bidirectionalTokens, rows }: LogitsRequest, config: ModelConfig): void {
  if (ids.length === 0) throw new InvalidRequestError('no tokens: give at least one', 'ids');
  if (ids.length > config.maxSequenceLength) {
    throw new PromptTooLongError(`${ids.length} tokens, the model takes ${config.maxSequenceLength}`);
  }
  if (positions.length !== ids.length)
    throw new InvalidRequestError(`${positions.length} positions for ${ids.length} tokens: give one for each`, 'positions');
  const wrongId = ids.find((id) => id >= config.vocabSize);
  if (wrongId !== undefined)
    throw new InvalidRequestError(`token id ${wrongId}, the vocabulary has ids 0 to ${config.vocabSize - 1}`, 'ids');
  const wrongPosition = positions.find((position) => position >= config.maxSequenceLength);
  if (wrongPosition !== undefined) {
    throw new InvalidRequestError(`position ${wrongPosition}, the model has positions 0 to ${config.maxSequenceLength - 1}`, 'positions');
  }
  if (bidirectionalTokens > ids.length)
    throw new InvalidRequestError(`${bidirectionalTokens} bidirectional tokens of ${ids.length}`, 'bidirectional_tokens');
  if (rows < 1 || rows > ids.length) throw new InvalidRequestError(`logits of ${rows} positions of ${ids.length} tokens`, 'rows');
  const bytes = rows * config.vocabSize * 4;
  if (bytes > MAX_LOGITS_BYTES) {
    const fit = Math.floor(MAX_LOGITS_BYTES / (config.vocabSize * 4));
    throw new InvalidRequestError(`logits of ${rows} positions are ${bytes} bytes, ${fit} positions fit into one answer`, 'rows');
  }
}
