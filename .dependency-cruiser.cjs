// Who may know whom (docs/architecture.md). A test may import whatever it tests.
const notTests = { pathNot: '\\.test\\.ts$' };

/** @type {import('dependency-cruiser').IConfiguration} */
module.exports = {
  forbidden: [
    { name: 'no-cycles', severity: 'error', from: {}, to: { circular: true } },
    {
      name: 'common-knows-only-proto',
      severity: 'error',
      from: { path: '^common/' },
      to: { path: '^(model|coordinator|worker|cli|bench|native|test)/' },
    },
    {
      name: 'model-knows-only-common',
      severity: 'error',
      from: { path: '^model/', pathNot: '^model/import/import-kernels\\.ts$|\\.test\\.ts$' },
      to: { path: '^(proto|coordinator|worker|cli|bench|native|test)/' },
    },
    {
      name: 'coordinator-and-worker-meet-in-proto',
      severity: 'error',
      from: { path: '^coordinator/', ...notTests },
      to: { path: '^(worker|native|cli|bench|test)/' },
    },
    {
      name: 'worker-knows-no-coordinator',
      severity: 'error',
      from: { path: '^worker/', ...notTests },
      to: { path: '^(coordinator|cli|bench|test)/' },
    },
    {
      // The import quantises and checks with kernels of the addon.
      name: 'native-is-loaded-by-the-worker-engine-and-the-import',
      severity: 'error',
      from: { pathNot: '^(native/|worker/(engine|wire)\\.ts$|model/import/import-kernels\\.ts$|bench/|test/(gpu|support)/)|\\.test\\.ts$' },
      to: { path: '^native/' },
    },
    {
      name: 'scheduler-is-pure',
      severity: 'error',
      from: { path: '^coordinator/scheduler/', ...notTests },
      to: { pathNot: '^coordinator/(scheduler|generation/strategy\\.ts)', dependencyTypesNot: ['type-only'] },
    },
    {
      name: 'strategies-know-no-wire-and-no-engine',
      severity: 'error',
      from: { path: '^coordinator/generation/', ...notTests },
      to: { path: '^(proto/|coordinator/(api|group|status|scheduler|serving-loop))' },
    },
    {
      name: 'wire-types-stop-at-the-edge',
      severity: 'error',
      from: { path: '^(coordinator/(serving-loop|scheduler|generation|group/engine)|model/)', ...notTests },
      to: { path: '^proto/|grpc' },
    },
    {
      name: 'clients-talk-through-the-wire',
      severity: 'error',
      // The coordinator's own cost per step can not be seen through the wire: workers and network hide it.
      from: {
        path: '^(cli|bench)/',
        pathNot: '^cli/commands/(serve|worker|key)\\.ts$|^bench/serve/(coordinator-process|echo-engine)\\.ts$|\\.test\\.ts$',
      },
      to: { path: '^(coordinator|worker)/' },
    },
  ],
  options: {
    tsPreCompilationDeps: true,
    tsConfig: { fileName: 'tsconfig.json' },
    doNotFollow: { path: 'node_modules|proto/generated|dist' },
    exclude: { path: 'node_modules|proto/generated|dist|\\.d\\.ts$' },
  },
};
