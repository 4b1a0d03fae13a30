/** Shows one answer in the terminal while it is generated: the prompt's text with its blanks filled in and underlined. */
import type { Delta__Output } from '../proto/generated/tandem/v1/Delta.js';

const UNDERLINE = '\u001b[4m';
const RESET = '\u001b[0m';

export interface AnswerView {
  delta(delta: Delta__Output): void;
  /** The rest of the prompt's text, and the end of the line. */
  finish(): void;
  /** Ends the line where it is: there will be no more. */
  stop(): void;
}

/** @param write where pieces go as they come; @param styled whether it understands terminal escapes */
export function answerView(prompt: string, write: (text: string) => void, styled: boolean): AnswerView {
  const pieces = splitAtMasks(prompt);
  let openBlank = -1;
  const closeBlank = (): void => {
    if (openBlank >= 0 && styled) write(RESET);
  };
  const advanceTo = (blank: number): void => {
    while (openBlank < blank) {
      closeBlank();
      openBlank += 1;
      write(pieces[openBlank] ?? '');
      if (styled) write(UNDERLINE);
    }
  };
  return {
    delta({ output, blank, text }) {
      if (output !== 0) return; // further samples are shown when they are complete
      advanceTo(blank);
      write(text);
    },
    finish() {
      advanceTo(pieces.length - 2);
      closeBlank();
      write(`${pieces.at(-1)!}\n`);
    },
    stop() {
      closeBlank();
      if (openBlank >= 0) write('\n');
    },
  };
}

/** The text between the masks that generate.py fills: all of the first kind present; without one, " [gMASK]" at the end. */
function splitAtMasks(prompt: string): string[] {
  const mask = ['[MASK]', '[sMASK]', '[gMASK]'].find((word) => prompt.includes(word));
  return mask ? prompt.split(mask) : [`${prompt} `, ''];
}
