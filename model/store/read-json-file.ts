import { CheckpointError } from '../../common/errors.js';
import { openRegularFile, readExactly } from './open-regular-file.js';

/**
 * Reads and parses a JSON file of at most `maxBytes`.
 * @throws CheckpointError where it is missing, no regular file, too long or no JSON
 */
export async function readJsonFile(path: string, maxBytes: number): Promise<unknown> {
  const text = await readTextFile(path, maxBytes);
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new CheckpointError(`${path} is not JSON: ${(error as Error).message.replaceAll(/\s+/g, ' ')}`);
  }
}

/** Reads a UTF-8 file of at most `maxBytes`. @throws CheckpointError where it is missing, no regular file or too long */
export async function readTextFile(path: string, maxBytes: number): Promise<string> {
  const file = await openRegularFile(path);
  try {
    if (file.size > maxBytes) throw new CheckpointError(`${path} has ${file.size} bytes, at most ${maxBytes} are read`);
    return (await readExactly(file, 0, file.size, path)).toString('utf8');
  } finally {
    await file.handle.close();
  }
}
