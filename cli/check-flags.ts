import { ConfigError } from '../common/errors.js';

/** Of yargs' own description of the command. */
export interface FlagTypes {
  readonly array: readonly string[];
  readonly boolean: readonly string[];
}

/**
 * What yargs lets pass: a flag given twice becomes an array, an empty value an empty string, and `--json=yes` false.
 * @throws ConfigError naming the flag
 */
export function checkFlags(parsed: Readonly<Record<string, unknown>>, types: FlagTypes, typed: readonly string[]): void {
  for (const [flag, value] of Object.entries(parsed)) {
    if (flag === '_' || /[A-Z]/.test(flag)) continue; // the same once more in camelCase
    if (Array.isArray(value) && !types.array.includes(flag)) {
      throw new ConfigError(`--${flag} is given ${value.length} times (${value.join(', ')}): give it once`);
    }
    if (value === '') throw new ConfigError(`--${flag} is empty: give it a value, or leave it out`);
  }
  for (const argument of typed) {
    const { flag = '', value = '' } = /^--(?<flag>[^=]+)=(?<value>.*)$/s.exec(argument)?.groups ?? {};
    if (types.boolean.includes(flag) && value !== 'true' && value !== 'false') {
      throw new ConfigError(`--${flag}=${value}: write --${flag}, --${flag}=true or --${flag}=false`);
    }
  }
}
