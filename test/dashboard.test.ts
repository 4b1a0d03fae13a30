/** The dashboard in a browser, against a stand-in that serves it under the same content security policy and says what each test wants. */
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { type Browser, type BrowserContextOptions, type Page } from 'playwright-core';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import type { Status } from '../proto/generated/tandem/v1/Status.js';
import { chromiumPath, launchChromium, NO_CHROMIUM } from './support/chromium.js';
import { HOSTILE, scriptedStatus, type StandIn, startStandIn } from './support/dashboard-stand-in.js';

if (chromiumPath === null) process.stderr.write(`test/dashboard.test.ts is skipped: ${NO_CHROMIUM}\n`);

const DESKTOP = { width: 1440, height: 900 };
const PHONE = { width: 360, height: 740 };
/** Where to put pictures of the pages; unset: nowhere. */
const screenshotDir = process.env.TANDEM_SCREENSHOTS;

let browser: Browser;
let standIn: StandIn;
/** What no test may cause: errors, violations of the policy, requests to others. */
let problems: string[] = [];

describe.skipIf(chromiumPath === null)('the dashboard', () => {
  beforeAll(async () => {
    browser = await launchChromium();
  });
  afterAll(async () => {
    await browser?.close();
  });
  afterEach(async () => {
    await Promise.all(browser.contexts().map((context) => context.close()));
    await standIn.close();
    expect(problems.splice(0)).toEqual([]);
  });

  test('shows every part of the status', async () => {
    const status = scriptedStatus(240);
    const page = await open({ status: { ...status, active: status.active!.slice(0, 100) } });
    await textOf(page, '#state', 'ready');
    await textOf(page, '#live-text', 'Live');
    await textOf(page, '#version', '0.1.0');
    expect(await page.title()).toBe('ready · glm-130b · Tandem');
    expect(await page.locator('link[rel=icon]').getAttribute('href')).toMatch(/^data:image\/svg\+xml,/);

    const text = await page.locator('main').innerText();
    const expected = [
      ...['glm-130b, INT4', '70 layers, hidden 12,288, 96 heads, vocabulary 150,528, context 2,048', '1 d 2 h', '0.1.0'],
      ...['4 of 4 ranks ready, epoch 2', 'Rank 3', 'cpu · avx512 · 8 threads', '16.5 GiB', '3.4 GiB', '212 MiB', '4102'],
      ...['First token', 'Inter-token', 'End to end', 'Queue', '84,211', '21.4 s', '400 µs'],
      ...['schedule', 'all-reduce', '5.30 ms', 'emit'],
      ...['4,096 blocks of 16 tokens', 'cached contexts', '3,391', 'hit rate', '79 %', '1,140 / 310'],
      ...['27,900 prompt tokens wait, the oldest 100 of 150 are shown', 'req-7100', 'team-search', 'preempted', 'prefill'],
      ...['请求-小红喜欢牛奶', '研究组', '密钥文件已重新加载：3 个密钥', 'epoch 1 ended: rank 1 was lost (exit status 137)', 'warning'],
    ];
    expect(expected.filter((part) => !text.includes(part))).toEqual([]);
    const { rates, requests } = status;
    expect(await page.locator('#generated').innerText()).toBe(inEnglish(rates!.generatedTokensPerSecond));
    expect(await page.locator('#queued').innerText()).toBe(String(requests!.queued));
    expect(await page.locator('#totals').innerText()).toContain('steps');

    // Newest first.
    expect(await page.locator('#events li').first().innerText()).toContain('epoch 2 is ready');
    expect(await page.locator('#events li').last().innerText()).toContain('epoch 1 is ready');
    expect(await page.locator('#kv-bar').getAttribute('aria-label')).toMatch(/^used \d+ %, cached contexts \d+ %, free [\d.]+ %$/);
  });

  test('follows the stream: ready, recovering with the reason, ready again', async () => {
    const page = await open({ status: scriptedStatus(150) });
    await textOf(page, '#state', 'ready');
    const icon = await page.locator('link[rel=icon]').getAttribute('href');

    standIn.show(scriptedStatus(205));
    await textOf(page, '#state', 'recovering');
    await textOf(page, '#reason', 'rank 1 was lost (exit status 137); it is started again');
    await textOf(page, '#announce', 'The server is recovering: rank 1 was lost (exit status 137); it is started again.');
    expect(await page.title()).toBe('recovering · glm-130b · Tandem');
    expect(await page.locator('link[rel=icon]').getAttribute('href')).not.toBe(icon);
    const lost = page.locator('.rank').nth(1);
    await textOf(page, '#step-note', 'no step in the last 10 s');
    expect(await lost.innerText()).toContain('absent');

    for (let tick = 206; tick <= 232; tick++) standIn.show(scriptedStatus(tick));
    await textOf(page, '#state', 'ready');
    await textOf(page, '#queued', '114');
    await until(page, `document.getElementById('chart-load').getAttribute('aria-label').includes('now 55 / 114,')`);
    expect(await lost.innerText()).toContain('ready');
    expect(await page.locator('#chart-load .curve-2').getAttribute('d')).toMatch(
      /^M\S+ \S+h0M\S+ [^LM]+(L[^LM]+)+h0$/, // the pause is not bridged
    );
  });

  test('shows a status of which most is missing', async () => {
    const page = await open({ status: { state: 'loading', reason: 'loading the model' } });
    await textOf(page, '#state', 'loading');
    await textOf(page, '#reason', 'loading the model');
    await textOf(page, '#active-empty', 'No request waits or runs.');
    standIn.show({ state: 'of a later version', workers: [{ rank: 0 }], active: [{}], events: [{}] });
    await textOf(page, '#state', 'of a later version');
    await until(page, `document.querySelectorAll('#active-rows tr').length === 1`);
  });

  test('shows hostile strings as text', async () => {
    const status = scriptedStatus(10);
    const page = await open({
      status: {
        ...status,
        reason: HOSTILE,
        model: { ...status.model, name: HOSTILE, path: HOSTILE },
        workers: [{ rank: 0, device: HOSTILE }],
      },
    });
    await textOf(page, '#reason', HOSTILE);
    expect(await page.locator('#active-rows th', { hasText: HOSTILE }).count()).toBe(1);
    expect(await page.locator('#events', { hasText: HOSTILE }).count()).toBe(1);
    expect(await page.locator('#model').innerText()).toContain(HOSTILE);
    expect(await page.locator('.rank .device').innerText()).toBe(HOSTILE);
    expect(await page.locator('img').count()).toBe(0);
    await page.locator('#tab-playground').click();
    await page.fill('#prompt', `${HOSTILE} [MASK]`);
    await page.click('#run');
    const completion = await standIn.nextCompletion();
    completion.send(chunk(0, '<script>document.title = 1</script>'));
    await textOf(page, '#filled', `${HOSTILE} <script>document.title = 1</script>`);
    expect(await page.locator('img').count()).toBe(0);
    expect(await page.title()).toBe(`ready · ${HOSTILE} · Tandem`);
  });

  test('keeps focus, selection and scroll position while requests come and go', async () => {
    const active = (ids: number[]): Status => ({ state: 'ready', active: ids.map((id) => ({ requestId: `r${id}`, state: 'decode' })) });
    const ids = Array.from({ length: 60 }, (_, i) => i);
    const page = await open({ status: active(ids) });
    await page.waitForSelector('#active-rows tr:nth-child(60)');
    await page.locator('[aria-label="Abort r30"]').focus();
    await page.evaluate(`getSelection().selectAllChildren(document.querySelector('#active-rows tr:nth-child(33) th'))`);
    const scroll = await page.evaluate<number>(`document.getElementById('active-scroll').scrollTop`);
    expect(scroll).toBeGreaterThan(100);
    standIn.show(active([...ids.slice(1).filter((id) => id !== 31), 60, 61]));
    await page.waitForSelector('[aria-label="Abort r61"]');
    expect(await page.evaluate(`document.activeElement.getAttribute('aria-label')`)).toBe('Abort r30');
    expect(await page.evaluate(`getSelection().toString()`)).toBe('r32');
    expect(await page.evaluate(`document.getElementById('active-scroll').scrollTop`)).toBeGreaterThan(100);

    standIn.show(active([40, 41])); // the request with the focus has ended
    await until(page, `document.activeElement.id === 'active-scroll'`);
  });

  test('keeps no more than the last minutes', async () => {
    const page = await open({ status: scriptedStatus(0) });
    await textOf(page, '#state', 'ready');
    for (let tick = 1; tick <= 1200; tick++) standIn.show(scriptedStatus(tick));
    await until(page, `document.getElementById('uptime').textContent === '1 d 2 h' && samples.at(-1).t === 1760001200`);
    expect(await page.evaluate('samples.length')).toBe(301);
    expect(await page.locator('#events li').count()).toBe(5);
  });

  test('says when the server does not answer any more, and goes on when it does', async () => {
    const page = await open({ status: scriptedStatus(20) });
    await textOf(page, '#live-text', 'Live');
    standIn.endStreams(true);
    await until(page, `/^Connection lost/.test(document.getElementById('live-text').textContent)`);
    await until(page, `/^No answer for \\d+ s/.test(document.getElementById('live-text').textContent)`);
    await textOf(page, '#state', 'was ready');
    expect(await page.locator('html').getAttribute('data-stale')).toBe('');
    expect(await page.title()).toMatch(/^no answer/);
    expect(await page.locator('#active-rows button').first().getAttribute('aria-disabled')).toBe('true');
    await shot(page, 'stale');

    standIn.endStreams(false);
    standIn.show(scriptedStatus(30));
    if (await page.locator('#retry').isVisible()) await page.click('#retry');
    await textOf(page, '#live-text', 'Live');
    await textOf(page, '#state', 'ready');
    expect(await page.locator('html').getAttribute('data-stale')).toBeNull();
    expectFailedLoads();
  });

  test('opens a new stream when one falls silent', async () => {
    const page = await open({ status: scriptedStatus(20), hasClock: true });
    await textOf(page, '#live-text', 'Live');
    await page.clock.fastForward(6000);
    await textOf(page, '#live-text', /^No answer for [67] s$/);
    await page.clock.fastForward(10_000);
    await page.clock.fastForward(1000); // the wait before the next attempt
    await textOf(page, '#live-text', 'Live'); // the stand-in says something at the beginning of each stream only
    expect(standIn.requests.filter((line) => line.includes('/status/stream')).length).toBe(2);
  });

  test('asks for the API key when the server does, and keeps it out of the address', async () => {
    const page = await open({ status: scriptedStatus(10), keys: { s3cret: ['observe', 'infer'] } });
    await page.waitForSelector('#access:not([hidden])');
    expect(await page.evaluate('document.activeElement.id')).toBe('key');
    await page.keyboard.type('wrong');
    await page.keyboard.press('Enter');
    await textOf(page, '#access-title', 'The server does not know this API key');
    await shot(page, 'key');
    await page.fill('#key', 's3cret');
    await page.keyboard.press('Enter');
    await textOf(page, '#state', 'ready');
    expect(await page.locator('#access').isHidden()).toBe(true);
    expect(page.url()).toBe(standIn.url);
    expect(standIn.requests.filter((line) => line.includes('s3cret'))).toEqual([]);
    expect(await page.evaluate('JSON.stringify([localStorage, document.documentElement.outerHTML])')).not.toContain('s3cret');

    await page.reload();
    await textOf(page, '#state', 'ready'); // from the tab's session
    await page.click('#forget');
    await page.waitForSelector('#access:not([hidden])');
    expect(await page.evaluate('sessionStorage.length')).toBe(0);
    expectFailedLoads();
  });

  test('says which role a key lacks, and lets the playground work without it', async () => {
    const page = await open({ status: scriptedStatus(10), keys: { writer: ['infer'], watcher: ['observe'] } });
    await page.fill('#key', 'writer');
    await page.keyboard.press('Enter');
    await textOf(page, '#access-title', 'This API key may not see the status');
    expect(await page.locator('#access-text').innerText()).toContain('“observe” (the API key has no role observe)');
    await textOf(page, '#reason', 'the API key has no role observe');
    await page.click('#access-close');
    await page.click('#tab-playground');
    await page.click('#run');
    const completion = await standIn.nextCompletion();
    expect(completion.headers.authorization).toBe('Bearer writer');
    completion.send(chunk(0, 'Tokyo'));
    await textOf(page, '.blank >> nth=0', 'Tokyo');
    await page.click('#stop-run');

    await page.click('#forget');
    await page.fill('#key', 'watcher');
    await page.press('#key', 'Enter');
    await textOf(page, '#state', 'ready');
    await page.click('#run');
    await textOf(page, '#run-error', 'the API key has no role infer. The playground needs an API key with the role “infer”');
    await page.click('#tab-status');
    await page.locator('[aria-label="Abort req-7100"]').click();
    await page.click('#confirm-yes');
    await until(page, `document.getElementById('abort-note').textContent.includes('the role “operate”')`);
    expect(await page.locator('[aria-label="Abort req-7100"]').getAttribute('aria-disabled')).toBe('true');
    expectFailedLoads();
  });

  test('aborts a request after a question', async () => {
    const page = await open({ status: scriptedStatus(10) });
    const button = page.locator('#active-rows button').nth(1); // the hostile one: its id has to be escaped in the address
    await button.click();
    await textOf(page, '#confirm-id', HOSTILE);
    await page.keyboard.press('Escape');
    expect(await page.locator('#confirm').isVisible()).toBe(false);
    expect(standIn.aborted).toEqual([]);
    await button.click();
    await page.click('#confirm-yes');
    await textOf(page, '#abort-note', `${HOSTILE} is aborted.`);
    expect(standIn.aborted).toEqual([HOSTILE]);

    standIn.refuseAborts({ status: 404, error: { message: 'no such request', type: 'not_found', param: null, code: null } });
    await page.locator('[aria-label="Abort req-7100"]').click();
    await page.click('#confirm-yes');
    await textOf(page, '#abort-note', 'req-7100 had ended already.');
    expectFailedLoads();
  });

  test('fills blanks where they stand as tokens arrive', async () => {
    const page = await open({ status: scriptedStatus(10), hash: '#playground' });
    await page.fill('#prompt', 'Japan: [MASK], France: [MASK].\n[gMASK] stays');
    await textOf(page, '#blanks-note', '2 [MASK] blanks, filled one after another. [gMASK] stay as they are.');
    await page.fill('#temperature', '0.7');
    await page.fill('#top_k', '40');
    await page.fill('#max_tokens', '32');
    await page.fill('#seed', '7');
    await page.fill('#stop', '\\n\n。');
    await page.click('#run');
    const completion = await standIn.nextCompletion();
    const { body, headers } = completion;
    expect(body).toEqual({
      ...{ model: 'glm-tiny', prompt: 'Japan: [MASK], France: [MASK].\n[gMASK] stays', stream: true, n: 1 },
      ...{ stream_options: { include_usage: true }, temperature: 0.7, top_p: 1, top_k: 40, max_tokens: 32, seed: 7, stop: ['\\n', '。'] },
    });
    expect(headers['x-request-id']).toMatch(/^playground-[A-Za-z0-9._:-]+$/);
    await textOf(page, '#run-state', 'running');
    expect(await page.locator('#run').getAttribute('aria-disabled')).toBe('true');
    expect(await page.locator('#filled').innerText()).toBe('Japan: [MASK], France: [MASK].\n[gMASK] stays');

    completion.send(chunk(0, 'To'));
    await textOf(page, '#filled', 'Japan: To, France: [MASK].\n[gMASK] stays');
    completion.send(chunk(0, 'kyo'));
    await textOf(page, '#filled', 'Japan: Tokyo, France: [MASK].\n[gMASK] stays');
    await shot(page, 'playground-running');
    completion.send(chunk(1, '巴'));
    await textOf(page, '#filled', 'Japan: Tokyo, France: 巴.\n[gMASK] stays');
    expect(await page.locator('.blank').evaluateAll((blanks) => blanks.map((blank) => (blank as { dataset: object }).dataset))).toEqual([
      { state: 'filled' },
      { state: 'filling' },
    ]);
    completion.send(chunk(1, '黎'));
    completion.send({
      choices: [{ index: 0, text: '', blank: 1, finish_reason: 'stop' }],
      timings: { queue_ms: 1.25, prefill_ms: 20, decode_ms: 80, stall_ms: 0 },
    });
    completion.send({
      choices: [],
      usage: { prompt_tokens: 18, completion_tokens: 4, total_tokens: 22, prompt_tokens_details: { cached_tokens: 6 } },
    });
    completion.send('[DONE]');
    completion.end();
    await textOf(page, '#run-state', 'done');
    await textOf(page, '#filled', 'Japan: Tokyo, France: 巴黎.\n[gMASK] stays');
    const outcome = await page.locator('.outcome dd').allInnerTexts();
    expect(outcome).toEqual(['end', '4', '40.0', '18, 6 cached', '1.25 ms', '20.0 ms', '80.0 ms', '0 ms']);
    await textOf(page, '#announce-playground', 'Filled in: Japan: Tokyo, France: 巴黎.\n[gMASK] stays');
    expect(await page.locator('#run').getAttribute('aria-disabled')).toBeNull();
  });

  test('Stop and Escape end the request and leave what came', async () => {
    const page = await open({ status: scriptedStatus(10), hash: '#playground' });
    await page.fill('#prompt', 'Once upon a time');
    await textOf(page, '#blanks-note', 'No blank: the text is continued at its end.');
    for (const [id, stop] of [
      ['stop-run', () => page.click('#stop-run')],
      ['run', () => page.keyboard.press('Escape')],
    ] as const) {
      await page.click('#run');
      const completion = await standIn.nextCompletion();
      completion.send(chunk(0, 'there was'));
      await textOf(page, '#filled', 'Once upon a time there was');
      await stop();
      await completion.aborted;
      await textOf(page, '#run-state', 'stopped');
      expect(await page.locator('#out-finish').innerText()).toBe('stopped');
      expect(await page.locator('#filled').innerText()).toBe('Once upon a time there was');
      expect(await page.evaluate('document.activeElement.id')).toBe(id);
    }
  });

  test('shows refusals and errors in place', async () => {
    const page = await open({ status: scriptedStatus(10), hash: '#playground' });
    const error = { message: 'top_k is 900, the model has 512 tokens', type: 'invalid_request_error', param: 'top_k', code: null };
    standIn.refuseCompletions({ status: 400, error });
    await page.click('#run');
    await textOf(page, '#run-error', 'top_k is 900, the model has 512 tokens (top_k)');
    expect(await page.locator('#top_k').getAttribute('aria-invalid')).toBe('true');
    standIn.refuseCompletions({
      status: 429,
      error: { message: '1024 requests wait', type: 'rate_limit_error', param: null, code: null },
      headers: { 'retry-after': '3' },
    });
    await page.click('#run');
    await textOf(page, '#run-error', '1024 requests wait. Try again in 3 s');
    expect(await page.locator('[aria-invalid]').count()).toBe(0);
    expectFailedLoads();

    standIn.refuseCompletions(null);
    await page.click('#run');
    const failing = await standIn.nextCompletion();
    failing.send(chunk(0, 'To'));
    failing.send({ error: { message: 'the workers were lost', type: 'server_error', param: null, code: null } });
    failing.end();
    await textOf(page, '#run-error', 'the workers were lost');
    expect(await page.locator('.blank').first().innerText()).toBe('To');

    await page.click('#run');
    expect(await page.locator('#run-error').isHidden()).toBe(true);
    (await standIn.nextCompletion()).end();
    await textOf(page, '#run-error', 'The stream ended before the answer did.');

    // What the browser itself can see is wrong is not sent.
    await page.fill('#temperature', '-1');
    const before = standIn.requests.length;
    await page.click('#run');
    expect(await page.locator('#temperature:invalid').count()).toBe(1);
    expect(standIn.requests.slice(before).filter((line) => line.includes('completions'))).toEqual([]);
  });

  test('inserts blanks and examples so that undo brings the text back', async () => {
    const page = await open({ status: scriptedStatus(10), hash: '#playground' });
    await page.fill('#prompt', 'before after');
    await page.evaluate(`document.getElementById('prompt').setSelectionRange(7, 7)`);
    await page.click('[data-mask="[sMASK]"]');
    expect(await page.inputValue('#prompt')).toBe('before [sMASK]after');
    await page.click('#examples button:has-text("北京")');
    expect(await page.inputValue('#prompt')).toBe('中国的首都是[MASK]，中国在[MASK]。');
    await page.keyboard.press('Control+z');
    expect(await page.inputValue('#prompt')).toBe('before [sMASK]after');
  });

  test('is reached by the keyboard alone, in a sensible order', async () => {
    const page = await open({ status: { ...scriptedStatus(10), active: scriptedStatus(10).active!.slice(0, 2) } });
    await textOf(page, '#state', 'ready');
    expect(await walk(page)).toEqual([
      ...['Skip to the content', 'Status', 'Theme: auto', '#active-scroll', 'Abort', 'Abort', 'latency', '#events-scroll'],
    ]);

    await page.keyboard.press('Tab');
    await page.keyboard.press('Enter');
    expect(await page.evaluate('document.activeElement.id')).toBe('main'); // the skip link
    await page.focus('#tab-status');
    await page.keyboard.press('ArrowRight');
    expect(page.url()).toBe(`${standIn.url}#playground`);
    expect(await page.locator('#playground').isVisible()).toBe(true);
    expect(await page.evaluate('document.activeElement.id')).toBe('tab-playground');
    await page.reload(); // Tab begins at the top again
    const seen = await walk(page);
    expect(seen).toEqual([
      ...['Skip to the content', 'Playground', 'Theme: auto', '#prompt', '[MASK]', '[gMASK]', '[sMASK]'],
      ...['Two capitals', 'Young cat', 'Lost dog', 'A word', '北京', '小狗', '反义词', '小提琴'],
      ...['#temperature', '#top_p', '#top_k', '#max_tokens', '#seed', '#stop', 'Run', 'Stop', '#filled'],
    ]);

    await page.focus('#prompt');
    await page.keyboard.press('Control+Enter');
    const completion = await standIn.nextCompletion();
    completion.send(chunk(0, 'Tokyo'));
    await textOf(page, '.blank >> nth=0', 'Tokyo');
    await page.keyboard.press('Escape');
    await completion.aborted;
    expect(await page.evaluate('document.activeElement.id')).toBe('prompt');
  });

  test('keeps the theme that was chosen', async () => {
    const page = await open({ status: scriptedStatus(10), colorScheme: 'light' });
    const ground = (): Promise<string> => page.evaluate(`getComputedStyle(document.body).backgroundColor`);
    const light = await ground();
    await page.click('#theme'); // light
    expect(await ground()).toBe(light);
    await page.click('#theme');
    const dark = await ground();
    expect(dark).not.toBe(light);
    await page.reload();
    expect(await page.locator('#theme').innerText()).toBe('Theme: dark');
    expect(await ground()).toBe(dark);
    await page.click('#theme');
    expect(await ground()).toBe(light);
    await page.emulateMedia({ colorScheme: 'dark' });
    expect(await ground()).toBe(dark);
  });

  describe.each([
    ['light', 'desktop', DESKTOP],
    ['dark', 'desktop', DESKTOP],
    ['light', 'tablet', { width: 820, height: 1100 }],
    ['light', 'phone', PHONE],
    ['dark', 'phone', PHONE],
  ] as const)('%s, %s', (colorScheme, device, viewport) => {
    test('fits the screen, has names for all controls, landmarks, and enough contrast', async () => {
      const page = await open({ status: scriptedStatus(0), colorScheme, viewport, hasTouch: device !== 'desktop' });
      for (let tick = 1; tick <= 245; tick++) standIn.show(scriptedStatus(tick));
      await until(page, `document.getElementById('events').textContent.includes('epoch 2 is ready')`);
      await shot(page, `status-${device}-${colorScheme}`, true);
      expect(await audit(page)).toEqual([]);
      expect(await page.evaluate('document.documentElement.scrollWidth - innerWidth')).toBeLessThanOrEqual(0);

      await page.click('#tab-playground');
      await page.click('#run');
      const completion = await standIn.nextCompletion();
      completion.send(chunk(0, 'Tokyo'));
      await textOf(page, '.blank >> nth=0', 'Tokyo');
      await shot(page, `playground-${device}-${colorScheme}`, true);
      expect(await audit(page)).toEqual([]);
      completion.send({ error: { message: 'the workers were lost', type: 'server_error', param: null, code: null } });
      completion.end();
      await page.waitForSelector('#run-error:not([hidden])');
      expect(await audit(page)).toEqual([]);
      expect(await page.evaluate('document.documentElement.scrollWidth - innerWidth')).toBeLessThanOrEqual(0);
    });
  });

  test.each([
    ['desktop', DESKTOP],
    ['phone', PHONE],
  ])('does not move anything when numbers change, %s', async (_, viewport) => {
    const page = await open({ status: scriptedStatus(150), viewport });
    await textOf(page, '#state', 'ready');
    await page.waitForSelector('.rank');
    // Everything but what is inside the lists, whose items come and go, and inside lines of text.
    const boxes = `[...document.querySelectorAll('.panel, .tile, .rank, .stack, .chart, .scroll, #strip, [role=tab]')].map((node) => {
      const { x, y, width, height } = node.getBoundingClientRect();
      return [node.id || node.className, x, y, width, height].join(' ');
    })`;
    const before = await page.evaluate(boxes);
    const idle = { ...scriptedStatus(190), active: [], events: [], step: {}, latency: {}, rates: {} };
    for (const status of [scriptedStatus(151), scriptedStatus(180), idle, scriptedStatus(240)]) {
      standIn.show(status);
      await textOf(page, '#finished', inEnglish(status.requests!.finished));
      expect(await page.evaluate(boxes)).toEqual(before);
    }
  });
});

