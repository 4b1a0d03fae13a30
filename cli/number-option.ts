/** Flags that take a number. What was typed stays text until it is checked, so that the error can show it. */
import type { Options } from 'yargs';
import { ConfigError } from '../common/errors.js';

export interface NumberOption {
  readonly describe: string;
  readonly default?: number;
  readonly demandOption?: boolean;
}

/** The largest number that everything behind the command line holds. */
const INT32_MAX = 0x7fffffff;

export function wholeNumber(
  flag: string,
  { min, max = INT32_MAX, ...option }: NumberOption & { readonly min: number; readonly max?: number },
): Options {
  return numberOption(flag, option, (text) => {
    const value = /^\d{1,15}$/.test(text) ? Number(text) : NaN;
    if (!(value >= min && value <= max)) {
      throw new ConfigError(`--${flag} ${shown(text)}: a whole number from ${min} to ${max} is needed`);
    }
    return value;
  });
}

export function decimalNumber(flag: string, option: NumberOption): Options {
  return numberOption(flag, option, (text) => {
    if (!/^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,3})?$/i.test(text)) throw new ConfigError(`--${flag} ${shown(text)}: a number is needed`);
    return Number(text);
  });
}

/** `number` is what the help says, `string` keeps yargs from making NaN of what is no number. */
function numberOption(flag: string, option: NumberOption, parse: (text: string) => number): Options {
  return {
    ...option,
    number: true,
    string: true,
    requiresArg: true,
    coerce: (given: string | number | readonly string[] | undefined) => {
      if (Array.isArray(given)) throw new ConfigError(`--${flag} is given ${given.length} times (${given.join(', ')}): give it once`);
      return given === undefined ? given : parse(String(given).trim()); // a number is the default, or from a configuration file
    },
  };
}

function shown(text: string): string {
  return text === '' ? '""' : text;
}
