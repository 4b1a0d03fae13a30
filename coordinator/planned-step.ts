import type { PendingRun } from './active-request.js';
import type { EngineStepResult } from './group/engine.js';
import type { SliceUnderWay } from './scheduler/schedule.js';
import type { BeforeForeseen, Run } from './scheduler/sequence.js';

export interface PlannedRun extends Pick<Run, 'sequence' | 'firstToken'> {
  readonly pending: PendingRun;
  /** Its tokens; the sequence may have more by the time that the results are in. */
  readonly runTokens: number;
  /** The run of the token that it samples, in the next step. */
  foreseen: { readonly pending: PendingRun; readonly before: BeforeForeseen } | null;
}

/** The run that goes through the layers over several steps. */
export interface SlicedRun extends SliceUnderWay {
  readonly extend: PendingRun;
  readonly run: PlannedRun;
}

export interface PlannedStep {
  readonly whole: readonly PlannedRun[];
  readonly slice: (SlicedRun & { readonly firstLayer: number; readonly endLayer: number }) | null;
  readonly blockCopies: number[];
}

/** A step on its way. */
export interface SentStep {
  readonly step: PlannedStep;
  readonly startMs: number;
  readonly sentMs: number;
  readonly scheduleMs: number;
  readonly answer: Promise<EngineStepResult>;
}
