import { BackwardWriter, VARINT_BYTES, WIRE_TYPE } from '../backward-writer.js';
import type { GenerationDelta, TokenLogprob } from '../generation/request.js';

/**
 * A GenerateResponse with this Delta (`proto/tandem/v1/generation.proto`) in protobuf's wire format
 * (https://protobuf.dev/programming-guides/encoding/). Written out by hand: there is one for every token of every stream, and the general
 * encoder takes longer than scheduling the token does.
 */
export function encodeDelta({ output, blank, text, tokens, logprobs }: GenerationDelta): Buffer {
  let room = LEAST_BYTES + UTF8_BYTES * text.length + VARINT_BYTES * tokens.length;
  if (logprobs !== null) for (const { top } of logprobs) room += LOGPROB_BYTES * (1 + top.length);
  const out = new BackwardWriter(room);
  if (logprobs !== null) writeLogprobs(out, logprobs);
  const before = out.length;
  for (let i = tokens.length - 1; i >= 0; i--) out.varint(tokens[i]!);
  if (tokens.length > 0) out.message(FIELD.tokens, before);
  if (text !== '') out.text(FIELD.text, text);
  if (blank !== 0) out.uint32(FIELD.blank, blank);
  if (output !== 0) out.uint32(FIELD.output, output);
  out.message(FIELD.delta, 0);
  return out.finish();
}

function writeLogprobs(out: BackwardWriter, logprobs: readonly TokenLogprob[]): void {
  for (let i = logprobs.length - 1; i >= 0; i--) {
    const { token, logprob, top } = logprobs[i]!;
    const before = out.length;
    for (let j = top.length - 1; j >= 0; j--) {
      const beforeTop = out.length;
      out.float(FIELD.logprob, top[j]!.logprob);
      out.uint32(FIELD.token, top[j]!.token);
      out.message(FIELD.top, beforeTop);
    }
    out.float(FIELD.logprob, logprob);
    out.uint32(FIELD.token, token);
    out.message(FIELD.logprobs, before);
  }
}

/** Tags: the number of the field and its wire type. */
const FIELD = {
  delta: (1 << 3) | WIRE_TYPE.bytes,
  output: (1 << 3) | WIRE_TYPE.varint,
  blank: (2 << 3) | WIRE_TYPE.varint,
  text: (3 << 3) | WIRE_TYPE.bytes,
  tokens: (4 << 3) | WIRE_TYPE.bytes,
  logprobs: (5 << 3) | WIRE_TYPE.bytes,
  // Of TokenLogprob and TopToken.
  token: (1 << 3) | WIRE_TYPE.varint,
  logprob: (2 << 3) | WIRE_TYPE.fixed32,
  top: (3 << 3) | WIRE_TYPE.bytes,
} as const;

const UTF8_BYTES = 3;
/** At most: two tags, a varint, a float, and the tag and length of the message around them. */
const LOGPROB_BYTES = 2 + VARINT_BYTES + 4 + 1 + VARINT_BYTES;
/** At most, of a Delta without text, tokens and logprobs: five tags, and as many varints. */
const LEAST_BYTES = 5 * (1 + VARINT_BYTES);
