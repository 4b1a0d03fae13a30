import type { Server, ServerResponse } from 'node:http';

/**
 * Makes closing wait for answers under way, and for nothing else: Node's own would wait for connections that never sent a request.
 * @returns to be called when the server begins to close
 */
export function closeWhenQuiet(server: Server): () => void {
  const answers = new Set<ServerResponse>();
  let isClosing = false;
  const closeIfQuiet = (): void => {
    if (isClosing && answers.size === 0) server.closeAllConnections();
  };
  server.on('request', (_request, response: ServerResponse) => {
    answers.add(response);
    response.once('close', () => {
      answers.delete(response);
      closeIfQuiet();
    });
  });
  return () => {
    isClosing = true;
    setImmediate(closeIfQuiet); // by then the server takes no new connections
  };
}
