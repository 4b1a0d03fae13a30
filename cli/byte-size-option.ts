/** Flags that take a size: `1.5GiB`, `800MiB`, or a number of bytes. */
import type { Options } from 'yargs';
import { ConfigError } from '../common/errors.js';

const units: Readonly<Record<string, number>> = {
  '': 1,
  b: 1,
  kib: 2 ** 10,
  mib: 2 ** 20,
  gib: 2 ** 30,
  tib: 2 ** 40,
  kb: 1e3,
  mb: 1e6,
  gb: 1e9,
  tb: 1e12,
};

/** Whole bytes. */
export function byteSize(flag: string, option: { readonly describe: string }): Options {
  return {
    ...option,
    type: 'string',
    requiresArg: true,
    coerce: (given: string | readonly string[] | undefined) => {
      if (given === undefined) return undefined;
      if (typeof given !== 'string') throw new ConfigError(`--${flag} is given ${given.length} times (${given.join(', ')}): give it once`);
      const { number = '', unit = '' } = /^(?<number>\d+(\.\d+)?)\s*(?<unit>[a-z]*)$/i.exec(given.trim())?.groups ?? {};
      const bytes = Math.floor(Number(number) * (units[unit.toLowerCase()] ?? NaN));
      if (number === '' || !Number.isSafeInteger(bytes))
        throw new ConfigError(`--${flag} ${given}: a size is needed, such as 1.5GiB or 800MiB`);
      return bytes;
    },
  };
}
