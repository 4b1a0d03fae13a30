// attention.cu: a warp takes 16 query rows (of which a decoding sequence has one) over the keys of one part, with tensor cores and an online softmax; no
// score leaves the registers. AttentionSplit runs one such warp for each part and merges the parts' states in a second kernel; AttentionWhole lets four
// warps share the keys and values in shared memory and merges as it goes. Both run the same steps on a row in the same order, hence the same bits: keys in
// blocks of C::kKeys, each block's products k ascending, masked keys with a weight of exactly 0, a block that is masked wholly multiplying by exactly 1.
#include "kernels/cuda/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cuda/instructions.h"

namespace tandem::cuda {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kWarpRows = 16;
constexpr int kPart = static_cast<int>(kAttentionPart);

// What a kernel is compiled for: head sizes up to kDimension, whose further columns are zeros in shared memory.
template <int kDimension, KvType kType, bool kSplitOverParts>
struct Config {
  static constexpr int kDim = kDimension;
  static constexpr bool kInt8 = kType == KvType::kI8;
  static constexpr bool kSplit = kSplitOverParts;
  static constexpr bool kQueryInRegisters = kDim <= 128;
  static constexpr int kChunks = kDim / 8;               // of 16 bytes, in a row of a tile
  static constexpr int kKeys = kDim <= 128 ? 64 : 16;    // between two looks at the maximum
  static constexpr int kWarps = kSplit ? 1 : kDim <= 128 ? 4 : 2;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kMinBlocks = kSplit ? 8 : 2;      // 255 registers a thread
  // Keys and values come in stages of kStageKeys, through a ring. INT8 stages are widened into one tile, which leaves their own places free at once.
  static constexpr int kStageKeys = kSplit && kDim <= 128 ? kKeys / 2 : kKeys;
  static constexpr int kStagesOfKeys = kKeys / kStageKeys;
  static constexpr int kStages = kSplit ? 4 : kInt8 ? 1 : 2;
  // Turns of the copying loops that are unrolled: fewer where registers are short.
  static constexpr int kCopiesAtOnce = kSplit && kDim <= 128 ? 4 : kDim <= 128 && !kInt8 ? 4 : 1;
  static constexpr int kTileBytes = kStageKeys * kDim * 2;
  static constexpr int kInt8Bytes = kStageKeys * kDim;   // the scales lie behind
  static constexpr int kStageBytes = kInt8 ? kInt8Bytes + (kStageKeys * 2 + 127) / 128 * 128 : kTileBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kWidenedBytes = kInt8 ? kTileBytes : 0;
  static constexpr int kTotalsBytes = kSplit ? 0 : kWarps * kWarpRows * kDim * 4;
  static constexpr int kSharedBytes = kRingBytes + kWidenedBytes + kTotalsBytes;
};

struct Parameters {
  const __half* q;
  __half* out;
  int64_t q_stride, out_stride;
  const CudaAttentionRow* rows;
  const uint32_t* tables;
  const CudaAttentionTile* tiles;
  const void* k;
  const void* v;
  const __half* k_scales;
  const __half* v_scales;
  uint32_t num_heads, block_size, head_dim;
  float scale;  // log2(e) / sqrt(head_dim)
  // Of AttentionSplit: [slots, max_parts, num_heads] states (maximum, sum of weights), and their sums of values, [.., head_dim].
  float2* states;
  float* sums;
  uint32_t max_parts;
};

// Where chunk `chunk` of row `row` of a tile lies, in bytes. The eight rows of an 8x8 matrix are in different banks.
template <typename C>
__device__ __forceinline__ int TileOffset(int row, int chunk) {
  constexpr int kSpread = C::kChunks < 8 ? C::kChunks : 8, kRowsOfLine = 8 / kSpread;
  return (row * C::kChunks + (chunk ^ (row / kRowsOfLine % kSpread))) * 16;
}

__device__ __forceinline__ uint32_t PackHalves(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

__device__ __forceinline__ __half2 HalvesOf(uint32_t bits) {
  __half2 pair;
  memcpy(&pair, &bits, sizeof bits);
  return pair;
}

__device__ __forceinline__ float MinusInfinity() { return __uint_as_float(0xff800000u); }

// The exponent's zero: the maximum, or anything while no key was seen.
__device__ __forceinline__ float ExponentBase(float maximum) { return maximum == MinusInfinity() ? 0.0f : maximum; }

// How the states of a row's earlier parts and of the next one go together.
struct MergeFactors {
  __device__ MergeFactors(float earlier_maximum, float later_maximum) : maximum(fmaxf(earlier_maximum, later_maximum)) {
    earlier = Exp2(earlier_maximum - ExponentBase(maximum));
    later = Exp2(later_maximum - ExponentBase(maximum));
  }
  __device__ float Merge(float of_earlier, float of_later) const { return fmaf(of_later, later, __fmul_rn(of_earlier, earlier)); }

  float maximum, earlier, later;
};

template <typename C>
__device__ __forceinline__ void SyncWarps() {
  if constexpr (C::kWarps == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Brings one stage of keys or values after the other into shared memory, some of them ahead. Stages are numbered from token 0 on: for each C::kKeys tokens
// first those of K, then those of V. Tokens from `limit` on, and columns from head_dim on, are zeros.
template <typename C>
class Reader {
 public:
  static constexpr int kStagesPerBlock = 2 * C::kStagesOfKeys, kAhead = C::kInt8 ? C::kStages : C::kStages - 1;

  __device__ Reader(const Parameters& parameters, unsigned char* shared, uint32_t table_offset, uint32_t head, uint32_t limit, int first_block, int end_block)
      : p_(parameters), shared_(shared), table_offset_(table_offset), head_(head), limit_(limit), stage_(first_block * kStagesPerBlock),
        end_(end_block * kStagesPerBlock) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) Start(stage_ + i);
  }

  // The next stage's tile, [C::kStageKeys, C::kDim], good until the next call.
  __device__ const unsigned char* Next() {
    const unsigned char* tile;
    if constexpr (C::kInt8) {
      CpAsyncWait<C::kStages - 1>();
      SyncWarps<C>();
      Widen();
      SyncWarps<C>();
      tile = shared_ + C::kRingBytes;
    } else {
      CpAsyncWait<C::kStages - 2>();
      SyncWarps<C>();  // all have the stage, and are done with the one before, whose place is next
      tile = Place(stage_);
    }
    Start(stage_ + kAhead);
    ++stage_;
    return tile;
  }

 private:
  __device__ unsigned char* Place(int stage) const { return shared_ + stage % C::kStages * C::kStageBytes; }
  __device__ static uint32_t FirstToken(int stage) {
    return static_cast<uint32_t>(stage / kStagesPerBlock * C::kKeys + stage % C::kStagesOfKeys * C::kStageKeys);
  }
  __device__ static bool OfValues(int stage) { return stage % kStagesPerBlock >= C::kStagesOfKeys; }

  __device__ void Start(int stage) {
    if (stage < end_) Copy(stage);
    CpAsyncCommit();
  }

  // Eight tokens are never in two blocks: a lane for each eight of the part knows where they are.
  __device__ void FindRows(uint32_t first_token_of_part) {
    const uint32_t token = first_token_of_part + threadIdx.x % kWarpSize * 8;
    if (token >= limit_) return;
    octet_row_ = (p_.tables[table_offset_ + token / p_.block_size] * p_.num_heads + head_) * p_.block_size + token % p_.block_size;
  }

  __device__ void Copy(int stage) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const uint32_t first_token = FirstToken(stage);
    const bool of_values = OfValues(stage);
    unsigned char* place = Place(stage);
    const void* plane = of_values ? p_.v : p_.k;
    if (!of_values && first_token % kPart == 0) FindRows(first_token);
    const int first_octet = static_cast<int>(first_token % kPart) / 8;
#pragma unroll(C::kCopiesAtOnce)
    for (int octet = warp; octet < C::kStageKeys / 8; octet += C::kWarps) {
      const uint32_t row = __shfl_sync(kAllLanes, octet_row_, first_octet + octet), token = first_token + static_cast<uint32_t>(octet) * 8;
      if constexpr (C::kInt8) {
        const int8_t* from = static_cast<const int8_t*>(plane) + static_cast<size_t>(row) * p_.head_dim;
#pragma unroll(C::kCopiesAtOnce)
        for (uint32_t i = static_cast<uint32_t>(lane); i < p_.head_dim / 2; i += kWarpSize) {
          CpAsync16(place + static_cast<uint32_t>(octet) * 8 * p_.head_dim + i * 16, from + i * 16, token < limit_);
        }
        const __half* scales = (of_values ? p_.v_scales : p_.k_scales) + row;
        if (lane == 0) CpAsync16(place + C::kInt8Bytes + octet * 16, scales, token < limit_);
      } else {
        const __half* from = static_cast<const __half*>(plane) + static_cast<size_t>(row) * p_.head_dim;
#pragma unroll(C::kCopiesAtOnce)
        for (int i = 0; i < C::kChunks / 4; ++i) {
          const int in_octet = (i * kWarpSize + lane) / C::kChunks, chunk = (i * kWarpSize + lane) % C::kChunks;
          const bool valid = token + static_cast<uint32_t>(in_octet) < limit_ && static_cast<uint32_t>(chunk) * 8 < p_.head_dim;
          CpAsync16(place + TileOffset<C>(octet * 8 + in_octet, chunk), from + static_cast<uint32_t>(in_octet) * p_.head_dim + chunk * 8, valid);
        }
      }
    }
  }

  // int8 times scale, in fp16. A byte with its sign bit turned over behind 0x64 is the half 1024 + 128 + x.
  __device__ void Widen() {
    const unsigned char* from = Place(stage_);
    const __half* scales = reinterpret_cast<const __half*>(from + C::kInt8Bytes);
    const uint32_t first_token = FirstToken(stage_);
    const __half2 bias = __float2half2_rn(1152.0f);
#pragma unroll(C::kCopiesAtOnce)
    for (int i = static_cast<int>(threadIdx.x); i < C::kStageKeys * C::kChunks; i += C::kThreads) {
      const int row = i / C::kChunks, chunk = i % C::kChunks;
      uint4 wide = make_uint4(0, 0, 0, 0);
      if (first_token + static_cast<uint32_t>(row) < limit_ && static_cast<uint32_t>(chunk) * 8 < p_.head_dim) {
        const uint2 bytes = *reinterpret_cast<const uint2*>(from + static_cast<uint32_t>(row) * p_.head_dim + chunk * 8);
        const __half2 scale = __half2half2(scales[row]);
        const auto widen = [&](uint32_t four, uint32_t selector) {
          const __half2 values = __hmul2(__hsub2(HalvesOf(Prmt(four ^ 0x80808080u, 0x64646464u, selector)), bias), scale);
          uint32_t bits;
          memcpy(&bits, &values, sizeof bits);
          return bits;
        };
        wide = make_uint4(widen(bytes.x, 0x4140u), widen(bytes.x, 0x4342u), widen(bytes.y, 0x4140u), widen(bytes.y, 0x4342u));
      }
      *reinterpret_cast<uint4*>(shared_ + C::kRingBytes + TileOffset<C>(row, chunk)) = wide;
    }
  }

  const Parameters& p_;
  unsigned char* shared_;
  uint32_t table_offset_, head_, limit_;
  uint32_t octet_row_ = 0;
  int stage_, end_;
};

// A warp's rows over one part, in the registers of an mma. A lane has two rows, lane / 4 and 8 further, and of their columns those of its place in the quad.
template <typename C>
struct RowState {
  float sums[C::kDim / 8][4];
  float maximum[2], weights[2];  // the lane's own share of the sum of weights, until Finish

