/** The last things that happened to the server, for the status page. What is logged in full is in the log. */
export interface ServerEvent {
  readonly unixSeconds: number;
  readonly severity: 'info' | 'warning' | 'error';
  readonly message: string;
}

const MOST_EVENTS = 100;

export class EventLog {
  private readonly events: ServerEvent[] = [];

  constructor(private readonly now: () => number = () => Date.now()) {}

  add(severity: ServerEvent['severity'], message: string): void {
    this.events.push({ unixSeconds: this.now() / 1000, severity, message });
    if (this.events.length > MOST_EVENTS) this.events.shift();
  }

  /** Oldest first. */
  list(): readonly ServerEvent[] {
    return [...this.events];
  }
}
