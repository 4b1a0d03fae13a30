import { randomBytes } from 'node:crypto';
import type { FastifyInstance, FastifyReply } from 'fastify';
import type { Tokenizer } from '../../../model/tokenizer/tokenizer.js';
import type { GenerateRequest__Output } from '../../../proto/generated/tandem/v1/GenerateRequest.js';
import type { Caller } from '../../access/caller.js';
import type { GenerationDelta, GenerationRequest, GenerationResult } from '../../generation/request.js';
import type { Limits } from '../../limits.js';
import type { Ticket } from '../../job.js';
import type { CallContext } from '../service.js';
import { toCallContext, toGenerationRequest } from '../validate.js';
import { type ChoicePart, ChoiceText, echoPart } from './choice-text.js';
import { CompletionAnswer } from './completion-answer.js';
import { COMPLETION_FIELDS, type CompletionCall, inNames, toCompletionCall } from './completion-body.js';
import { EventStream } from './event-stream.js';
import type { HttpApi } from './http-api.js';
import { toHttpError } from './http-error.js';
import { checkModel } from './models.js';
import type { RequestGroups } from './request-groups.js';
import { endOf, runRequests } from './run-requests.js';
import { TokenTexts } from './token-texts.js';

/** POST /v1/completions as OpenAI documents it, and what GLM has more: blanks. */
export function addCompletionRoute(app: FastifyInstance, api: HttpApi, groups: RequestGroups, tokenizer: Tokenizer | null): void {
  const { service } = api;
  const tokens = new TokenTexts(tokenizer);

  app.post('/v1/completions', async (request, reply) => {
    const call = toCompletionCall(request.body, {
      limits: service.limits,
      specialTokens: service.config.specialTokens,
      seed: () => randomBytes(8).readBigUInt64LE(),
    });
    checkModel(api, call.model);
    const id = call.requestId ?? request.id;
    const { traceparent } = request.headers;
    const traceParent = typeof traceparent === 'string' ? traceparent : null;
    const asked = toJobs(call, id, request.caller, service.limits);
    const prepared = await service.prepareAll(
      asked.map((job) => job.request),
      endOf(reply),
      asked[0]!.context,
    );
    const jobs = asked.map(({ context }, i) => ({ request: prepared[i]!, context: { ...context, traceParent } }));
    void reply.header('x-request-id', id);

    const echoes = call.requests.map((wire, i) => (call.echo ? echoOf(wire, jobs[i]!.request, call, tokens, tokenizer) : null));
    const choices = jobs.map(({ request }, i) => Array.from({ length: request.n }, () => new ChoiceText(tokens, echoes[i]!)));
    const answer = new CompletionAnswer(id, service.modelName, call, choices);
    const submits = (onDelta: OnDelta) =>
      jobs.map(
        (job, prompt): Submit =>
          () =>
            inNames(fieldsOf(call), () => service.generate(job.request, job.context, (delta) => onDelta(prompt, delta))),
      );
    const requestIds = jobs.map(({ context }) => context.requestId!);
    return groups.run(id, requestIds, async () => {
      if (call.stream) return stream(api, reply, { call, answer, submits });
      return answer.whole(await runRequests(reply, submits((prompt, delta) => void answer.add(prompt, delta)))); // prettier-ignore
    });
  });
}

interface Job {
  readonly request: GenerationRequest;
  readonly context: CallContext;
}

type OnDelta = (prompt: number, delta: GenerationDelta) => void;
type Submit = () => Ticket<GenerationResult>;

function toJobs(call: CompletionCall, id: string, caller: Caller, limits: Limits): Job[] {
  return inNames(fieldsOf(call), () =>
    call.requests.map((wire, i) => ({
      request: toGenerationRequest(wire, limits),
      context: toCallContext({ ...wire.options!, requestId: call.requests.length === 1 ? id : `${id}-${i}` }, caller),
    })),
  );
}

function fieldsOf({ isBestOf }: CompletionCall): Readonly<Record<string, string>> {
  return isBestOf ? { ...COMPLETION_FIELDS, n: 'best_of' } : COMPLETION_FIELDS;
}

function echoOf(
  wire: GenerateRequest__Output,
  { prompt }: GenerationRequest,
  call: CompletionCall,
  tokens: TokenTexts,
  tokenizer: Tokenizer | null,
): ChoicePart {
  const text = wire.text ?? tokenizer?.detokenize(wire.ids!.ids) ?? '';
  const ids = call.logprobs === null ? null : (prompt.ids ?? tokenizer?.encodePrompt(text) ?? []);
  return echoPart(tokens, text, ids);
}

async function stream(
  { service, log }: HttpApi,
  reply: FastifyReply,
  { call, answer, submits }: { call: CompletionCall; answer: CompletionAnswer; submits: (onDelta: OnDelta) => readonly Submit[] },
): Promise<FastifyReply> {
  const events = new EventStream(reply, service.limits.maxBufferedBytes, log);
  const send = (chunks: readonly object[]): void => {
    for (const chunk of chunks) events.send(chunk);
  };
  try {
    const results = await runRequests(
      reply,
      submits((prompt, delta) => send(answer.chunks(prompt, delta))),
      (prompt, result) => send(answer.lastChunks(prompt, result)),
    );
    if (call.includeUsage) events.send(answer.usageChunk(results));
    events.end('[DONE]');
  } catch (error) {
    if (!events.isStarted) throw error;
    const { body, isDefect } = toHttpError(error, service.limits);
    if (isDefect) log.error({ err: error, requestId: answer.id }, 'a stream failed by a defect');
    events.send(body);
    events.end();
  }
  return reply;
}
