// Everything that demo, tests and benchmarks need, from a fresh clone on: packages, generated types, the native addon, the
// compiled program and the tiny model's store. Each part is made again only when what it is made from has changed.
// Plain JavaScript without packages: it runs before there are any.
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
process.chdir(root);
/** Folders among the sources that are filled here: by set-up itself, and by the bench. */
const MADE_HERE = ['native/build', 'proto/generated', 'model/tiny/store', 'bench/peer/node_modules'];

const [major, minor] = process.versions.node.split('.').map(Number);
if (major < 20 || (major === 20 && minor < 19)) fail(`Node ${process.versions.node} is here, 20.19 or later is needed`);
if (!has('cmake')) fail('no CMake found: install it (Debian: apt-get install cmake)');
if (!['c++', 'g++', 'clang++', process.env.CXX].some((compiler) => compiler && has(compiler))) {
  fail('no C++ compiler found: install one that knows C++17 (Debian: apt-get install g++)');
}

step('packages', 'node_modules/.tandem-setup', ['package-lock.json'], () => npm('ci', '--no-audit', '--no-fund'));
step('types of the gRPC messages', 'proto/generated/.tandem-setup', ['proto', 'package-lock.json'], () => npm('run', 'build:proto'));
// What native/cuda.cmake looks at.
const cuda = [process.env.TANDEM_CUDA_ARCHITECTURES, process.env.CI, has('nvcc'), has('nvidia-smi')].join();
step('native addon', 'native/build/.tandem-setup', ['native'], () => npm('run', 'build:native'), cuda);
step('program', 'dist/.tandem-setup', sourcesOfProgram(), () => npm('run', 'build:ts'));

const { ensureTinyStore } = await import(pathToFileURL(join(root, 'dist/model/tiny/tiny-model.js')).href);
await ensureTinyStore();

function sourcesOfProgram() {
  return [
    'bench',
    'cli',
    'common',
    'coordinator',
    'model',
    'native/binding',
    'proto',
    'test',
    'worker',
    'tsconfig.json',
    'package-lock.json',
  ];
}

/** Runs `make` unless the stamp says that it ran on these very sources, in this `setting`. */
function step(what, stamp, sources, make, setting = '') {
  const hash = createHash('sha256').update(setting);
  for (const file of sources.flatMap(filesBelow)) hash.update(file).update('\0').update(readFileSync(file)).update('\0');
  const digest = hash.digest('hex');
  if (existsSync(stamp) && readFileSync(stamp, 'utf8') === digest) return;
  const start = Date.now();
  process.stderr.write(`setup: ${what} ...`);
  const result = make();
  if (result.error || result.status !== 0) {
    process.stderr.write(' failed\n');
    process.stderr.write(`${result.stdout ?? ''}${result.stderr ?? ''}${result.error?.message ?? ''}`.split('\n').slice(-60).join('\n'));
    fail(`${what}: the command above failed`);
  }
  writeFileSync(stamp, digest);
  process.stderr.write(` ${((Date.now() - start) / 1000).toFixed(0)} s\n`);
}

function filesBelow(path) {
  if (!statSync(path).isDirectory()) return [path];
  return readdirSync(path, { withFileTypes: true })
    .filter((entry) => !MADE_HERE.includes(join(path, entry.name)))
    .sort((a, b) => (a.name < b.name ? -1 : 1))
    .flatMap((entry) => filesBelow(join(path, entry.name)))
    .filter((file) => /\.(ts|proto|cc|h|cu|inc|cmake|txt|json)$/.test(file) && !file.startsWith('model/tiny/eval/'));
}

function npm(...args) {
  return spawnSync('npm', args, { encoding: 'utf8', maxBuffer: 64 * 1024 * 1024 });
}

function has(command) {
  return spawnSync(command, ['--version'], { stdio: 'ignore' }).status === 0;
}

function fail(message) {
  process.stderr.write(`setup: ${message}\n`);
  process.exit(1);
}
