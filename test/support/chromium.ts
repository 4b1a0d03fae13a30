/** The Chromium that is installed on this machine: Debian's package `chromium`. Nothing is downloaded. */
import { existsSync } from 'node:fs';
import { type Browser, chromium } from 'playwright-core';

const PATHS = ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'];

/** Null where there is none. */
export const chromiumPath: string | null = PATHS.find((path) => existsSync(path)) ?? null;

export const NO_CHROMIUM = `no Chromium at ${PATHS.join(', ')}: install it (Debian: apt-get install --no-install-recommends chromium)`;

export function launchChromium(): Promise<Browser> {
  if (chromiumPath === null) throw new Error(NO_CHROMIUM);
  // Its sandbox refuses to run as root, which is who runs tests in containers; the pages are our own.
  const args = ['--disable-dev-shm-usage', ...(process.getuid?.() === 0 ? ['--no-sandbox'] : [])];
  return chromium.launch({ executablePath: chromiumPath, args });
}