interface OpenOptions extends Pick<BrowserContextOptions, 'viewport' | 'colorScheme' | 'hasTouch'> {
  readonly status: Status;
  readonly keys?: Readonly<Record<string, readonly string[]>>;
  readonly hash?: string;
  /** The test can move the page's clock on. */
  readonly hasClock?: boolean;
}

async function open({ status, keys, hash = '', hasClock = false, ...options }: OpenOptions): Promise<Page> {
  standIn = await startStandIn(status);
  if (keys) standIn.requireKeys(keys);
  const context = await browser.newContext({ viewport: DESKTOP, colorScheme: 'light', reducedMotion: 'reduce', ...options });
  const page = await context.newPage();
  page.on('console', (message) => void (['error', 'warning'].includes(message.type()) && problems.push(message.text())));
  page.on('pageerror', (error) => problems.push(String(error)));
  page.on(
    'request',
    (request) => void (request.url().startsWith(standIn.url) || request.url().startsWith('data:') || problems.push(request.url())),
  );
  await page.addInitScript(`addEventListener('securitypolicyviolation', (event) => console.error('policy: ' + event.violatedDirective))`);
  if (hasClock) await page.clock.install();
  await page.goto(`${standIn.url}${hash}`);
  return page;
}

/** Chromium logs answers that are errors, and lost connections, by itself. */
function expectFailedLoads(): void {
  const others = problems.filter((problem) => !/^Failed to load resource: /.test(problem));
  expect(problems.length).toBeGreaterThan(others.length);
  problems = others;
}