  __device__ void Reset() {
#pragma unroll
    for (int n = 0; n < C::kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
    }
    for (int r = 0; r < 2; ++r) {
      maximum[r] = MinusInfinity();
      weights[r] = 0.0f;
    }
  }

  __device__ void Finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      weights[r] = __fadd_rn(weights[r], __shfl_xor_sync(kAllLanes, weights[r], 1));
      weights[r] = __fadd_rn(weights[r], __shfl_xor_sync(kAllLanes, weights[r], 2));
    }
  }
};

// Query rows as the left side of products: 16 columns from `column` on. Rows that the tile does not have are zeros.
__device__ __forceinline__ void LoadQuery(const __half* const (&rows)[2], uint32_t column, uint32_t head_dim, uint32_t (&a)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t at = column + j / 2 * 8;
    a[j] = rows[j % 2] != nullptr && at < head_dim ? *reinterpret_cast<const uint32_t*>(rows[j % 2] + at + threadIdx.x % 4 * 2) : 0;
  }
}

// scores[.., 16 keys a turn] = q k for the keys of a stage.
template <typename C>
__device__ __forceinline__ void MultiplyKeys(const unsigned char* tile, const uint32_t (&q)[C::kQueryInRegisters ? C::kDim / 16 : 1][4],
                                             const __half* const (&query_rows)[2], uint32_t head_dim, float (*scores)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll(C::kQueryInRegisters ? C::kDim / 16 : 1)
  for (int k = 0; k < C::kDim / 16; ++k) {
    uint32_t a[4];
    if constexpr (C::kQueryInRegisters) {
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = q[k][j];
    } else {
      LoadQuery(query_rows, static_cast<uint32_t>(k) * 16, head_dim, a);
    }
#pragma unroll
    for (int t = 0; t < C::kStageKeys / 16; ++t) {
      uint32_t b[4];
      LdMatrixX4(b, tile + TileOffset<C>(t * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
      MmaM16N8K16(scores[2 * t], a, {b[0], b[1]});
      MmaM16N8K16(scores[2 * t + 1], a, {b[2], b[3]});
    }
  }
}

// sums += weights v for the tokens of a stage.
template <typename C>
__device__ __forceinline__ void MultiplyValues(const unsigned char* tile, const uint32_t (*weights)[4], float (&sums)[C::kDim / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int t = 0; t < C::kStageKeys / 16; ++t) {
    const uint32_t a[4] = {weights[t][0], weights[t][1], weights[t][2], weights[t][3]};
#pragma unroll
    for (int n = 0; n < C::kDim / 16; ++n) {
      uint32_t b[4];
      LdMatrixX4Trans(b, tile + TileOffset<C>(t * 16 + lane / 8 % 2 * 8 + lane % 8, n * 2 + lane / 16));
      MmaM16N8K16(sums[2 * n], a, {b[0], b[1]});
      MmaM16N8K16(sums[2 * n + 1], a, {b[2], b[3]});
    }
  }
}

// Turns the scores of the keys from first_token on into weights, in fp16 as the left side of products, and brings the state up to the new maximum.
template <typename C>
__device__ __forceinline__ void Weigh(float (&scores)[C::kKeys / 8][4], uint32_t first_token, const uint32_t (&visible)[2], float scale, RowState<C>& state,
                                      uint32_t (&weights)[C::kKeys / 16][4]) {
  constexpr int kTiles = C::kKeys / 8;
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (first_token + C::kKeys > visible[r]) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (first_token + static_cast<uint32_t>(n * 8 + i) + threadIdx.x % 4 * 2 >= visible[r]) scores[n][2 * r + i] = MinusInfinity();
        }
      }
    }
    float largest = scores[0][2 * r];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) largest = fmaxf(fmaxf(largest, scores[n][2 * r]), scores[n][2 * r + 1]);
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    const float maximum = fmaxf(state.maximum[r], __fmul_rn(largest, scale)), base = ExponentBase(maximum);
    factor[r] = Exp2(state.maximum[r] - base);
    state.maximum[r] = maximum;
    state.weights[r] = __fmul_rn(state.weights[r], factor[r]);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scores[n][2 * r + i] = Exp2(fmaf(scores[n][2 * r + i], scale, -base));
        state.weights[r] = __fadd_rn(state.weights[r], scores[n][2 * r + i]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles / 2; ++t) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float(&pair)[4] = scores[2 * t + j / 2];
      weights[t][j] = PackHalves(pair[j % 2 * 2], pair[j % 2 * 2 + 1]);
    }
  }
  // After the first few blocks the maximum rarely rises, and times 1 changes nothing.
  if (__any_sync(kAllLanes, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
    for (int n = 0; n < C::kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state.sums[n][i] = __fmul_rn(state.sums[n][i], factor[i / 2]);
    }
  }
}

