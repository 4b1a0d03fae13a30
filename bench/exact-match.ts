/** ASCII punctuation, Python's `string.punctuation`. */
const PUNCTUATION = /[!-/:-@[-`{-~]/g;

/** EM of the evaluation (model-spec 9.5): equal after normalising. */
export function exactMatch(prediction: string, target: string): boolean {
  return normalizeAnswer(prediction) === normalizeAnswer(target);
}

/** Lower case, ASCII punctuation deleted, the articles removed as whole words, white space collapsed: in this order. */
function normalizeAnswer(text: string): string {
  return text
    .toLowerCase()
    .replaceAll(PUNCTUATION, '')
    .replaceAll(/(?<![\p{L}\p{N}_])(a|an|the)(?![\p{L}\p{N}_])/gu, ' ')
    .split(/\s+/u)
    .filter((word) => word !== '')
    .join(' ');
}
