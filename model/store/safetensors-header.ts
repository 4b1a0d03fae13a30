import { z } from 'zod';
import { CheckpointError } from '../../common/errors.js';
import { openRegularFile, readExactly } from './open-regular-file.js';
import { tensorBytes, type StoreDtype } from './store-format.js';

export interface SafetensorsEntry {
  readonly dtype: StoreDtype;
  readonly shape: readonly number[];
  /** Bytes of the file, absolute. */
  readonly offset: number;
  readonly bytes: number;
}

const maxHeaderBytes = 100_000_000; // the limit of the safetensors library

/**
 * Reads and checks the header of one safetensors file: every tensor's bytes are its shape times its type, and together they fill the data
 * part without gap or overlap, up to the real end of the file.
 * @throws CheckpointError names the file and the tensor
 */
export async function readSafetensorsHeader(path: string): Promise<Map<string, SafetensorsEntry>> {
  const file = await openRegularFile(path);
  try {
    const length = file.size < 8 ? 0n : (await readExactly(file, 0, 8, path)).readBigUInt64LE();
    if (length < 2n || length > BigInt(Math.min(maxHeaderBytes, file.size - 8))) {
      throw new CheckpointError(`${path} is no safetensors file: it says its header has ${length} bytes, the file has ${file.size}`);
    }
    const text = (await readExactly(file, 8, Number(length), path)).toString('utf8');
    return checkEntries(parseHeader(text, path), { path, dataStart: 8 + Number(length), fileBytes: file.size });
  } finally {
    await file.handle.close();
  }
}

const dimension = z.int().min(0);
const headerEntry = z.strictObject({
  dtype: z.enum(['F32', 'F16', 'I8', 'U8']),
  shape: z.array(dimension).max(8),
  data_offsets: z.tuple([dimension, dimension]),
});
type HeaderEntry = z.infer<typeof headerEntry>;

function parseHeader(text: string, path: string): Map<string, HeaderEntry> {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch {
    throw new CheckpointError(`${path} is no safetensors file: its header is not JSON`);
  }
  if (typeof json !== 'object' || json === null || Array.isArray(json)) {
    throw new CheckpointError(`${path}: the safetensors header is no JSON object`);
  }
  const entries = new Map<string, HeaderEntry>();
  for (const [name, value] of Object.entries(json)) {
    if (name === '__metadata__') continue;
    const parsed = headerEntry.safeParse(value);
    if (!parsed.success) {
      const issue = parsed.error.issues[0]!;
      throw new CheckpointError(`${path}: tensor ${name}: ${issue.path.join('.')}: ${issue.message}`);
    }
    entries.set(name, parsed.data);
  }
  return entries;
}

function checkEntries(
  header: ReadonlyMap<string, HeaderEntry>,
  { path, dataStart, fileBytes }: { path: string; dataStart: number; fileBytes: number },
): Map<string, SafetensorsEntry> {
  const entries = new Map<string, SafetensorsEntry>();
  let expected = 0;
  for (const [name, { dtype, shape, data_offsets }] of [...header].sort(([, a], [, b]) => a.data_offsets[0] - b.data_offsets[0])) {
    const [begin, end] = data_offsets;
    const bytes = tensorBytes(dtype, shape);
    if (!Number.isSafeInteger(bytes) || end - begin !== bytes) {
      throw new CheckpointError(
        `${path}: tensor ${name} is ${dtype} [${shape.join(', ')}], ${bytes} bytes, but its offsets ${begin} to ${end} hold ${end - begin}`,
      );
    }
    if (begin !== expected) {
      throw new CheckpointError(`${path}: tensor ${name} begins at byte ${begin} of the data, ${expected} is where the one before it ends`);
    }
    if (dataStart + end > fileBytes) {
      throw new CheckpointError(
        `${path}: tensor ${name} ends at byte ${dataStart + end}, the file has ${fileBytes}: it is truncated or damaged`,
      );
    }
    expected = end;
    entries.set(name, { dtype, shape, offset: dataStart + begin, bytes });
  }
  if (dataStart + expected !== fileBytes) {
    throw new CheckpointError(`${path} has ${fileBytes} bytes, its header describes ${dataStart + expected}: it is truncated or damaged`);
  }
  return entries;
}