// Block (head, part, tile) when split, else (tile, head).
template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks) AttendKernel(const Parameters p) {
  constexpr int kBlocksPerPart = kPart / C::kKeys;
  TANDEM_DYNAMIC_SHARED(unsigned char, shared);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const uint32_t head = C::kSplit ? blockIdx.x : blockIdx.y, part = C::kSplit ? blockIdx.y : 0;
  const CudaAttentionTile tile = p.tiles[C::kSplit ? blockIdx.z : blockIdx.x];
  if (tile.row_count == 0) return;

  const uint32_t first_of_warp = static_cast<uint32_t>(warp) * kWarpRows;
  uint32_t limit = 0, warp_limit = 0;  // tokens that some row sees
  for (uint32_t i = static_cast<uint32_t>(lane); i < tile.row_count; i += kWarpSize) {
    const uint32_t sees = p.rows[tile.first_row + i].visible;
    limit = max(limit, sees);
    if (i >= first_of_warp && i < first_of_warp + kWarpRows) warp_limit = max(warp_limit, sees);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    limit = max(limit, __shfl_xor_sync(kAllLanes, limit, distance));
    warp_limit = max(warp_limit, __shfl_xor_sync(kAllLanes, warp_limit, distance));
  }
  if (part * kPart >= limit) return;

  uint32_t visible[2];
  const __half* query_rows[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t row = first_of_warp + static_cast<uint32_t>(lane / 4 + r * 8);
    const bool exists = row < tile.row_count;
    visible[r] = exists ? p.rows[tile.first_row + row].visible : 0;
    query_rows[r] = exists ? p.q + static_cast<int64_t>(tile.first_row + row) * p.q_stride + static_cast<int64_t>(head) * p.head_dim : nullptr;
  }
  uint32_t q[C::kQueryInRegisters ? C::kDim / 16 : 1][4];
  if constexpr (C::kQueryInRegisters) {
#pragma unroll
    for (int k = 0; k < C::kDim / 16; ++k) LoadQuery(query_rows, static_cast<uint32_t>(k) * 16, p.head_dim, q[k]);
  }

  const int first_block = C::kSplit ? static_cast<int>(part) * kBlocksPerPart : 0;
  int end_block = static_cast<int>((limit + C::kKeys - 1) / C::kKeys);
  if (C::kSplit) end_block = min(end_block, first_block + kBlocksPerPart);
  Reader<C> reader(p, shared, p.rows[tile.first_row].table_offset, head, limit, first_block, end_block);
  // The merged state of earlier parts: its sums in shared memory, each lane's own.
  float* total_sums = reinterpret_cast<float*>(shared + C::kRingBytes + C::kWidenedBytes) + threadIdx.x;
  float total_maximum[2] = {}, total_weights[2] = {};
  RowState<C> state;
  state.Reset();
  for (int block = first_block; block < end_block; ++block) {
    const uint32_t first_token = static_cast<uint32_t>(block) * C::kKeys;
    const bool needed = first_token < warp_limit;
    float scores[C::kKeys / 8][4] = {};
#pragma unroll
    for (int i = 0; i < C::kStagesOfKeys; ++i) {
      const unsigned char* keys = reader.Next();
      if (needed) MultiplyKeys<C>(keys, q, query_rows, p.head_dim, scores + i * C::kStageKeys / 8);
    }
    uint32_t weights[C::kKeys / 16][4];
    if (needed) Weigh<C>(scores, first_token, visible, p.scale, state, weights);
#pragma unroll
    for (int i = 0; i < C::kStagesOfKeys; ++i) {
      const unsigned char* values = reader.Next();
      if (needed) MultiplyValues<C>(values, weights + i * C::kStageKeys / 16, state.sums);
    }
    const bool part_ends = (block + 1) % kBlocksPerPart == 0 || block + 1 == end_block;
    if (!part_ends) continue;
    state.Finish();
    if constexpr (!C::kSplit) {
      if (block >= kBlocksPerPart) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const MergeFactors factors(total_maximum[r], state.maximum[r]);
          state.maximum[r] = factors.maximum;
          state.weights[r] = factors.Merge(total_weights[r], state.weights[r]);
#pragma unroll
          for (int n = 0; n < C::kDim / 8; ++n) {
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; ++i) state.sums[n][i] = factors.Merge(total_sums[(n * 4 + i) * C::kThreads], state.sums[n][i]);
          }
        }
      }
      if (block + 1 == end_block) break;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        total_maximum[r] = state.maximum[r];
        total_weights[r] = state.weights[r];
      }
