import fc from 'fast-check';
import { expect, test } from 'vitest';
import { generate } from './blank-filling.js';
import { FakeModel } from './fake-model.js';
import { letterModel, LETTERS, requestOf } from './letter-model.js';
import type { GenerationRequest, Mode } from './request.js';
import { generationRequirements, scoreRequirements } from './requirements.js';
import { score } from './scoring.js';

const { vocabSize, mask, gmask, smask, sop, eop, eos } = LETTERS;

/** A model in which sequences must never be longer than said. */
class MeasuredModel extends FakeModel {
  longest = 0;
  override execute(op: Parameters<FakeModel['execute']>[0]): ReturnType<FakeModel['execute']> {
    const result = super.execute(op);
    this.longest = Math.max(this.longest, op.sequence.length);
    return result;
  }
}

const anyRequest: fc.Arbitrary<GenerationRequest> = fc
  .record({
    parts: fc.array(fc.constantFrom('a', 'bcd', 'efghij', '[MASK]', '[gMASK]', '[sMASK]'), { maxLength: 7 }),
    mode: fc.constantFrom<Mode>('fill-blanks', 'fill-blanks', 'mask', 'gmask', 'unidirectional'),
    maxNewTokens: fc.constantFrom(null, 0, 1, 3, 7),
    maxRowTokens: fc.constantFrom(null, 8, 20, 33),
    n: fc.integer({ min: 1, max: 4 }),
    numBeams: fc.constantFrom(0, 0, 1, 3),
    bannedTokens: fc.constantFrom([], [mask, gmask, smask], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, sop, 16, 17, 18, 19]), // the last: masks or the end
    endTokens: fc.constantFrom([], [eop, eos]),
    seed: fc.bigInt({ min: 0n, max: 99n }),
  })
  .map(({ parts, mode, n, numBeams, ...rest }) => {
    const text = mode === 'unidirectional' || mode === 'gmask' ? parts.filter((part) => !part.includes('MASK')).join('') : parts.join('');
    const beams =
      numBeams === 0
        ? null
        : { numBeams, lengthPenalty: 1, noRepeatNgramSize: 0, deterministic: true, considerEnd: true, bannedPrefixes: [] };
    return requestOf(text, { mode, n: beams ? 1 : n, beams, sampling: { temperature: 1, topK: 0, topP: 0 }, ...rest });
  });

test('no generation comes to hold more than was said', () => {
  let reached = 0;
  let runs = 0;
  fc.assert(
    fc.property(anyRequest, fc.constantFrom(1, 3, 4), (request, blockSize) => {
      const model = new MeasuredModel(vocabSize, blockSize);
      let said;
      try {
        said = generationRequirements(request, letterModel, blockSize);
      } catch {
        expect(() => generate(request, letterModel, model, () => {}).next()).toThrow(); // the same requests are refused
        return;
      }
      model.run(generate(request, letterModel, model, () => {}));
      expect(model.peakBlocks).toBeLessThanOrEqual(said.blocks);
      expect(model.longest).toBeLessThanOrEqual(said.longestSequence);
      runs++;
      if (model.peakBlocks === said.blocks) reached++;
    }),
    { seed: 3, numRuns: 300 },
  );
  expect(runs).toBeGreaterThan(150);
  expect(reached).toBeGreaterThan(50); // the bound is not idle
});

test('a single blank that runs to its limit holds exactly what was said', () => {
  const letters = [mask, gmask, smask, sop, eop, eos, 16, 17, 18, 19];
  for (const n of [1, 3]) {
    for (let length = 1; length < 12; length++) {
      const request = requestOf('a'.repeat(length), {
        n,
        bannedTokens: letters,
        endTokens: [],
        sampling: { temperature: 1, topK: 0, topP: 0 },
      });
      const model = new FakeModel(vocabSize, 4);
      model.run(generate(request, letterModel, model, () => {}));
      expect([length, model.peakBlocks]).toEqual([length, generationRequirements(request, letterModel, 4).blocks]);
    }
  }
});

test('scoring holds exactly what was said', () => {
  const choice = fc.string({ unit: fc.constantFrom('a', 'b', 'c'), minLength: 1, maxLength: 9 });
  fc.assert(
    fc.property(
      fc.string({ unit: fc.constantFrom('a', 'b'), maxLength: 20 }),
      fc.array(choice, { minLength: 1, maxLength: 4 }),
      (text, choices) => {
        const request = {
          prompt: { kind: 'text', text } as const,
          mode: 'mask' as const,
          choices: choices.map((each) => ({ kind: 'text', text: each }) as const),
        };
        const model = new MeasuredModel(vocabSize, 4);
        model.run(score(request, letterModel, model));
        const said = scoreRequirements(request, letterModel, 4);
        expect(model.peakBlocks).toBe(said.blocks);
        expect(model.longest).toBeLessThanOrEqual(said.longestSequence);
      },
    ),
    { seed: 4, numRuns: 200 },
  );
});
