import type { ByteRange } from './byte-source.js';

export type TorchDtype = 'float16' | 'float32' | 'float64' | 'bfloat16' | 'int8' | 'uint8' | 'int16' | 'int32' | 'int64' | 'bool';

export interface TorchTensor {
  readonly name: string;
  readonly dtype: TorchDtype;
  readonly itemBytes: number;
  readonly shape: readonly number[];
  /** In elements. */
  readonly strides: readonly number[];
  /** First element in its storage. */
  readonly storageOffset: number;
  /** All of its storage, which other tensors may share. */
  readonly storage: ByteRange;
  /** CRC-32 of the storage, from the archive's directory. */
  readonly crc32: number;
}
