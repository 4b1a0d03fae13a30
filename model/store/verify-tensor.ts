import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { CheckpointError } from '../../common/errors.js';
import type { StoreTensor } from './open-store.js';

/** Reads a tensor's bytes and compares them with the recorded SHA-256. @throws CheckpointError where they differ or nothing was recorded */
export async function verifyTensor(tensor: StoreTensor): Promise<void> {
  if (tensor.sha256 === null) {
    throw new CheckpointError(`tensor ${tensor.name} has no recorded SHA-256, so it cannot be verified; import the model again`);
  }
  const seen = await sha256OfTensor(tensor);
  if (seen !== tensor.sha256) {
    throw new CheckpointError(
      `tensor ${tensor.name} in ${tensor.file} has SHA-256 ${seen}, recorded is ${tensor.sha256}: the store is damaged, import it again`,
    );
  }
}

async function sha256OfTensor({ file, offset, bytes }: StoreTensor): Promise<string> {
  const hash = createHash('sha256');
  if (bytes === 0) return hash.digest('hex');
  for await (const chunk of createReadStream(file, { start: offset, end: offset + bytes - 1, highWaterMark: 2 ** 20 })) {
    hash.update(chunk as Buffer);
  }
  return hash.digest('hex');
}
