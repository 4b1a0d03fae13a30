/** Golden data of test/golden (computed by the model's original code, see test/golden/README.md), and stores of the golden checkpoints. */
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { packageRoot } from '../../common/package-root.js';
import { importCheckpoint } from '../../model/import/import-checkpoint.js';

export const RANDOM_MODELS = ['A', 'B', 'E'] as const;
export type RandomModel = (typeof RANDOM_MODELS)[number];

/** Heads of each random model: what the world size has to divide. */
export const RANDOM_HEADS: Readonly<Record<RandomModel, number>> = { A: 4, B: 2, E: 4 };

/** Floats as golden files hold them: base64 of little-endian float32, row-major. */
export interface GoldenFloats {
  readonly shape: readonly number[];
  readonly f32: string;
}

export interface GoldenRow {
  readonly tokens: number[];
  readonly position_ids: number[] | string;
  readonly mask: GoldenMask;
}

export interface GoldenMask {
  readonly type: 'prefix' | 'causal' | 'rows';
  readonly visible?: number;
  readonly rows?: readonly string[];
}

const goldenDir = join(packageRoot, 'test', 'golden');

export function readGolden<T>(path: string): T {
  return JSON.parse(readFileSync(join(goldenDir, path), 'utf8')) as T;
}

export function floats({ f32 }: GoldenFloats): Float32Array {
  return new Float32Array(Uint8Array.from(Buffer.from(f32, 'base64')).buffer);
}

/** The tokens that every row sees from the start on. */
export function bidirectionalTokens(mask: GoldenMask): number {
  if (mask.type === 'rows') throw new Error('a mask by rows is no prefix');
  return mask.type === 'prefix' ? mask.visible! : 0;
}

export function positionsOf(positions: readonly number[] | string, count: number): number[] {
  return typeof positions === 'string' ? Array.from({ length: count }, (_, i) => i) : [...positions];
}

export interface RandomStoreOptions {
  /** Folder below `checkpoints`. */
  readonly layout?: string;
  readonly quantize?: 8 | 4;
  /** Ranks that vector-wise scales are for. */
  readonly ranks?: number;
  readonly rotaryPrecision?: 'fp32' | 'half' | 'half_freq';
}

/** The store of a golden checkpoint, imported once for each `scratch` folder. */
export async function importRandomStore(scratch: string, model: RandomModel, options: RandomStoreOptions = {}): Promise<string> {
  const { layout = 'tp1', quantize = null, ranks, rotaryPrecision = 'fp32' } = options;
  const name = `${model}-${layout}-${quantize ?? 'asis'}-${ranks ?? 0}-${rotaryPrecision}`;
  const store = join(scratch, name);
  if (existsSync(store)) return store;
  const source = join(goldenDir, 'random', model);
  const configPath = join(scratch, `${name}.config.json`);
  const config = JSON.parse(readFileSync(join(source, 'config.json'), 'utf8')) as object;
  writeFileSync(configPath, JSON.stringify({ ...config, rotary_precision: rotaryPrecision }));
  await importCheckpoint({
    from: join(source, 'checkpoints', layout),
    to: store,
    configPath,
    ...(quantize === null ? {} : { quantize, group: 'vector' as const, ranks: ranks ?? null }),
  });
  return store;
}

/**
 * The prompt of a golden row that ends in `<sop>`, to be filled at `maskPosition` as one span. Mode gmask appends its mask itself; a
 * mask of a kind that no other mode takes is filled as the first blank of fill-blanks.
 */
export function spanPrompt(input: readonly number[], maskPosition: number, kind: 'mask' | 'gmask' | 'smask') {
  const row = input.slice(0, -1);
  if (kind === 'mask') return { ids: { ids: row }, mode: 'MODE_MASK' as const };
  if (kind === 'gmask' && maskPosition === row.length - 1) return { ids: { ids: row.slice(0, -1) }, mode: 'MODE_GMASK' as const };
  return { ids: { ids: row }, mode: 'MODE_FILL_BLANKS' as const };
}

/** Log-softmax at one token, with double sums. */
export function logSoftmaxAt(logits: Float32Array, token: number): number {
  return logits[token]! - logSumExp(logits);
}

export function logSumExp(logits: Float32Array): number {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  return largest + Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit - largest), 0));
}

export function argmax(logits: Float32Array): number {
  return logits.reduce((best, logit, token) => (logit > logits[best]! ? token : best), 0);
}

/** Largest absolute difference; NaN counts as infinite. */
export function maxDifference(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) return Infinity;
  let largest = 0;
  for (let i = 0; i < a.length; i++) {
    const difference = Math.abs(a[i]! - b[i]!);
    if (!(difference <= largest)) largest = Number.isNaN(difference) ? Infinity : difference;
  }
  return largest;
}
