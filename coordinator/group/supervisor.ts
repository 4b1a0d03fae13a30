import { spawn, type ChildProcess } from 'node:child_process';
import type { Logger } from '../../common/log.js';

export interface SupervisorOptions {
  readonly worldSize: number;
  /** The command of a rank's worker: executable, then arguments. */
  readonly command: (rank: number) => readonly string[];
  readonly env: NodeJS.ProcessEnv;
  /** A rank that ends more often than this within a minute is given up. */
  readonly maxRestartsPerMinute: number;
  readonly log: Logger;
  /** The rank can not be kept running; the reason is one line. */
  readonly onGivenUp: (rank: number, reason: string) => void;
}

/** How long a worker may take to leave after it was asked to, before it is killed. */
const EXIT_GRACE_MS = 2_000;
/** Pause before a restart, so that a worker that dies at once does not fill the log. */
const RESTART_DELAY_MS = 200;
/** From the start of a process to its Hello. */
const ATTACH_TIMEOUT_MS = 30_000;
const MINUTE_MS = 60_000;

/** Keeps one process per rank running until {@link close}. Which of them form a group is not its business. */
export class Supervisor {
  private readonly children = new Map<number, ChildProcess>();
  /** Times of those exits that were not asked for. */
  private readonly exits = new Map<number, number[]>();
  private readonly restartCounts = new Map<number, number>();
  private readonly attachedPids = new Set<number>();
  private readonly dismissed = new WeakSet<ChildProcess>();
  private readonly timers = new Set<NodeJS.Timeout>();
  private closed = false;

  constructor(private readonly options: SupervisorOptions) {
    for (let rank = 0; rank < options.worldSize; rank++) this.start(rank);
  }

  restarts(rank: number): number {
    return this.restartCounts.get(rank) ?? 0;
  }

  /** The rank's present process has reached the coordinator. */
  attached(rank: number): void {
    const pid = this.children.get(rank)?.pid;
    if (pid !== undefined) this.attachedPids.add(pid);
  }

  /**
   * Makes sure that a rank's present process ends: it was asked to leave, and is killed if it does not. The exit counts against
   * it only if it is to blame.
   */
  expectExit(rank: number, isCulprit: boolean): void {
    const child = this.children.get(rank);
    if (!child) return;
    if (!isCulprit) this.dismissed.add(child);
    const timer = this.later(EXIT_GRACE_MS, () => {
      if (this.children.get(rank) !== child) return;
      this.options.log.warn({ rank, pid: child.pid }, 'worker did not leave in time, killed');
      child.kill('SIGKILL');
    });
    child.once('exit', () => clearTimeout(timer));
  }

  /** Ends all processes: those that do not leave by themselves within the grace time are killed. */
  async close(): Promise<void> {
    this.closed = true;
    for (const timer of this.timers) clearTimeout(timer);
    await Promise.all(
      [...this.children.values()].map(
        (child) =>
          new Promise<void>((resolve) => {
            child.once('exit', () => resolve());
            child.kill('SIGTERM');
            setTimeout(() => child.kill('SIGKILL'), EXIT_GRACE_MS).unref();
          }),
      ),
    );
  }

  private start(rank: number): void {
    const { command, env, log } = this.options;
    const [executable, ...args] = command(rank);
    const child = spawn(executable!, args, { env, stdio: ['ignore', 'ignore', 'inherit'] });
    this.children.set(rank, child);
    log.debug({ rank, pid: child.pid }, 'worker started');
    child.once('error', (error) => {
      this.children.delete(rank);
      this.options.onGivenUp(rank, `worker ${rank} could not be started: ${error.message}`);
    });
    const timer = this.later(ATTACH_TIMEOUT_MS, () => {
      if (this.children.get(rank) !== child || this.attachedPids.has(child.pid!)) return;
      log.warn({ rank, pid: child.pid }, `worker did not attach within ${ATTACH_TIMEOUT_MS} ms, killed`);
      child.kill('SIGKILL');
    });
    child.once('exit', () => clearTimeout(timer));
    child.once('exit', (code, signal) => this.onExit(rank, child, code, signal));
  }

  private onExit(rank: number, child: ChildProcess, code: number | null, signal: NodeJS.Signals | null): void {
    this.children.delete(rank);
    this.attachedPids.delete(child.pid!);
    if (this.closed) return;
    const how = signal ?? `status ${code}`;
    this.options.log.warn({ rank, pid: child.pid, how }, 'worker ended');
    this.restartCounts.set(rank, this.restarts(rank) + 1);
    if (!this.dismissed.has(child)) {
      const recent = [...(this.exits.get(rank) ?? []), Date.now()].filter((time) => time > Date.now() - MINUTE_MS);
      this.exits.set(rank, recent);
      if (recent.length > this.options.maxRestartsPerMinute) {
        this.options.onGivenUp(rank, `worker ${rank} ended ${recent.length} times within a minute, last with ${how}`);
        return;
      }
    }
    this.later(RESTART_DELAY_MS, () => this.start(rank));
  }

  private later(ms: number, action: () => void): NodeJS.Timeout {
    const timer = setTimeout(() => {
      this.timers.delete(timer);
      if (!this.closed) action();
    }, ms);
    this.timers.add(timer);
    return timer;
  }
}
