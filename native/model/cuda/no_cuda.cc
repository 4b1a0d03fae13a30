// What a build without nvcc has in place of the CUDA backend.
#include "core/error.h"
#include "model/cuda/cuda_backend.h"

namespace tandem {
namespace {

[[noreturn]] void Refuse() {
  throw Error(ErrorCode::kInvalidArgument,
              "device: this build has no CUDA backend; install the CUDA toolkit (nvcc, 12 or later), run npm run setup again, or use cpu");
}

}  // namespace

bool HasCuda() { return false; }

GpuDescription DescribeGpu(int) { Refuse(); }

std::unique_ptr<Backend> MakeCudaBackend(EngineOptions, Communicator&, ThreadPool&, const std::atomic<bool>&) {
  Refuse();
}

}  // namespace tandem
