import { constants } from 'node:os';

/** A command that a signal ended has 128 and the signal's number as its status, as shells report it. */
const EXIT_SIGNAL = 128;

/**
 * Runs a command that Ctrl-C, SIGTERM or a closed terminal ends quietly: they abort the signal that `work` is given, and what `work`
 * throws from then on is a consequence. A second one ends the process at once.
 */
export async function interruptible(work: (signal: AbortSignal) => Promise<void>): Promise<void> {
  const interrupt = new AbortController();
  const onSignal = (signal: NodeJS.Signals): void => {
    process.exitCode = EXIT_SIGNAL + constants.signals[signal];
    if (interrupt.signal.aborted) process.exit();
    interrupt.abort();
  };
  const signals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;
  for (const signal of signals) process.on(signal, onSignal);
  try {
    await work(interrupt.signal);
  } catch (error) {
    if (!interrupt.signal.aborted) throw error;
  } finally {
    for (const signal of signals) process.off(signal, onSignal);
  }
}
