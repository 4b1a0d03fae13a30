import { crc32 } from 'node:zlib';
import { ConfigError } from '../../common/errors.js';
import { loadAddon } from '../../native/binding/addon.js';
import { notFinite, quantizeRows, type QuantizedRows, type QuantizeOptions } from './quantize.js';
import type { Crc32 } from './tensor-reader.js';

/** What an import spends its time with. */
export interface ImportKernels {
  readonly isNative: boolean;
  readonly crc32: Crc32;
  /** Bytes of a file that will be read soon, and that were written; nothing depends on what becomes of it. */
  hintRead(fd: number, offset: number, length: number): void;
  hintWritten(fd: number, offset: number, length: number): void;
  /** {@link quantizeRows}, into memory of the caller. @throws CheckpointError where a weight is infinite or NaN */
  quantizeRows(weights: Uint16Array, columns: number, options: QuantizeOptions, into: QuantizedRows): void;
}

/** Native where the addon is built: the same bits, many times as fast. */
export function loadImportKernels(): ImportKernels {
  try {
    const addon = loadAddon();
    return {
      isNative: true,
      crc32: (bytes, previous) => addon.crc32(bytes, previous),
      hintRead: (fd, offset, length) => addon.hintRead(fd, offset, length),
      hintWritten: (fd, offset, length) => addon.hintWritten(fd, offset, length),
      quantizeRows(weights, columns, { groups, bits, name, firstRow = 0 }, { qweight, scales }) {
        const row = addon.quantizeWeights({ weights, columns, groups, bits, qweight, scales });
        if (row >= 0) throw notFinite(name, firstRow + row);
      },
    };
  } catch (error) {
    if (error instanceof ConfigError) return scriptKernels;
    throw error;
  }
}

export const scriptKernels: ImportKernels = {
  isNative: false,
  crc32,
  hintRead: () => {},
  hintWritten: () => {},
  quantizeRows(weights, columns, options, { qweight, scales }) {
    const result = quantizeRows(weights, columns, options);
    qweight.set(result.qweight);
    scales.set(result.scales);
  },
};