#pragma unroll
      for (int n = 0; n < C::kDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) total_sums[(n * 4 + i) * C::kThreads] = state.sums[n][i];
      }
      state.Reset();
    }
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (visible[r] == 0) continue;
    const uint32_t row = first_of_warp + static_cast<uint32_t>(lane / 4 + r * 8), column = static_cast<uint32_t>(lane) % 4 * 2;
    if constexpr (C::kSplit) {
      const size_t place = (static_cast<size_t>(tile.first_slot + row) * p.max_parts + part) * p.num_heads + head;
      if (column == 0) p.states[place] = make_float2(state.maximum[r], state.weights[r]);
#pragma unroll
      for (int n = 0; n < C::kDim / 8; ++n) {
        if (static_cast<uint32_t>(n) * 8 >= p.head_dim) break;
        *reinterpret_cast<float2*>(p.sums + place * p.head_dim + n * 8 + column) = make_float2(state.sums[n][2 * r], state.sums[n][2 * r + 1]);
      }
    } else {
      __half* out = p.out + static_cast<int64_t>(tile.first_row + row) * p.out_stride + static_cast<int64_t>(head) * p.head_dim;
      const float inverse = __frcp_rn(state.weights[r]);
#pragma unroll
      for (int n = 0; n < C::kDim / 8; ++n) {
        if (static_cast<uint32_t>(n) * 8 >= p.head_dim) break;
        *reinterpret_cast<__half2*>(out + n * 8 + column) =
            __floats2half2_rn(__fmul_rn(state.sums[n][2 * r], inverse), __fmul_rn(state.sums[n][2 * r + 1], inverse));
      }
    }
  }
}

