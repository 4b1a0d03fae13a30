import { freemem } from 'node:os';
import { PHASES, type Contestant, type Entrant, type Phase, type Sample } from './contestant.js';
import type { Limits } from './machine.js';
import type { ModelCase } from './model-cases.js';

/** Everyone measured once, phase by phase in turn, behind the machine's limits at that time. */
export interface Round {
  readonly limits: Limits;
  /** By the names of the contestants. */
  readonly samples: Readonly<Record<string, Readonly<Record<Phase, Sample>>>>;
}

export interface CaseRun {
  readonly rounds: readonly Round[];
  readonly about: Readonly<Record<string, Pick<Contestant, 'bytesPerToken' | 'description'>>>;
}

export interface RunOptions {
  readonly repeats: number;
  readonly measureLimits: () => Promise<Limits>;
  readonly progress: (message: string) => void;
}

/**
 * Runs the rounds. All contestants are loaded at once where memory permits, so that those of a pair follow each other within seconds; at rest they use no
 * processor. Where it does not permit that, each is loaded for each of its turns.
 */
export async function measureCase({ title, entrants }: ModelCase, { repeats, measureLimits, progress }: RunOptions): Promise<CaseRun> {
  const needed = entrants.reduce((sum, { memoryBytes }) => sum + memoryBytes, 0);
  const together = needed < freemem();
  if (!together) progress(`${title}: ${gigabytes(needed)} GB of memory for all at once are not free; they are loaded in turn`);
  const loaded = new Map<string, Contestant>();
  const about: Record<string, Pick<Contestant, 'bytesPerToken' | 'description'>> = {};
  const withContestant = async <T>(entrant: Entrant, work: (contestant: Contestant) => Promise<T>): Promise<T> => {
    const contestant = loaded.get(entrant.name) ?? (await load(entrant));
    try {
      return await work(contestant);
    } finally {
      if (!together) await unload(entrant.name);
    }
  };
  const load = async (entrant: Entrant): Promise<Contestant> => {
    progress(`${title}: loading ${entrant.name}`);
    const contestant = await entrant.start();
    loaded.set(entrant.name, contestant);
    const { bytesPerToken, description } = contestant;
    about[entrant.name] = { bytesPerToken, description };
    await contestant.run('decode', 0); // warms caches and page tables up
    return contestant;
  };
  const unload = async (name: string): Promise<void> => {
    const contestant = loaded.get(name);
    loaded.delete(name);
    await contestant?.close();
  };
  try {
    if (together) for (const entrant of entrants) await load(entrant);
    const rounds: Round[] = [];
    for (let seed = 1; seed <= repeats; seed++) {
      progress(`${title}: round ${seed} of ${repeats}`);
      const limits = await measureLimits();
      const samples: Record<string, Record<string, Sample>> = {};
      for (const phase of PHASES) {
        for (const entrant of entrants) {
          const sample = await withContestant(entrant, (contestant) => contestant.run(phase, seed));
          (samples[entrant.name] ??= {})[phase] = sample;
        }
      }
      rounds.push({ limits, samples: samples as Round['samples'] });
    }
    return { rounds, about };
  } finally {
    for (const name of [...loaded.keys()]) await unload(name);
  }
}

function gigabytes(bytes: number): string {
  return (bytes / 1e9).toFixed(0);
}
