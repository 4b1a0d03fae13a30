import type { Access } from '../../access/caller.js';

/** What each RPC asks of its caller: the one table. A method that is not here cannot be served. */
export const METHOD_ACCESS: Readonly<Record<string, Access>> = {
  '/tandem.v1.Generation/Generate': 'infer',
  '/tandem.v1.Generation/Score': 'infer',
  '/tandem.v1.Generation/Logits': 'infer',
  '/tandem.v1.Generation/Tokenize': 'infer',
  '/tandem.v1.Generation/Detokenize': 'infer',
  '/tandem.v1.Generation/Abort': 'infer',

  '/tandem.v1.Ops/GetStatus': 'observe',
  '/tandem.v1.Ops/WatchStatus': 'observe',
  '/tandem.v1.Ops/Drain': 'operate',

  '/inference.GRPCInferenceService/ServerLive': 'public',
  '/inference.GRPCInferenceService/ServerReady': 'public',
  '/inference.GRPCInferenceService/ModelReady': 'public',
  '/inference.GRPCInferenceService/ServerMetadata': 'observe',
  '/inference.GRPCInferenceService/ModelMetadata': 'observe',

  '/grpc.health.v1.Health/Check': 'public',
  '/grpc.health.v1.Health/Watch': 'public',
  '/grpc.health.v1.Health/List': 'public',

  '/grpc.reflection.v1.ServerReflection/ServerReflectionInfo': 'public',
  '/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo': 'public',
};

/** Streams that go on until their client or the server ends. */
export const ENDLESS_METHODS: ReadonlySet<string> = new Set([
  '/tandem.v1.Ops/WatchStatus',
  '/grpc.health.v1.Health/Watch',
  '/grpc.reflection.v1.ServerReflection/ServerReflectionInfo',
  '/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo',
]);
