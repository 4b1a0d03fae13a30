/** The thread of a ThreadedEncoder: loads the tokenizer, then answers texts with ids. What goes wrong ends it, which is what the other side is told. */
import { parentPort, workerData } from 'node:worker_threads';
import { encodeText, type EncoderThreadData, type TextToEncode } from './threaded-encoder.js';
import { loadTokenizer } from './tokenizer.js';

const { path, config } = workerData as EncoderThreadData;
const tokenizer = await loadTokenizer(path, config);
const port = parentPort!;
port.on('message', (texts: readonly TextToEncode[]) => {
  const ids = texts.map((text) => Uint32Array.from(encodeText(tokenizer, text)));
  port.postMessage(
    ids,
    ids.map(({ buffer }) => buffer),
  );
});
