import { CheckpointError } from '../../common/errors.js';

/** What a SentencePiece model file says, as far as decoding needs it. Field numbers: sentencepiece_model.proto. */
export interface SentencePieceModel {
  readonly pieces: readonly Piece[];
  readonly addDummyPrefix: boolean;
  readonly removeExtraWhitespaces: boolean;
  /** What `<unk>` decodes to. */
  readonly unknownSurface: string;
}

export interface Piece {
  /** With `▁` (U+2581) for a space. */
  readonly text: string;
  readonly type: number;
}

export const PIECE_TYPE = { normal: 1, unknown: 2, control: 3, userDefined: 4, unused: 5, byte: 6 } as const;

/**
 * Reads a serialised ModelProto. Every length is checked against the bytes that are there.
 *
 * @param name of the file, for the message
 * @throws CheckpointError the bytes are no SentencePiece model, or one that a decoder without denormalising rules cannot serve
 */
export function parseSentencePieceModel(bytes: Uint8Array, name: string): SentencePieceModel {
  const pieces: Piece[] = [];
  const model = { addDummyPrefix: true, removeExtraWhitespaces: true, unknownSurface: ' \u2047 ' };
  try {
    for (const field of fieldsOf(bytes)) {
      if (field.number === 1) pieces.push(parsePiece(asBytes(field)));
      if (field.number === 2) {
        for (const spec of fieldsOf(asBytes(field))) if (spec.number === 44) model.unknownSurface = asText(spec);
      }
      if (field.number === 3) {
        for (const spec of fieldsOf(asBytes(field))) {
          if (spec.number === 3) model.addDummyPrefix = spec.value !== 0;
          if (spec.number === 4) model.removeExtraWhitespaces = spec.value !== 0;
        }
      }
      if (field.number === 5) {
        for (const spec of fieldsOf(asBytes(field))) {
          if (spec.number === 2 && asBytes(spec).length > 0) throw new Error('it has denormalising rules, which are not supported');
        }
      }
    }
    if (pieces.length > 0 && pieces[0]!.type !== PIECE_TYPE.unknown) throw new Error('its piece 0 is not the unknown piece');
  } catch (error) {
    throw new CheckpointError(`${name} is not a SentencePiece model that can be used: ${(error as Error).message}`);
  }
  return { pieces, ...model };
}

/**
 * The model with the pieces that icetk appends in memory (model-spec section 8): protobuf messages merge by concatenation, repeated
 * fields append, later scalars win. All appended pieces have score 0.
 */
export function extendModel(bytes: Uint8Array, appended: readonly Piece[]): Uint8Array {
  const byteFallback = lengthDelimited(2, Buffer.from([...varint((35 << 3) | 0), 1])); // trainer_spec.byte_fallback = true
  const pieces = appended.map((piece) =>
    lengthDelimited(
      1,
      Buffer.concat([lengthDelimited(1, Buffer.from(piece.text)), Buffer.from([(2 << 3) | 5, 0, 0, 0, 0, 3 << 3, piece.type])]),
    ),
  );
  return Buffer.concat([bytes, byteFallback, ...pieces]);
}

/** One protobuf field: a number (varint; fixed-width ones read as 0, none is needed) or bytes. */
interface Field {
  readonly number: number;
  readonly value: number | Uint8Array;
}

function* fieldsOf(bytes: Uint8Array): Generator<Field> {
  let at = 0;
  const readVarint = (): number => {
    let value = 0;
    for (let i = 0; i < 10; i++) {
      const byte = bytes[at++];
      if (byte === undefined) throw new Error('it ends inside a number');
      value += (byte & 0x7f) * 2 ** (7 * i);
      if (byte < 0x80) return value;
    }
    throw new Error(`a number is longer than 10 bytes at byte ${at}`);
  };
  const skip = (length: number): Uint8Array => {
    if (length > bytes.length - at) throw new Error(`a field of ${length} bytes at byte ${at} runs past the end (${bytes.length} bytes)`);
    at += length;
    return bytes.subarray(at - length, at);
  };
  while (at < bytes.length) {
    const tag = readVarint();
    const number = Math.floor(tag / 8);
    const wireType = tag % 8;
    if (number === 0) throw new Error(`field number 0 at byte ${at}`);
    if (wireType === 0) yield { number, value: readVarint() };
    else if (wireType === 1 || wireType === 5) {
      skip(wireType === 1 ? 8 : 4);
      yield { number, value: 0 };
    } else if (wireType === 2) yield { number, value: skip(readVarint()) };
    else throw new Error(`wire type ${wireType} at byte ${at}`);
  }
}

function parsePiece(bytes: Uint8Array): Piece {
  let text = '';
  let type: number = PIECE_TYPE.normal;
  for (const field of fieldsOf(bytes)) {
    if (field.number === 1) text = asText(field);
    if (field.number === 3 && typeof field.value === 'number') type = field.value;
  }
  return { text, type };
}

function asBytes(field: Field): Uint8Array {
  if (typeof field.value === 'number') throw new Error(`field ${field.number} is a number where bytes belong`);
  return field.value;
}

function asText(field: Field): string {
  return Buffer.from(asBytes(field)).toString('utf8');
}

function varint(value: number): number[] {
  return value < 0x80 ? [value] : [(value & 0x7f) | 0x80, ...varint(value >>> 7)];
}

function lengthDelimited(number: number, value: Uint8Array): Buffer {
  return Buffer.concat([Buffer.from(varint((number << 3) | 2)), Buffer.from(varint(value.length)), value]);
}
