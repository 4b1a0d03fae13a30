/** Who calls, as the gate found out. Plain data. */

/** `infer`: generation, scoring, tokenizer. `observe`: status, metrics. `operate`: drain, abort of anybody's requests. */
export type Role = 'infer' | 'observe' | 'operate';

export const ROLES: readonly Role[] = ['infer', 'observe', 'operate'];

/** What a route or RPC asks for; `public` ones carry nothing that is worth protecting (probes, the dashboard's empty page). */
export type Access = Role | 'public';

export interface Caller {
  /** Name of the API key; requests of one name share a queue, a context cache and limits. Empty without keys. */
  readonly name: string;
  readonly roles: readonly Role[];
  /** Share of the server where several keys want it, relative to the others' weights. */
  readonly weight: number;
  /** The highest priority that its requests may ask for. */
  readonly maxPriority: number;
  /** Requests that may wait or run at once; null: the server's limit. */
  readonly maxStreams: number | null;
  /** Prompt and generated tokens in any minute; null: the server's limit. */
  readonly maxTokensPerMinute: number | null;
}

export const MAX_PRIORITY = 100;

/** Everybody, where the server has no keys: it then listens to this machine alone. */
export const LOCAL_CALLER: Caller = {
  name: '',
  roles: ROLES,
  weight: 1,
  maxPriority: MAX_PRIORITY,
  maxStreams: null,
  maxTokensPerMinute: null,
};

/** The one gate that every route and RPC goes through. */
export interface Gate {
  /**
   * @param authorization the header of that name; undefined: none
   * @throws UnauthenticatedError, ForbiddenError
   */
  authorize(access: Access, authorization: string | undefined): Caller;
}

/** Without keys: for servers that listen to this machine alone, and for tests. */
export const OPEN_GATE: Gate = { authorize: () => LOCAL_CALLER };
