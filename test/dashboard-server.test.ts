/** The dashboard in a browser, served by a real server with two workers under load. Its details are in dashboard.test.ts. */
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import type { Browser, Page } from 'playwright-core';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { startLocalCluster, type LocalCluster } from '../cli/local-cluster.js';
import { chromiumPath, launchChromium, NO_CHROMIUM } from './support/chromium.js';

if (chromiumPath === null) process.stderr.write(`test/dashboard-server.test.ts is skipped: ${NO_CHROMIUM}\n`);

const PROMPT = 'The capital of [MASK] is Tokyo, and the capital of [MASK] is Paris.';
/** Where to put pictures of the page; unset: nowhere. */
const screenshotDir = process.env['TANDEM_SCREENSHOTS'];

let browser: Browser;
let cluster: LocalCluster;
let page: Page;
const problems: string[] = [];

describe.skipIf(chromiumPath === null)('the dashboard of a real server', () => {
  beforeAll(async () => {
    browser = await launchChromium();
    cluster = await startLocalCluster({ model: null, worldSize: 2, http: true, logLevel: 'silent' });
    page = await browser.newPage({ viewport: { width: 1440, height: 900 } });
    page.on('console', (message) => message.type() === 'error' && problems.push(message.text()));
    page.on('pageerror', (error) => problems.push(error.message));
    await page.goto(`http://${cluster.httpAddress}/`);
  });
  afterAll(async () => {
    await browser?.close();
    await cluster?.close();
    expect(problems).toEqual([]);
  });

  async function screenshot(name: string): Promise<void> {
    if (!screenshotDir) return;
    mkdirSync(screenshotDir, { recursive: true });
    await page.screenshot({ path: join(screenshotDir, `real-${name}.png`), fullPage: true });
  }

  async function untilShown(selector: string, part: string): Promise<void> {
    await expect.poll(() => page.locator(selector).innerText(), { timeout: 60_000 }).toContain(part);
  }

  test('shows the ranks, and what runs, by the names that clients gave', async () => {
    await untilShown('#state', 'ready');
    const cancel = new AbortController();
    const load = Array.from({ length: 8 }, (_, i) =>
      cluster.client
        .generate(
          { text: `Once upon a time ${i}`, maxNewTokens: 480, endTokens: { ids: [] }, seed: i, options: { requestId: `story-${i}` } },
          () => {},
          cancel.signal,
        )
        .catch(() => null),
    );
    await untilShown('main', 'story-7');
    await untilShown('main', 'Rank 1');
    await screenshot('load');
    cancel.abort();
    await Promise.all(load);
    await untilShown('#running', '0');
  });

  test('the playground fills the blanks with what the server generates', async () => {
    const { outputs } = await cluster.client.generate({ text: PROMPT, temperature: 0, maxNewTokens: 16 });
    const [first, second] = outputs[0]!.blanks.map(({ text }) => text.trim());
    await page.locator('#tab-playground').click();
    await page.locator('#prompt').fill(PROMPT);
    await page.locator('#temperature').fill('0');
    await page.locator('#prompt').press('Control+Enter');
    await expect
      .poll(() => page.locator('#filled').innerText(), { timeout: 30_000 })
      .toMatch(new RegExp(`^The capital of\\s*${first}\\s*is Tokyo, and the capital of\\s*${second}\\s*is Paris\\.$`));
    await screenshot('playground');
  });

  test('names the rank that is lost, and goes on', async () => {
    const { workers } = await cluster.client.status();
    process.kill(workers[1]!.pid, 'SIGKILL');
    await page.locator('#tab-status').click();
    await untilShown('#events', 'epoch 1 ended: rank 1');
    await untilShown('#events', 'epoch 2 is ready');
    await untilShown('#state', 'ready');
  });
});