const chunk = (blank: number, text: string): object => ({
  object: 'text_completion',
  choices: [{ index: 0, text, blank, finish_reason: null }],
});

const inEnglish = (value: unknown): string => new Intl.NumberFormat('en', { maximumFractionDigits: 0 }).format(Number(value));

/** Waits until the text of a node is `text`. */
async function textOf(page: Page, selector: string, text: string | RegExp): Promise<void> {
  try {
    await page
      .locator(selector)
      .filter({ hasText: typeof text === 'string' ? exactly(text) : text })
      .waitFor({ state: 'attached', timeout: 20_000 });
  } catch (error) {
    throw new Error(`${selector} is "${await page.locator(selector).textContent()}", expected "${text}"`, { cause: error });
  }
}

/** Waits until an expression holds in the page. Not Playwright's own: it evaluates strings in the page, which the policy forbids. */
async function until(page: Page, expression: string): Promise<void> {
  await expect.poll(() => page.evaluate(expression), { timeout: 30_000, message: expression }).toBe(true);
}

const exactly = (text: string): RegExp => new RegExp(`^\\s*${text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&').replace(/\s+/g, '\\s+')}\\s*$`);

/** Presses Tab from the beginning of the page to its end, and gives what had the focus; all of it has to be marked visibly. */
async function walk(page: Page): Promise<string[]> {
  const seen: string[] = [];
  for (;;) {
    await page.keyboard.press('Tab');
    const [name, isMarked] = await page.evaluate<[string | null, boolean]>(`(() => {
      const node = document.activeElement;
      if (node === document.body || node === null) return [null, true];
      const marked = node.type === 'radio' ? node.parentElement : node;
      const isMarked = getComputedStyle(marked).outlineStyle === 'solid';
      const ofButton = ['A', 'BUTTON'].includes(node.tagName) ? node.textContent.trim() : node.id ? '#' + node.id : node.name;
      return [ofButton, isMarked];
    })()`);
    if (name === null) return seen;
    expect(isMarked, `focus on ${name} is visible`).toBe(true);
    seen.push(name);
  }
}