constexpr int kMergeWarps = 4;

// A warp merges the states of the parts of a tile's rows, for one head. A lane has two columns of each 64.
__global__ void __launch_bounds__(kMergeWarps * kWarpSize) MergeKernel(const Parameters p) {
  constexpr int kPairs = static_cast<int>(kMaxCudaHeadDim) / 64;
  const CudaAttentionTile tile = p.tiles[blockIdx.y];
  const uint32_t head = blockIdx.x * kMergeWarps + threadIdx.x / kWarpSize, column = threadIdx.x % kWarpSize * 2;
  if (head >= p.num_heads) return;
  for (uint32_t row = 0; row < tile.row_count; ++row) {
    const uint32_t parts = (p.rows[tile.first_row + row].visible + kPart - 1) / kPart;
    float2 state = make_float2(0.0f, 0.0f), sums[kPairs];
#pragma unroll 4
    for (uint32_t part = 0; part < parts; ++part) {
      const size_t place = (static_cast<size_t>(tile.first_slot + row) * p.max_parts + part) * p.num_heads + head;
      const float2 later = p.states[place];
      const MergeFactors factors(state.x, later.x);
      state = part == 0 ? later : make_float2(factors.maximum, factors.Merge(state.y, later.y));
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (column + i * 64 >= p.head_dim) break;
        const float2 values = *reinterpret_cast<const float2*>(p.sums + place * p.head_dim + column + i * 64);
        sums[i] = part == 0 ? values : make_float2(factors.Merge(sums[i].x, values.x), factors.Merge(sums[i].y, values.y));
      }
    }
    __half* out = p.out + static_cast<int64_t>(tile.first_row + row) * p.out_stride + static_cast<int64_t>(head) * p.head_dim;
    const float inverse = __frcp_rn(state.y);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (column + i * 64 >= p.head_dim) break;
      *reinterpret_cast<__half2*>(out + column + i * 64) = __floats2half2_rn(__fmul_rn(sums[i].x, inverse), __fmul_rn(sums[i].y, inverse));
    }
  }
}

