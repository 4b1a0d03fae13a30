import { Metadata, status } from '@grpc/grpc-js';
import { CLIENT_CHANNEL_OPTIONS, clientAddress, clientCredentials, type ClientTls } from '../../common/address.js';
import { Generation } from '../../common/services.js';
import type { GenerateRequest } from '../../proto/generated/tandem/v1/GenerateRequest.js';
import type { Finish__Output } from '../../proto/generated/tandem/v1/Finish.js';
import type { GenerateResponse__Output } from '../../proto/generated/tandem/v1/GenerateResponse.js';
import { oneLine } from '../describe-error.js';
import type { Ending, LoadTarget, RequestShape } from './target.js';
import type { PlannedRequest } from './workload.js';

const MODES = {
  'fill-blanks': 'MODE_FILL_BLANKS',
  mask: 'MODE_MASK',
  gmask: 'MODE_GMASK',
  unidirectional: 'MODE_UNIDIRECTIONAL',
} as const;

export interface GrpcTargetOptions {
  readonly address: string;
  /** That the requests are spread over. */
  readonly connections: number;
  /** Null: none. */
  readonly tls: ClientTls | null;
  readonly shape: RequestShape;
}

export function grpcTarget({ address, connections, tls, shape }: GrpcTargetOptions): LoadTarget {
  const clients = Array.from({ length: connections }, () => {
    // Of its own: channels to one address otherwise share a connection.
    const options = { ...CLIENT_CHANNEL_OPTIONS, 'grpc.use_local_subchannel_pool': 1 };
    return new Generation(clientAddress(address), clientCredentials(tls), options);
  });
  return {
    send(request, onTokens) {
      const metadata = new Metadata();
      if (request.key !== null) metadata.set('authorization', `Bearer ${request.key}`);
      const call = clients[request.index % connections]!.generate(toWire(request, shape), metadata);
      let finish: Finish__Output | null = null;
      let isCancelled = false;
      call.on('data', ({ delta, finish: last }: GenerateResponse__Output) => {
        if (delta && delta.tokens.length > 0) onTokens(delta.tokens.length, delta.tokens);
        else if (last) finish = last;
      });
      call.on('error', () => {}); // comes as a status, too
      const ended = new Promise<Ending>((resolve) => {
        call.on('status', ({ code, details }) => {
          if (isCancelled) resolve({ kind: 'cancelled' });
          else if (code !== status.OK) resolve({ kind: 'failed', code: status[code], message: oneLine(details) });
          else if (finish === null) resolve({ kind: 'failed', code: 'NO_FINISH', message: 'the stream ended without a finish message' });
          else resolve({ kind: 'finished', ...figures(finish) });
        });
      });
      const cancel = (): void => {
        isCancelled = true;
        call.cancel();
      };
      return { ended, cancel };
    },
    close: () => clients.forEach((client) => client.close()),
  };
}

function toWire({ prompt, outputTokens }: PlannedRequest, shape: RequestShape): GenerateRequest {
  return {
    ...('text' in prompt ? { text: prompt.text } : { ids: { ids: [...prompt.ids] } }),
    mode: MODES[shape.mode],
    maxNewTokens: outputTokens,
    temperature: shape.temperature,
    seed: shape.seed,
    ...(shape.stopsAtEnd ? {} : { endTokens: { ids: [] } }),
    ...(shape.beams > 0 ? { beamSearch: { numBeams: shape.beams, lengthPenalty: 1, deterministic: true } } : {}),
    options: { priority: shape.priority, timeoutMs: shape.timeoutMs },
  };
}

function figures({ usage, timings }: Finish__Output) {
  return {
    promptTokens: usage?.promptTokens ?? 0,
    outputTokens: usage?.generatedTokens ?? 0,
    cachedPromptTokens: usage?.cachedPromptTokens ?? 0,
    serverQueueMs: timings?.queueMs ?? null,
  };
}
