// Attention of query rows over the paged KV cache. What a row sees is always a prefix of its sequence: all cached tokens and, of the run, those
// up to itself or, inside the bidirectional context, up to the context's end.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"
#include "core/thread_pool.h"
#include "kernels/kv_layout.h"

namespace tandem {

// Largest head size; it bounds the kernel's stack. GLM-130B has 128.
constexpr int64_t kMaxHeadDim = 512;

// One query row.
struct AttentionRow {
  const uint32_t* block_table;  // the sequence's blocks, at least ceil(visible / block_size)
  int64_t visible;              // >= 1: the row attends to tokens 0 .. visible - 1 of its sequence
};

// out[i, head, :] = softmax(q . k / sqrt(head_dim)) v over the row's visible tokens
//   q, out: [m, num_heads * head_dim] dense, may be the same memory; rows: [m]
// Batch invariant: a row's result depends on its q, its visible tokens' K and V and nothing else (order of the sum fixed by `visible` alone).
void Attention(Isa isa, const float* q, const AttentionRow* rows, int64_t m, const KvLayer& kv, float* out, ThreadPool& pool);

void AttentionRef(const float* q, const AttentionRow* rows, int64_t m, const KvLayer& kv, float* out);

}  // namespace tandem
