import { emitKeypressEvents, type Key } from 'node:readline';
import type { ReadStream, WriteStream } from 'node:tty';

export interface Screen {
  readonly columns: number;
  readonly rows: number;
  /** Replaces what is shown. At most `rows` lines of `columns`. */
  draw(lines: readonly string[]): void;
  close(): void;
}

export interface ScreenEvents {
  readonly onKey: (key: Key) => void;
  readonly onResize: () => void;
}

const ENTER = '\u001b[?1049h\u001b[?25l\u001b[2J'; // the alternate screen, no cursor
const LEAVE = '\u001b[?25h\u001b[?1049l';
/** The terminal shows a frame when it is complete; those that do not know this ignore it. */
const BEGIN_FRAME = '\u001b[?2026h\u001b[H';
const END_FRAME = '\u001b[J\u001b[?2026l';
const CLEAR_TO_END_OF_LINE = '\u001b[K';

/** Takes the terminal until it is closed; whatever ends the process gives it back as it was. */
export function openScreen(stdin: ReadStream, stdout: WriteStream, { onKey, onResize }: ScreenEvents): Screen {
  const isInteractive = stdin.isTTY;
  const onKeypress = (_text: string | undefined, key: Key): void => onKey(key);
  let isOpen = true;
  const close = (): void => {
    if (!isOpen) return;
    isOpen = false;
    process.off('exit', close);
    stdout.off('resize', onResize);
    stdout.write(LEAVE);
    if (!isInteractive) return;
    stdin.off('keypress', onKeypress);
    stdin.setRawMode(false);
    stdin.pause();
  };
  process.once('exit', close);
  stdout.on('resize', onResize);
  if (isInteractive) {
    emitKeypressEvents(stdin);
    stdin.on('keypress', onKeypress);
    stdin.setRawMode(true);
    stdin.resume();
  }
  stdout.write(ENTER);
  return {
    get columns() {
      return stdout.columns;
    },
    get rows() {
      return stdout.rows;
    },
    draw(lines) {
      if (!isOpen || stdout.writableNeedDrain) return; // a terminal that does not keep up gets the next frame
      stdout.write(BEGIN_FRAME + lines.map((line) => line + CLEAR_TO_END_OF_LINE).join('\r\n') + END_FRAME);
    },
    close,
  };
}
