import { join } from 'node:path';
import { expect, test } from 'vitest';
import { openStore } from '../store/open-store.js';
import { ensureTinyStore, tinyStoreDir } from './tiny-model.js';

test('the tiny store is there after ensureTinyStore, however many ask for it at once', async () => {
  const dirs = await Promise.all([ensureTinyStore(), ensureTinyStore(), ensureTinyStore()]);
  expect(new Set(dirs)).toEqual(new Set([tinyStoreDir]));
  const store = await openStore(tinyStoreDir);
  expect(store.config).toMatchObject({
    numLayers: 6,
    hiddenSize: 256,
    vocabSize: 4096,
    tokenizer: { file: 'tokenizer.model', numTextPieces: 3740 },
  });
  expect(store.tensors.reduce((sum, { shape }) => sum + shape.reduce((product, count) => product * count, 1), 0)).toBe(6_183_936); // README.md
  expect(store.tokenizerPath).toBe(join(tinyStoreDir, 'tokenizer.model'));
});
