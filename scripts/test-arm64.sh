#!/usr/bin/env bash
# The native tests for arm64 on another machine: cross-compiled, run by qemu. Not part of npm test: it takes minutes, and emulation is no arm64 machine.
set -euo pipefail
cd "$(dirname "$0")/.."
for need in aarch64-linux-gnu-g++ qemu-aarch64-static cmake; do
  command -v "$need" >/dev/null || { echo "test:native:arm64: no $need found (Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static cmake)" >&2; exit 1; }
done
build=native/build/arm64
cmake -S native -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DCMAKE_EXE_LINKER_FLAGS=-static >/dev/null
cmake --build "$build" --target tandem_test --parallel 2
exec qemu-aarch64-static "$build/tandem_test" "$@"
