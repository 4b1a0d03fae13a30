import { NotFoundError } from '../../../common/errors.js';
import { packageVersion } from '../../../common/package-root.js';
import type { GRPCInferenceServiceHandlers } from '../../../proto/generated/inference/GRPCInferenceService.js';
import { answer, type GrpcApi, isServing } from './api.js';

/** KServe's health and metadata calls (Open Inference Protocol). There is one model, without versions; tensors are not how it is called. */
export function kserveHandlers({ service, log }: GrpcApi): GRPCInferenceServiceHandlers {
  const isReady = (): boolean => isServing(service.health.state);
  const isHere = ({ name, version }: { readonly name: string; readonly version: string }): boolean =>
    name === service.modelName && version === '';
  return {
    ServerLive: (_call, callback) => callback(null, { live: true }),
    ServerReady: (_call, callback) => callback(null, { ready: isReady() }),
    ModelReady: ({ request }, callback) => callback(null, { ready: isHere(request) && isReady() }),
    ServerMetadata: (_call, callback) => callback(null, { name: 'tandem', version: packageVersion, extensions: [] }),
    ModelMetadata: ({ request }, callback) =>
      void answer(callback, log, () => {
        if (!isHere(request)) {
          throw new NotFoundError(`this server has the model ${service.modelName}, without versions: ask for that one`);
        }
        return { name: service.modelName, versions: [], platform: 'tandem_glm', inputs: [], outputs: [] };
      }),
  };
}
