import { crc32 } from 'node:zlib';
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { loadImportKernels, scriptKernels } from './import-kernels.js';

const native = loadImportKernels();

test('the native kernels are there', () => {
  expect(native.isNative).toBe(true);
});

test('native quantisation has the bits of the definition in TypeScript', () => {
  const anyCase = fc
    .record({ bits: fc.constantFrom(8 as const, 4 as const), groups: fc.integer({ min: 1, max: 3 }), rows: fc.integer({ min: 1, max: 3 }) })
    .chain((shape) =>
      fc.record({ ...asConstants(shape), half: fc.integer({ min: 1, max: 40 }), limit: fc.constantFrom(0x7c00, 0x0800, 0x0010) }),
    )
    .chain(({ bits, groups, rows, half, limit }) => {
      const columns = 2 * half * groups;
      const weight = fc
        .tuple(fc.integer({ min: 0, max: limit - 1 }), fc.boolean())
        .map(([magnitude, sign]) => magnitude | (sign ? 0x8000 : 0));
      const weights = fc.array(weight, { minLength: rows * columns, maxLength: rows * columns });
      return weights.map((values) => ({ bits, groups, rows, columns, weights: Uint16Array.from(values) }));
    });
  fc.assert(
    fc.property(anyCase, ({ bits, groups, rows, columns, weights }) => {
      const [seen, expected] = [native, scriptKernels].map((kernels) => {
        const into = { qweight: new Uint8Array((weights.length * bits) / 8), scales: new Uint16Array(rows * groups) };
        kernels.quantizeRows(weights, columns, { bits, groups, name: 'w' }, into);
        return into;
      });
      expect(seen).toEqual(expected);
    }),
  );
});

test.each([{ kernels: native }, { kernels: scriptKernels }])(
  'native: $kernels.isNative: a weight that is not finite is named by its row in the tensor',
  ({ kernels }) => {
    const weights = new Uint16Array(4 * 6).fill(0x3c00);
    weights[2 * 6 + 5] = 0xfc00;
    const into = { qweight: new Uint8Array(24), scales: new Uint16Array(4) };
    expect(() => kernels.quantizeRows(weights, 6, { bits: 8, groups: 1, name: 'layer.weight', firstRow: 100 }, into)).toThrow(
      'tensor layer.weight holds an infinite or NaN weight in row 102: it cannot be quantised',
    );
  },
);

test('the native CRC-32 is that of zlib', () => {
  fc.assert(
    fc.property(fc.uint8Array({ minLength: 1, maxLength: 500 }), fc.nat(0xffffffff), (bytes, previous) => {
      expect(native.crc32(bytes, previous)).toBe(crc32(bytes, previous));
    }),
  );
});

function asConstants<Shape extends object>(shape: Shape): { [Key in keyof Shape]: fc.Arbitrary<Shape[Key]> } {
  return Object.fromEntries(Object.entries(shape).map(([key, value]) => [key, fc.constant(value)])) as never;
}
