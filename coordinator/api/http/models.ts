import type { FastifyInstance } from 'fastify';
import { ModelNotFoundError } from './http-error.js';
import type { HttpApi } from './http-api.js';
import { shortened } from './parse-body.js';

/** @throws ModelNotFoundError */
export function checkModel({ service, modelAliases = [] }: HttpApi, name: string): void {
  const names = [service.modelName, ...modelAliases];
  if (!names.includes(name)) {
    throw new ModelNotFoundError(`the model ${JSON.stringify(shortened(name))} is not served here: there is ${names.join(', ')}`);
  }
}

export function addModelRoutes(app: FastifyInstance, api: HttpApi): void {
  const created = unixSeconds();
  const describe = (id: string) => ({
    id,
    object: 'model',
    created,
    owned_by: 'tandem',
    root: api.service.modelName,
    max_model_len: api.service.config.maxSequenceLength,
  });
  app.get('/v1/models', () => ({ object: 'list', data: [api.service.modelName, ...(api.modelAliases ?? [])].map(describe) }));
  app.get<{ Params: { model: string } }>('/v1/models/:model', ({ params }) => {
    checkModel(api, params.model);
    return describe(params.model);
  });
}

export function unixSeconds(): number {
  return Math.floor(Date.now() / 1000);
}
