/**
 * The gRPC services and clients of `proto/tandem/v1`, with the TypeScript types that the build generates from the same
 * files. Loading reads the .proto files of this package and nothing else.
 */
import { join } from 'node:path';
import * as grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';
import type { ProtoGrpcType as GenerationTypes } from '../proto/generated/generation.js';
import type { ProtoGrpcType as OpsTypes } from '../proto/generated/ops.js';
import type { ProtoGrpcType as WorkerTypes } from '../proto/generated/worker.js';
import { packageRoot } from './package-root.js';

type AllTypes = {
  tandem: { v1: GenerationTypes['tandem']['v1'] & OpsTypes['tandem']['v1'] & WorkerTypes['tandem']['v1'] };
};

/** 64-bit integers are strings, enums their names; a scalar that is absent has its default, a message is null. */
const definition = loadSync(
  ['generation.proto', 'ops.proto', 'worker.proto'].map((file) => join(packageRoot, 'proto', 'tandem', 'v1', file)),
  { longs: String, enums: String, defaults: true, oneofs: true, arrays: true },
);

export const { Generation, Ops, WorkerLink } = (grpc.loadPackageDefinition(definition) as unknown as AllTypes).tandem.v1;
