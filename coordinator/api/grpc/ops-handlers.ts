import type { OpsHandlers } from '../../../proto/generated/tandem/v1/Ops.js';
import { toDrainTimeout, toWatchInterval } from '../validate.js';
import { answer, type GrpcApi } from './api.js';
import { toServiceError } from './service-error.js';

/** @param updateHealth told when a drain has begun: probes hear of it before clients do */
export function opsHandlers({ service, status, log }: GrpcApi, updateHealth: () => void): OpsHandlers {
  return {
    GetStatus: (_call, callback) => void answer(callback, log, status),
    WatchStatus(call) {
      let timer: NodeJS.Timeout | undefined;
      const stop = (): void => clearInterval(timer);
      const beat = (): void => {
        if (call.writableLength > 0) return; // a slow watcher misses beats
        try {
          call.write(status());
        } catch (error) {
          stop();
          call.emit('error', toServiceError(error, log));
        }
      };
      try {
        timer = setInterval(beat, toWatchInterval(call.request));
      } catch (error) {
        call.emit('error', toServiceError(error, log));
        return;
      }
      call.on('cancelled', stop);
      call.on('finish', stop);
      beat();
    },
    Drain: (call, callback) =>
      void answer(callback, log, async () => {
        const drained = service.drain(toDrainTimeout(call.request));
        updateHealth();
        return { remaining: await drained };
      }),
  };
}
