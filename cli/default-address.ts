/** Where `serve` listens for gRPC, and where its clients look for it. */
export const DEFAULT_ADDRESS = '127.0.0.1:7130';
