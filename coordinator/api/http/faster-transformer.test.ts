import { afterAll, beforeAll, expect, test } from 'vitest';
import { type FakeHttp, startFakeHttp } from './fake-http.js';

let http: FakeHttp;
beforeAll(async () => {
  http = await startFakeHttp();
});
afterAll(() => http.close());

function generate(payload: object) {
  return http.app.inject({ method: 'POST', url: '/generate', payload });
}

async function texts<T>(payload: object): Promise<T> {
  const response = await generate(payload);
  expect(response.statusCode).toBe(200);
  const body = response.json<{ text: T }>();
  expect(Object.keys(body)).toEqual(['text']);
  return body.text;
}

// As examples/pytorch/glm/glm_server_test.py of the FasterTransformer port sends it.
const contexts = [
  '凯旋门位于意大利米兰市古城堡旁。1807年为纪念[MASK]而建，门高25米，顶上矗立两武士青铜古兵车铸像。',
  'The Starry Night is an oil-on-canvas painting by [MASK] in June 1889.',
  '李白，字太白，号青莲居士，又号“谪仙人”，唐代伟大的浪漫主义诗人，被后人誉为“诗仙”。我：你去过哪些地方？李白：',
  'I have a dream that ',
];
const body = {
  prompt: contexts,
  max_tokens: 64,
  min_tokens: 0,
  top_k: 3,
  top_p: 0,
  temperature: 1,
  seed: 42,
  sampling_strategy: 'BaseStrategy',
  num_beams: 4,
  length_penalty: 0.9,
  no_repeat_ngram_size: 3,
  regix: '',
};

// As its first version takes it: one context in each line.
const oldBody = { text: contexts.join('\n'), out_seq_length: 64, topk: 1, topp: 0, temperature: 0.9, seed: 42 };

test('sampling gives a list of one text for each context, in order', async () => {
  const all = await texts<string[][]>(body);
  expect(all).toHaveLength(4);
  expect(all.every((each) => each.length === 1 && each[0]!.length > 0)).toBe(true);
  expect(await texts<string[][]>({ ...body, prompt: contexts[1] })).toEqual([all[1]]);
  expect(await texts<string[][]>(body)).toEqual(all);
});

test('only the first blank of a context is answered', async () => {
  const prompt = 'One [MASK] and two [MASK].';
  const [[text]] = (await texts<string[][]>({ ...body, prompt })) as [[string]];
  const response = await http.app.inject({
    method: 'POST',
    url: '/v1/completions',
    payload: { model: 'tiny', prompt, max_tokens: 64, top_k: 3, seed: 42, return_token_ids: true },
  });
  const { blanks } = response.json<{ choices: { blanks: { token_ids: number[] }[] }[] }>().choices[0]!;
  expect(text).toBe(http.service.requireTokenizer().detokenize(blanks[0]!.token_ids));
});

test('beam search gives the beams of each context', async () => {
  const all = await texts<string[][]>({ ...body, sampling_strategy: 'BeamSearchStrategy', max_tokens: 8 });
  expect(all.map((beams) => beams.length)).toEqual([4, 4, 4, 4]);
});

test('the old form gives one flat list', async () => {
  const all = await texts<string[]>(oldBody);
  expect(all).toHaveLength(4);
  expect(all.every((text) => typeof text === 'string')).toBe(true);
  expect(await texts<string[]>({ ...oldBody, text: `${oldBody.text}\n` })).toEqual(all);
});

test('the old form takes 0 for its defaults', async () => {
  expect(await texts<string[]>({ text: 'Hello', seed: 0, topk: 0, out_seq_length: 0 })).toEqual(await texts<string[]>({ text: 'Hello' }));
});

test('regix ends a text after what it looks for', async () => {
  const [[whole]] = (await texts<string[][]>({ ...body, prompt: 'Hello' })) as [[string]];
  const word = /[a-z]{2,}/.exec(whole.slice(5))![0];
  const [[cut]] = (await texts<string[][]>({ ...body, prompt: 'Hello', regix: `.*${word}.*` })) as [[string]];
  expect(cut).toBe(whole.slice(0, whole.indexOf(word) + word.length));
  const beams = { ...body, prompt: 'Hello', sampling_strategy: 'BeamSearchStrategy', num_beams: 2, max_tokens: 8 };
  expect((await generate({ ...beams, regix: '.*我:.*' })).statusCode).toBe(200);
});

test.each([
  ['an expression that could take for ever', { ...body, regix: '(a+)+$' }, 'regix'],
  ['an unknown strategy', { ...body, sampling_strategy: 'GreedyStrategy' }, 'sampling_strategy'],
  ['no context', {}, 'prompt'],
  ['a number for a context', { prompt: [1] }, 'prompt'],
  ['too many contexts', { text: 'a\n'.repeat(65) }, 'text'],
  ['too many beams', { ...body, sampling_strategy: 'BeamSearchStrategy', num_beams: 100 }, 'num_beams'],
  ['a probability out of range, in the old form', { text: 'a', topp: 2 }, 'topp'],
  ['a temperature out of range', { ...body, temperature: -1 }, 'temperature'],
])('%s is refused', async (_name, payload, param) => {
  const response = await generate(payload);
  expect(response.statusCode).toBe(400);
  expect(response.json()).toMatchObject({ error: { param } });
});

test('fields that the old server does not know are ignored, as it did', async () => {
  await texts({ ...body, apikey: 'x', max_tokens: 4 });
});
