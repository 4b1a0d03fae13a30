import { totalmem } from 'node:os';
import type { ClientDuplexStream } from '@grpc/grpc-js';
import { type Device, formatDevice } from '../common/device.js';
import { TandemError } from '../common/errors.js';
import type { Logger } from '../common/log.js';
import { packageVersion } from '../common/package-root.js';
import type { CoordinatorMessage__Output } from '../proto/generated/tandem/v1/CoordinatorMessage.js';
import type { Assignment__Output } from '../proto/generated/tandem/v1/Assignment.js';
import type { Memory } from '../proto/generated/tandem/v1/Memory.js';
import type { WorkerMessage } from '../proto/generated/tandem/v1/WorkerMessage.js';
import { describeGpu, failureKind, type LoadProgress, loadEngine, nativeBuild, type NativeEngine } from './engine.js';

export type WorkerLinkStream = ClientDuplexStream<WorkerMessage, CoordinatorMessage__Output>;

export interface LinkOptions {
  readonly rank: number;
  readonly token: string;
  readonly device: Device;
  /** Where the engine's threads run; empty: anywhere. */
  readonly cpus: readonly number[];
  readonly log: Logger;
}

/** How long a rank whose collectives another one ended waits for the coordinator to say what becomes of it. */
const ABORT_GRACE_MS = 2000;

/** Why the link ended: the coordinator said so, or it (or this worker's engine) broke. */
export type LinkEnd = { readonly kind: 'shutdown' } | { readonly kind: 'dismissed' } | { readonly kind: 'broken'; readonly reason: string };

/**
 * Runs the coordinator's commands on this rank, in order, until the link ends. Ranks that run different steps hang in their
 * next collective, so a gap in the step ids is an error. Steps are not awaited: the engine's thread queues them.
 */
export function serveLink(link: WorkerLinkStream, { rank, token, device, cpus, log }: LinkOptions): Promise<LinkEnd> {
  return new Promise((resolve) => {
    let engine: NativeEngine | null = null;
    let epoch = 0;
    let lastStep = 0;
    let heartbeat: NodeJS.Timeout | null = null;
    let isEnded = false;

    const end = (how: LinkEnd): void => {
      isEnded = true;
      if (heartbeat) clearInterval(heartbeat);
      engine?.abort();
      resolve(how);
    };
    const fail = (error: unknown): void => {
      if (isEnded) return; // what an aborted engine still has to say is known
      const message = error instanceof Error ? error.message : String(error);
      log.error({ epoch }, message);
      link.write({ error: { epoch, code: error instanceof TandemError ? error.code : 'ENGINE', message } });
      link.end();
      end({ kind: 'broken', reason: message });
    };
    const load = async (assignment: Assignment__Output): Promise<void> => {
      const start = performance.now();
      epoch = assignment.epoch;
      let progress = (): LoadProgress => ({ doneBytes: 0, totalBytes: 0 });
      let loggedTenths = 0;
      // From here on: loading a large shard takes minutes, and a rank that hangs in it has to be found.
      heartbeat = setInterval(() => {
        if (engine) return void link.write({ heartbeat: { epoch, lastStep, memory: memoryOf(engine), loading: null } });
        const { doneBytes, totalBytes } = progress();
        link.write({ heartbeat: { epoch, lastStep, memory: null, loading: { doneBytes, totalBytes } } });
        const tenths = totalBytes === 0 ? 0 : Math.floor((doneBytes / totalBytes) * 10);
        if (tenths > loggedTenths) log.info({ epoch, doneBytes, totalBytes }, `loading the shard: ${tenths * 10} %`);
        loggedTenths = tenths;
      }, assignment.heartbeatMs);
      engine = await loadEngine(assignment, { rank, device, cpus, onStart: (of) => (progress = of) });
      const loadMs = Math.round(performance.now() - start);
      log.info({ epoch, loadMs, weightBytes: engine.memory.weightBytes, kvBytes: engine.memory.kvBytes }, 'shard loaded');
      link.write({ ready: { epoch, loadMs, memory: memoryOf(engine) } });
    };

    link.on('data', (message: CoordinatorMessage__Output) => {
      if (message.assignment) load(message.assignment).catch(fail);
      else if (message.abort) end({ kind: 'dismissed' });
      else if (message.shutdown) end({ kind: 'shutdown' });
      else if (message.step) {
        const { stepId, body } = message.step;
        if (!engine) return fail(new Error(`step ${stepId} before the shard was loaded`));
        if (stepId !== lastStep + 1) return fail(new Error(`step ${stepId} after step ${lastStep}`));
        lastStep = stepId;
        engine.step(stepId, body).then(
          (result) => link.write({ result }),
          (error: unknown) => {
            const kind = failureKind(error);
            if (kind === 'in-step') link.write({ result: { stepId, error: (error as Error).message } });
            else if (kind === 'fatal') fail(error);
            else setTimeout(() => fail(error), ABORT_GRACE_MS);
          },
        );
      }
    });
    link.on('error', (error) => end({ kind: 'broken', reason: error.message }));
    link.on('end', () => end({ kind: 'broken', reason: 'the coordinator closed the link' }));

    const { isa } = nativeBuild();
    const { name, totalBytes } = device.kind === 'cuda' ? describeGpu(device.gpu) : { name: '', totalBytes: totalmem() };
    const about = { device: formatDevice(device), deviceName: name, isa, totalMemoryBytes: totalBytes, version: packageVersion };
    link.write({ hello: { rank, pid: process.pid, ...about, token } });
  });
}

function memoryOf(engine: NativeEngine): Memory {
  return { ...engine.memory, rssBytes: process.memoryUsage.rss() };
}
