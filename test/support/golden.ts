/** Golden data for tests: what is imported for one test file goes when it has run. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll } from 'vitest';
import { importRandomStore, type RandomModel, type RandomStoreOptions } from './golden-data.js';

export * from './golden-data.js';

const scratch = mkdtempSync(join(tmpdir(), 'tandem-golden-'));
afterAll(() => rmSync(scratch, { recursive: true, force: true }));

/** The store of a golden checkpoint, imported once for each test file. */
export function randomStore(model: RandomModel, options: RandomStoreOptions = {}): Promise<string> {
  return importRandomStore(scratch, model, options);
}
