import { HealthImplementation } from 'grpc-health-check';
import type { ServingService } from '../service.js';
import { isServing } from './api.js';
import type { GatedServer } from './gated-server.js';

/** The state is asked for: it changes by what workers, signals and operators do, and a probe may wait so long. */
const POLL_MS = 250;

/** The standard health service, for the server as a whole (the empty name) and each of its services. */
export class Health {
  private readonly implementation = new HealthImplementation();
  private readonly timer: NodeJS.Timeout;
  private names: readonly string[] = [''];
  private last: boolean | null = null;

  constructor(
    private readonly service: ServingService,
    server: GatedServer,
  ) {
    this.implementation.addToServer(server);
    this.names = ['', ...server.serviceNames];
    this.update();
    this.timer = setInterval(() => this.update(), POLL_MS).unref();
  }

  update(): void {
    const isServingNow = isServing(this.service.health.state);
    if (isServingNow === this.last) return; // watchers hear of changes alone
    this.last = isServingNow;
    for (const name of this.names) this.implementation.setStatus(name, isServingNow ? 'SERVING' : 'NOT_SERVING');
  }

  close(): void {
    clearInterval(this.timer);
  }
}