Parameters ParametersOf(const CudaAttentionBatch& batch, const CudaAttentionTile* tiles) {
  const CudaKvLayer& kv = batch.kv;
  const auto refuse = [](const std::string& what) { throw Error(ErrorCode::kInvalidArgument, "cuda attention: " + what); };
  if (kv.head_dim < 8 || kv.head_dim % 8 != 0 || kv.head_dim > kMaxCudaHeadDim) {
    refuse("a head size of " + std::to_string(kv.head_dim) + "; multiples of 8 up to " + std::to_string(kMaxCudaHeadDim) + " are possible");
  }
  if (kv.block_size < 8 || kv.block_size % 8 != 0) refuse("a block size of " + std::to_string(kv.block_size) + ", not a multiple of 8");
  if (kv.num_blocks * kv.num_heads * kv.block_size >= int64_t{1} << 32) refuse("a layer's cache of 2^32 rows or more");
  Parameters p = {};
  p.q = batch.q;
  p.out = batch.out;
  p.q_stride = batch.q_stride;
  p.out_stride = batch.out_stride;
  p.rows = batch.rows;
  p.tables = batch.tables;
  p.tiles = tiles;
  p.k = kv.k;
  p.v = kv.v;
  p.k_scales = kv.k_scales;
  p.v_scales = kv.v_scales;
  p.num_heads = static_cast<uint32_t>(kv.num_heads);
  p.block_size = static_cast<uint32_t>(kv.block_size);
  p.head_dim = static_cast<uint32_t>(kv.head_dim);
  p.scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(kv.head_dim)));
  return p;
}

