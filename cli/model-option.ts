import { ensureTinyStore } from '../model/tiny/tiny-model.js';

/** The store that `--model` names; without it the tiny model that ships with the project. */
export function modelOrTiny(model: string | undefined): Promise<string> {
  return model === undefined ? ensureTinyStore() : Promise.resolve(model);
}
