import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    include: ['{bench,cli,common,coordinator,model,native,test,worker}/**/*.test.ts'],
    // Integration tests start real processes, and machines may have two cores: a few files at a time, and patience.
    maxWorkers: 2,
    testTimeout: 120_000,
    hookTimeout: 120_000,
    expect: { poll: { timeout: 60_000 } },
  },
});
