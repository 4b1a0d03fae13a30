import { vi } from 'vitest';
import yargs, { type CommandModule } from 'yargs';

/** Runs a command line as the main program does, in this process, and gives back what was printed. Rejects with the command's error. */
export async function runCommand(commands: readonly unknown[], args: readonly string[]): Promise<{ stdout: string; stderr: string }> {
  const printed = { stdout: '', stderr: '' };
  const spies = (['stdout', 'stderr'] as const).map((stream) =>
    vi.spyOn(process[stream], 'write').mockImplementation((chunk) => {
      printed[stream] += String(chunk);
      return true;
    }),
  );
  try {
    await yargs([...args])
      .locale('en')
      .command(commands as CommandModule[])
      .strict()
      .exitProcess(false)
      .fail((message, error) => {
        throw error ?? new Error(message);
      })
      .parseAsync();
  } finally {
    for (const spy of spies) spy.mockRestore();
  }
  return printed;
}