/** What is wrong for those who do not see the page, or not well. */
async function audit(page: Page): Promise<string[]> {
  return page.evaluate<string[]>(AUDIT);
}

/** In the page. Colours are read back from a canvas, as they may be written in any way. */
const AUDIT = `(() => {
  const found = [];
  const isShown = (node) => node.checkVisibility({ visibilityProperty: true });
  const h1 = document.querySelectorAll('h1');
  if (h1.length !== 1) found.push(h1.length + ' h1');
  for (const tag of ['header', 'main', 'footer']) {
    if (document.querySelectorAll('body > ' + tag).length !== 1) found.push('not one ' + tag);
  }
  let level = 1;
  for (const heading of document.querySelectorAll('h1, h2, h3')) {
    const next = Number(heading.tagName[1]);
    if (next > level + 1) found.push('heading ' + heading.textContent + ' jumps');
    level = next;
  }
  const ids = [...document.querySelectorAll('[id]')].map((node) => node.id);
  for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) found.push('id twice: ' + id);
  for (const attribute of ['aria-labelledby', 'aria-describedby', 'aria-controls']) {
    for (const node of document.querySelectorAll('[' + attribute + ']')) {
      for (const id of node.getAttribute(attribute).split(' ')) if (!ids.includes(id)) found.push(attribute + ' of nothing: ' + id);
    }
  }
  for (const node of document.querySelectorAll('input, textarea, select, button, a, [tabindex="0"], section, [role=img]')) {
    if (!isShown(node)) continue;
    const labelledBy = node.getAttribute('aria-labelledby');
    const isNamedByText = ['BUTTON', 'A'].includes(node.tagName);
    const name = [node.getAttribute('aria-label'), labelledBy && document.getElementById(labelledBy).textContent, ...[...(node.labels ?? [])].map((label) => label.textContent), isNamedByText && node.textContent];
    if (!name.some((text) => text && text.trim() !== '')) found.push('no name: ' + node.outerHTML.slice(0, 80));
    const { width, height } = node.getBoundingClientRect();
    if (['BUTTON', 'TEXTAREA'].includes(node.tagName) && (width < 24 || height < 24)) found.push('too small: ' + node.outerHTML.slice(0, 80));
  }

  const context = Object.assign(document.createElement('canvas'), { width: 1, height: 1 }).getContext('2d', { willReadFrequently: true });
  const known = new Map();
  const over = (ground, colour) => {
    const key = ground + '|' + colour;
    if (!known.has(key)) {
      context.fillStyle = ground;
      context.fillRect(0, 0, 1, 1);
      context.fillStyle = colour;
      context.fillRect(0, 0, 1, 1);
      known.set(key, 'rgb(' + [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).join(',') + ')');
    }
    return known.get(key);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.match(/\\d+/g).map((part) => part / 255).map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const groundOf = (node) => {
    const { backgroundColor } = getComputedStyle(node);
    return over(node.parentElement ? groundOf(node.parentElement) : 'white', backgroundColor);
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    if (texts.currentNode.data.trim() === '' || !isShown(node) || node.closest('.unseen, .skip, script, svg')) continue;
    const ground = groundOf(node);
    const text = over(ground, getComputedStyle(node).color);
    const [low, high] = [luminance(ground), luminance(text)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.push('contrast ' + ratio.toFixed(2) + ' of "' + texts.currentNode.data.trim().slice(0, 40) + '"');
  }
  return [...new Set(found)];
})()`;

async function shot(page: Page, name: string, fullPage = false): Promise<void> {
  if (!screenshotDir) return;
  mkdirSync(screenshotDir, { recursive: true });
  await page.evaluate('scrollTo(0, 0)'); // a bar that sticks is drawn where it is
  await page.screenshot({ path: join(screenshotDir, `${name}.png`), fullPage });
}
