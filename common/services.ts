/**
 * The gRPC services, clients and error details of `proto/`, with the TypeScript types that the build generates from the same files.
 * Loading reads the .proto files of this package and nothing else.
 */
import { join } from 'node:path';
import * as grpc from '@grpc/grpc-js';
import { loadSync, type MessageTypeDefinition, type PackageDefinition } from '@grpc/proto-loader';
import type { ProtoGrpcType as GenerationTypes } from '../proto/generated/generation.js';
import type { ProtoGrpcType as InferenceTypes } from '../proto/generated/grpc_service.js';
import type { ProtoGrpcType as OpsTypes } from '../proto/generated/ops.js';
import type { BadRequest, BadRequest__Output } from '../proto/generated/google/rpc/BadRequest.js';
import type { ErrorInfo, ErrorInfo__Output } from '../proto/generated/google/rpc/ErrorInfo.js';
import type { QuotaFailure, QuotaFailure__Output } from '../proto/generated/google/rpc/QuotaFailure.js';
import type { RetryInfo, RetryInfo__Output } from '../proto/generated/google/rpc/RetryInfo.js';
import type { Status, Status__Output } from '../proto/generated/google/rpc/Status.js';
import type { ProtoGrpcType as WorkerTypes } from '../proto/generated/worker.js';
import { packageRoot } from './package-root.js';

type AllTypes = {
  tandem: { v1: GenerationTypes['tandem']['v1'] & OpsTypes['tandem']['v1'] & WorkerTypes['tandem']['v1'] };
  inference: InferenceTypes['inference'];
  google: {
    rpc: {
      Status: MessageTypeDefinition<Status, Status__Output>;
      BadRequest: MessageTypeDefinition<BadRequest, BadRequest__Output>;
      ErrorInfo: MessageTypeDefinition<ErrorInfo, ErrorInfo__Output>;
      QuotaFailure: MessageTypeDefinition<QuotaFailure, QuotaFailure__Output>;
      RetryInfo: MessageTypeDefinition<RetryInfo, RetryInfo__Output>;
    };
  };
};

const PROTO_DIR = join(packageRoot, 'proto');
/** What anybody may call; workers have their own. */
const PUBLIC_PROTOS = ['tandem/v1/generation.proto', 'tandem/v1/ops.proto', 'inference/grpc_service.proto'];
const OTHER_PROTOS = ['tandem/v1/worker.proto', 'google/rpc/status.proto', 'google/rpc/error_details.proto'];

/** 64-bit integers are strings, enums their names; a scalar that is absent has its default, a message is null. */
const definition = loadSync([...PUBLIC_PROTOS, ...OTHER_PROTOS], {
  ...{ longs: String, enums: String, defaults: true, oneofs: true, arrays: true },
  includeDirs: [PROTO_DIR],
});
const loaded = grpc.loadPackageDefinition(definition) as unknown as AllTypes;

export const { Generation, Ops, WorkerLink } = loaded.tandem.v1;
export const { GRPCInferenceService } = loaded.inference;

/** google.rpc.Status and what its details can be: messages, which serialize and deserialize themselves. */
export const googleRpc = loaded.google.rpc;

/** The public services as server reflection describes them: the fields have the names of the .proto files. */
export function publicDefinition(more: readonly string[] = []): PackageDefinition {
  return loadSync([...PUBLIC_PROTOS, ...more], { keepCase: true, includeDirs: [PROTO_DIR] });
}
