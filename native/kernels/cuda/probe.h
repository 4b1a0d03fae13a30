// Whether this build's kernels run on the thread's GPU at all.
#pragma once

#include "kernels/cuda/device.h"

namespace tandem::cuda {

// Runs an empty kernel. Not cudaSuccess: cudaErrorNoKernelImageForDevice where the build has none for its compute capability.
cudaError_t ProbeKernels();

}  // namespace tandem::cuda
