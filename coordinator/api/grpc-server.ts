import { protoPath as healthProto } from 'grpc-health-check';
import { ReflectionService } from '@grpc/reflection';
import { Generation, GRPCInferenceService, Ops, publicDefinition } from '../../common/services.js';
import type { GrpcApi } from './grpc/api.js';
import { GatedServer } from './grpc/gated-server.js';
import { generationHandlers } from './grpc/generation-handlers.js';
import { Health } from './grpc/health.js';
import { kserveHandlers } from './grpc/kserve-handlers.js';
import { opsHandlers } from './grpc/ops-handlers.js';

export type { GrpcApi };

/** All public services behind the gate; it listens to nothing yet. */
export function createGrpcServer(api: GrpcApi): GrpcServer {
  return new GrpcServer(api);
}

export class GrpcServer extends GatedServer {
  private readonly health: Health;

  constructor(api: GrpcApi) {
    super({ gate: api.gate, limits: api.service.limits, log: api.log, onRefused: api.onRefused, stallMs: api.stallMs });
    this.addService(Generation.service, { ...generationHandlers(api) });
    this.addService(Ops.service, { ...opsHandlers(api, () => this.updateHealth()) });
    this.addService(GRPCInferenceService.service, { ...kserveHandlers(api) });
    new ReflectionService(publicDefinition([healthProto])).addToServer(this);
    this.health = new Health(api.service, this);
  }

  /** Tells watchers of a change at once, which they would else hear of within a quarter of a second: before connections end. */
  updateHealth(): void {
    this.health.update();
  }

  override tryShutdown(callback: (error?: Error) => void): void {
    this.health.close();
    super.tryShutdown(callback);
  }

  override forceShutdown(): void {
    this.health.close();
    super.forceShutdown();
  }
}