template <int kDim, bool kSplit>
void LaunchAttend(KvType type, dim3 grid, const Parameters& p, Stream stream) {
  using F16 = Config<kDim, KvType::kF16, kSplit>;
  using I8 = Config<kDim, KvType::kI8, kSplit>;
  if (type == KvType::kF16) {
    Launch("attention", AttendKernel<F16>, grid, dim3(F16::kThreads), F16::kSharedBytes, stream, p);
  } else {
    Launch("attention", AttendKernel<I8>, grid, dim3(I8::kThreads), I8::kSharedBytes, stream, p);
  }
}

template <bool kSplit>
void LaunchAttendFor(const CudaKvLayer& kv, dim3 grid, const Parameters& p, Stream stream) {
  if (kv.head_dim <= 32) return LaunchAttend<32, kSplit>(kv.type, grid, p, stream);
  if (kv.head_dim <= 64) return LaunchAttend<64, kSplit>(kv.type, grid, p, stream);
  if (kv.head_dim <= 128) return LaunchAttend<128, kSplit>(kv.type, grid, p, stream);
  LaunchAttend<256, kSplit>(kv.type, grid, p, stream);
}

}  // namespace

int64_t WholeTileRows(int64_t head_dim) { return head_dim <= 128 ? 64 : 32; }

void BuildAttentionTiles(const std::vector<CudaAttentionRow>& rows, int64_t head_dim, std::vector<CudaAttentionTile>* split,
                         std::vector<CudaAttentionTile>* whole) {
  const auto count = static_cast<uint32_t>(rows.size()), tile_rows = static_cast<uint32_t>(WholeTileRows(head_dim));
  split->clear();
  whole->clear();
  uint32_t slots = 0;
  for (uint32_t begin = 0, end = 0; begin < count; begin = end) {
    while (end < count && rows[end].table_offset == rows[begin].table_offset) ++end;
    if (end - begin <= kSplitTileRows) {
      split->push_back({begin, end - begin, slots});
      slots += end - begin;
      continue;
    }
    for (uint32_t first = begin; first < end; first += tile_rows) whole->push_back({first, std::min(tile_rows, end - first), 0});
  }
}

int64_t AttentionScratchBytes(int64_t slots, int64_t max_parts, int64_t num_heads, int64_t head_dim) {
  return slots * max_parts * num_heads * (static_cast<int64_t>(sizeof(float2)) + head_dim * static_cast<int64_t>(sizeof(float)));
}

void AttentionSplit(const CudaAttentionBatch& batch, const CudaAttentionTile* tiles, int64_t num_tiles, int64_t slots, int64_t max_parts, void* scratch,
                    Stream stream) {
  if (num_tiles == 0) return;
  Parameters p = ParametersOf(batch, tiles);
  p.max_parts = static_cast<uint32_t>(max_parts);
  p.states = static_cast<float2*>(scratch);
  p.sums = reinterpret_cast<float*>(p.states + slots * max_parts * batch.kv.num_heads);
  const auto tile_count = static_cast<unsigned>(num_tiles);
  LaunchAttendFor<true>(batch.kv, dim3(p.num_heads, p.max_parts, tile_count), p, stream);
  Launch("attention merge", MergeKernel, dim3((p.num_heads + kMergeWarps - 1) / kMergeWarps, tile_count), dim3(kMergeWarps * kWarpSize), 0, stream, p);
}

void AttentionWhole(const CudaAttentionBatch& batch, const CudaAttentionTile* tiles, int64_t num_tiles, Stream stream) {
  if (num_tiles == 0) return;
  const Parameters p = ParametersOf(batch, tiles);
  LaunchAttendFor<false>(batch.kv, dim3(static_cast<unsigned>(num_tiles), p.num_heads), p, stream);
}

}  // namespace tandem::cuda
