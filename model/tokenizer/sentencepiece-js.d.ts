/** What Tandem uses of @agnai/sentencepiece-js 1.1.1: the C++ SentencePiece as WebAssembly, which ships without types. */
declare module '@agnai/sentencepiece-js' {
  export class SentencePieceProcessor {
    /** Makes the WebAssembly instance and loads the file; a model that does not load is not reported. */
    load(path: string): Promise<void>;
    encodeIds(text: string): number[];
    decodeIds(ids: readonly number[]): string;
    /** The embind module behind it, set by `load`. */
    sentencepiece: {
      readonly FS: { writeFile(path: string, data: Uint8Array): void; unlink(path: string): void };
      readonly StringView: new (text: string) => Handle & { getView(): Handle };
    };
    /** The C++ object, set by `load`. */
    processor: { Load(path: Handle): Handle & { ToString(): string } };
  }
  /** An object in WebAssembly memory; nothing frees it but `delete`. */
  interface Handle {
    delete(): void;
  }
}
