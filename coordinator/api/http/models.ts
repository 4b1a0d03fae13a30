import type { FastifyInstance } from 'fastify';
import { ModelNotFoundError } from './http-error.js';
import type { HttpApi } from './http-api.js';
import { shortened } from './parse-body.js';

/** @throws ModelNotFoundError */
export function checkModel({ service }: HttpApi, name: string): void {
  if (name !== service.modelName) {
    throw new ModelNotFoundError(`the model ${JSON.stringify(shortened(name))} is not served here: there is ${service.modelName}`);
  }
}

export function addModelRoutes(app: FastifyInstance, api: HttpApi): void {
  const model = {
    id: api.service.modelName,
    object: 'model',
    created: unixSeconds(),
    owned_by: 'tandem',
    root: api.service.modelName,
    max_model_len: api.service.config.maxSequenceLength,
  };
  app.get('/v1/models', () => ({ object: 'list', data: [model] }));
  app.get<{ Params: { model: string } }>('/v1/models/:model', ({ params }) => {
    checkModel(api, params.model);
    return model;
  });
}

export function unixSeconds(): number {
  return Math.floor(Date.now() / 1000);
}
