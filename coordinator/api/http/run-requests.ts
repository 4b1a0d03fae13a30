import type { FastifyReply } from 'fastify';
import type { Completed, Ticket } from '../../job.js';

/** Aborted when the client goes. */
export function endOf(reply: FastifyReply): AbortSignal {
  const controller = new AbortController();
  reply.raw.once('close', () => controller.abort());
  if (reply.raw.destroyed) controller.abort();
  return controller.signal;
}

/**
 * Runs the requests that one HTTP call comes to: all are taken or none. They end when the client goes, and when one of them fails.
 *
 * @param onDone called for each as it ends well, with its index
 */
export async function runRequests<R>(
  reply: FastifyReply,
  submits: readonly (() => Ticket<R>)[],
  onDone: (index: number, completed: Completed<R>) => void = () => {},
): Promise<Completed<R>[]> {
  const tickets: Ticket<R>[] = [];
  const cancelAll = (): void => {
    for (const ticket of tickets) {
      ticket.done.catch(() => {}); // nobody waits for it if a later one was refused
      ticket.cancel();
    }
  };
  reply.raw.once('close', cancelAll);
  try {
    reply.request.isSubmitted = true;
    for (const submit of submits) tickets.push(submit());
    if (reply.raw.destroyed) cancelAll();
    return await Promise.all(
      tickets.map(async ({ done }, i) => {
        const completed = await done;
        onDone(i, completed);
        return completed;
      }),
    );
  } catch (error) {
    cancelAll();
    throw error;
  } finally {
    reply.raw.off('close', cancelAll);
  }
}
