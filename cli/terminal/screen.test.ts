import { EventEmitter } from 'node:events';
import { PassThrough } from 'node:stream';
import type { ReadStream, WriteStream } from 'node:tty';
import { expect, test } from 'vitest';
import { openScreen } from './screen.js';

function terminal() {
  const keyboard = Object.assign(new PassThrough(), {
    isTTY: true,
    isRaw: false,
    setRawMode(mode: boolean) {
      this.isRaw = mode;
      return this;
    },
  });
  const display = Object.assign(new EventEmitter(), {
    ...{ columns: 80, rows: 24, writableNeedDrain: false, written: '' },
    write(text: string) {
      this.written += text;
      return true;
    },
  });
  const keys: (string | undefined)[] = [];
  let resizes = 0;
  const screen = openScreen(keyboard as unknown as ReadStream, display as unknown as WriteStream, {
    onKey: ({ name }) => keys.push(name),
    onResize: () => (resizes += 1),
  });
  return { keyboard, display, screen, keys, resizes: () => resizes };
}

test('takes the alternate screen and gives the terminal back as it was, once', () => {
  const { keyboard, display, screen } = terminal();
  expect(keyboard.isRaw).toBe(true);
  expect(display.written).toMatch(/^\u001b\[\?1049h\u001b\[\?25l/);
  screen.close();
  screen.close();
  expect(keyboard.isRaw).toBe(false);
  expect(display.written.split('\u001b[?1049l')).toHaveLength(2);
  expect(display.written).toMatch(/\u001b\[\?25h\u001b\[\?1049l$/);
  const before = display.written;
  screen.draw(['late']);
  expect(display.written).toBe(before);
});

test('the end of the process gives it back too', () => {
  const { display, screen } = terminal();
  const leaving = process.listeners('exit').at(-1)!;
  leaving(0);
  expect(display.written).toMatch(/\u001b\[\?1049l$/);
  screen.close();
});

test('a frame is drawn over the one before, unless the terminal does not keep up', () => {
  const { display, screen } = terminal();
  display.written = '';
  screen.draw(['one', 'two']);
  expect(display.written).toBe('\u001b[?2026h\u001b[Hone\u001b[K\r\ntwo\u001b[K\u001b[J\u001b[?2026l');
  display.writableNeedDrain = true;
  display.written = '';
  screen.draw(['three']);
  expect(display.written).toBe('');
  screen.close();
});

test('keys and sizes are reported while it is open', async () => {
  const { keyboard, display, screen, keys, resizes } = terminal();
  keyboard.write('q\u001b[A\u001b[6~\u0003');
  await new Promise((resolve) => setImmediate(resolve));
  expect(keys).toEqual(['q', 'up', 'pagedown', 'c']);
  display.emit('resize');
  expect(resizes()).toBe(1);
  screen.close();
  display.emit('resize');
  expect(resizes()).toBe(1);
});
