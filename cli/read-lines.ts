import { ConfigError } from '../common/errors.js';

/**
 * The lines of a UTF-8 stream, without their ends. Only a line feed ends one: readline would also split at U+2028, which JSON leaves
 * as it is inside strings.
 * @throws ConfigError for bytes that are no UTF-8
 */
export async function* readLines(stream: AsyncIterable<Uint8Array>, name: string): AsyncGenerator<string> {
  const decoder = new TextDecoder('utf-8', { fatal: true });
  const decode = (bytes?: Uint8Array): string => {
    try {
      return decoder.decode(bytes, { stream: bytes !== undefined });
    } catch {
      throw new ConfigError(`${name} is not UTF-8 text`);
    }
  };
  let rest = '';
  for await (const chunk of stream) {
    const lines = (rest + decode(chunk)).split('\n');
    rest = lines.pop()!;
    yield* lines;
  }
  rest += decode();
  if (rest !== '') yield rest;
}
