// sampling.cu: two kernels, and a third for Gumbel noise. ScanSlices reads each row once with many blocks: its largest logit, the sum for the log-softmax, and,
// where lists change logits, a changed copy. FinishRows, one block for a row, ends greedy rows and targets at once. For the others it counts tokens by how far
// they are below the best, takes those that can matter out of the row, and finds the cut-offs of top-k and top-p, the drawn token and the best candidates
// among them by searching for a key (or an id) in steps of two bits.
#include "kernels/cuda/sampling.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>

#include "kernels/philox.h"

namespace tandem::cuda {
namespace {

constexpr int kSlice = 4096, kSliceThreads = 256, kPerThread = kSlice / kSliceThreads;
constexpr int kFinishThreads = 512, kFewFinishThreads = 128;  // few for a vocabulary of one slice
constexpr int kBins = 4096;
constexpr uint32_t kViewTokens = 16384;  // tokens taken out of a row at most; if more are needed, the whole row is read again and again
constexpr int kMaxWarps = 32, kMaxReduced = 4;

// Fixed point: exponentials of (logit - largest) in a slice and in a row, and probabilities. Any sum over a vocabulary below 2^19 fits.
constexpr float kSliceUnit = 0x1p50f, kRowUnit = 0x1p44f, kProbUnit = 0x1p62f;

// exp is 0 in fp32 for what is so far below the largest.
constexpr float kNegligible = 104.0f;

// Integers in the order of the floats; 0 and -0 are equal, no number has key 0.
__device__ __forceinline__ uint32_t KeyOf(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float ValueOf(uint32_t key) { return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key); }

// The larger the better: a larger value, then a lower id.
__device__ __forceinline__ uint64_t RankOf(float x, uint32_t id) { return static_cast<uint64_t>(KeyOf(x)) << 32 | ~id; }
__device__ __forceinline__ uint32_t IdOf(uint64_t rank) { return ~static_cast<uint32_t>(rank); }
__device__ __forceinline__ float ValueOfRank(uint64_t rank) { return ValueOf(static_cast<uint32_t>(rank >> 32)); }

__device__ __forceinline__ uint64_t Fixed(float x, float unit) { return static_cast<uint64_t>(x * unit); }

struct ReduceSpace {
  uint64_t partial[kMaxWarps][kMaxReduced];
  uint64_t total[kMaxReduced];
};

struct Sum {
  __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Largest {
  __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

template <int kCount, typename Combine>
__device__ __forceinline__ void WarpReduce(uint64_t (&values)[kCount], Combine combine) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = combine(values[i], __shfl_xor_sync(0xffffffffu, values[i], offset));
  }
}

// Combines over the block; 0 is neutral. All threads get the result. A barrier.
template <int kCount, typename Combine>
__device__ __forceinline__ void BlockReduce(uint64_t (&values)[kCount], Combine combine, ReduceSpace& space) {
  static_assert(kCount <= kMaxReduced, "room");
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  uint64_t any = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) any |= values[i];
  if (__any_sync(0xffffffffu, any != 0)) WarpReduce(values, combine);
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) space.partial[warp][i] = values[i];
  }
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = lane < warps ? space.partial[lane][i] : 0;
    WarpReduce(values, combine);
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) space.total[i] = values[i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = space.total[i];
}

struct Places {
  int64_t slices, row;           // slices of a row; floats between rows of `changed`
  struct SliceStats* stats;      // [count, slices]
  float* changed;                // [count, row]: the changed logits, or with noise the noisy log-probabilities
  float* view_values;            // [count, kViewTokens]
  uint32_t* view_ids;            // [count, kViewTokens]
};

struct SliceStats {
  uint64_t best_unchanged, best;  // ranks
  uint64_t least;                 // ~key of the smallest changed logit above -infinity; 0: there is none
  uint64_t has_nan;
  uint64_t sum;                   // of exp(logit - the slice's largest), of the logits that log-probabilities are of
};

struct RowStats {
  uint64_t best_unchanged, best, least, has_nan;
  double log_sum;
};

// Log-probabilities of candidates are those of the logits without the banned tokens, all others those of the unchanged logits.
__device__ __forceinline__ bool SumsChanged(const SamplingRequest& request) { return request.kind == SamplingKind::kCandidates; }

__device__ __forceinline__ float Finite(float x) { return fminf(fmaxf(x, -3.402823466e+38f), 3.402823466e+38f); }

// Changes the logits [begin, begin + kSlice) of the row, which `slice` holds. The order of the steps is that of sampling.cc.
__device__ void ChangeSlice(const SamplingRequest& request, const uint32_t* words, uint32_t begin, float* slice) {
  const uint32_t* biased = words + request.biased.begin;
  for (uint32_t i = threadIdx.x; i < request.biased.count; i += kSliceThreads) {
    const uint32_t place = biased[i] - begin;  // large for tokens below
    if (place >= kSlice || (i > 0 && biased[i - 1] == biased[i])) continue;
    for (uint32_t j = i; j < request.biased.count && biased[j] == biased[i]; ++j) {
      slice[place] = Finite(slice[place] + __uint_as_float(biased[request.biased.count + j]));
    }
  }
  __syncthreads();
  const float penalty = request.repetition_penalty;
  for (uint32_t i = threadIdx.x; i < request.repeated.count; i += kSliceThreads) {
    const uint32_t place = words[request.repeated.begin + i] - begin;
    if (place < kSlice) slice[place] = Finite(slice[place] > 0.0f ? slice[place] / penalty : slice[place] * penalty);
  }
  __syncthreads();
  const float never = request.kind == SamplingKind::kCandidates ? kBannedLogit : -HUGE_VALF;
  for (uint32_t i = threadIdx.x; i < request.banned.count; i += kSliceThreads) {
    const uint32_t place = words[request.banned.begin + i] - begin;
    if (place < kSlice) slice[place] = never;
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kSliceThreads) ScanSlices(const float* logits, int64_t stride, uint32_t vocab, const SamplingRequest* requests,
                                                             const uint32_t* words, Places places) {
  __shared__ ReduceSpace space;
  __shared__ float slice[kSlice];
  const SamplingRequest& request = requests[blockIdx.y];
  if (request.kind == SamplingKind::kNothing) return;
  const uint32_t begin = blockIdx.x * kSlice;
  const float* row = logits + request.row * stride;
  float x[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const uint32_t id = begin + i * kSliceThreads + threadIdx.x;
    x[i] = id < vocab ? row[id] : -HUGE_VALF;
  }
  uint64_t best[4] = {0, 0, 0, 0};  // the members of SliceStats
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const uint32_t id = begin + i * kSliceThreads + threadIdx.x;
    if (id >= vocab) continue;
    best[0] = Largest()(best[0], RankOf(x[i], id));
    if (x[i] != x[i]) best[3] = 1;
  }
  if (request.changes != 0) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) slice[i * kSliceThreads + threadIdx.x] = x[i];
    __syncthreads();
    ChangeSlice(request, words, begin, slice);
  }
  float* changed = places.changed + blockIdx.y * places.row;
  float y[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const uint32_t id = begin + i * kSliceThreads + threadIdx.x;
    y[i] = request.changes != 0 ? slice[i * kSliceThreads + threadIdx.x] : x[i];
    if (id >= vocab) continue;
    if (request.changes != 0) changed[id] = y[i];
    best[1] = Largest()(best[1], RankOf(y[i], id));
    if (y[i] > -HUGE_VALF) best[2] = Largest()(best[2], static_cast<uint32_t>(~KeyOf(y[i])));
  }
  BlockReduce(best, Largest(), space);

  const bool sums_changed = SumsChanged(request);
  const float largest = ValueOfRank(sums_changed ? best[1] : best[0]);
  uint64_t sum[1] = {0};
  if (fabsf(largest) < HUGE_VALF) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const float below = (sums_changed ? y[i] : x[i]) - largest;
      if (below <= 0.0f) sum[0] += Fixed(expf(below), kSliceUnit);
    }
  }
  BlockReduce(sum, Sum(), space);
  if (threadIdx.x == 0) places.stats[blockIdx.y * places.slices + blockIdx.x] = {best[0], best[1], best[2], best[3], sum[0]};
}

// What the slices have found, put together in an order that depends on the vocabulary alone. A barrier.
__device__ void MergeSlices(const SliceStats* stats, int64_t slices, bool sums_changed, RowStats& merged) {
  if (threadIdx.x < kWarpSize) {
    uint64_t best[4] = {0, 0, 0, 0};
    for (int64_t i = threadIdx.x; i < slices; i += kWarpSize) {
      best[0] = Largest()(best[0], stats[i].best_unchanged);
      best[1] = Largest()(best[1], stats[i].best);
      best[2] = Largest()(best[2], stats[i].least);
      best[3] = Largest()(best[3], stats[i].has_nan);
    }
    WarpReduce(best, Largest());
    const double largest = ValueOfRank(sums_changed ? best[1] : best[0]);
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < slices; i += kWarpSize) {
      const double slice_largest = ValueOfRank(sums_changed ? stats[i].best : stats[i].best_unchanged);
      if (stats[i].sum != 0) sum += static_cast<double>(stats[i].sum) * (1.0 / kSliceUnit) * exp(slice_largest - largest);
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x == 0) merged = {best[0], best[1], best[2], best[3], fabs(largest) == HUGE_VAL ? largest : largest + log(sum)};
  }
  __syncthreads();
}

// As in sampling.cc.
enum class NoiseUse : uint32_t { kUniform = 0, kGumbel = 1 };
__device__ __forceinline__ uint64_t RandomBits(const NoiseKey& key, uint32_t token, NoiseUse use) {
  uint32_t words[4] = {key.position, key.stream, token, static_cast<uint32_t>(use)};
  Philox4x32(words, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
  return static_cast<uint64_t>(words[0]) << 32 | words[1];
}
__device__ __forceinline__ double UniformOf(const NoiseKey& key) { return static_cast<double>(RandomBits(key, 0, NoiseUse::kUniform) >> 11) * 0x1p-53; }
__device__ __forceinline__ double GumbelOf(const NoiseKey& key, uint32_t token) {
  const double uniform = (static_cast<double>(RandomBits(key, token, NoiseUse::kGumbel) >> 12) + 0.5) * 0x1p-52;
  return -log(-log(uniform));
}

// Puts what noisy candidates are ordered by into `changed`.
__global__ void __launch_bounds__(kSliceThreads) AddNoise(const float* logits, int64_t stride, uint32_t vocab, const SamplingRequest* requests, Places places) {
  __shared__ RowStats stats;
  const SamplingRequest& request = requests[blockIdx.y];
  if (request.kind != SamplingKind::kCandidates || request.has_noise == 0) return;
  MergeSlices(places.stats + blockIdx.y * places.slices, places.slices, true, stats);
  float* noisy = places.changed + blockIdx.y * places.row;
  const float* allowed = request.changes != 0 ? noisy : logits + request.row * stride;
  for (uint32_t i = threadIdx.x; i < kSlice; i += kSliceThreads) {
    const uint32_t id = blockIdx.x * kSlice + i;
    if (id < vocab) noisy[id] = static_cast<float>(allowed[id] - stats.log_sum + GumbelOf(request.key, id));
  }
}

// Tokens to look at: ids 0 .. end - 1 with their values, or, with ids given, `count` of these in any order.
template <typename T>
struct View {
  const T* values;
  const uint32_t* ids;
  uint32_t count, end;
};

// visit(value, id) for the tokens with first <= id < last.
template <typename T, typename Visit>
__device__ __forceinline__ void ForEach(const View<T>& view, uint32_t first, uint32_t last, Visit visit) {
  if (view.ids != nullptr) {
    for (uint32_t i = threadIdx.x; i < view.count; i += blockDim.x) {
      const uint32_t id = view.ids[i];
      if (id >= first && id < last) visit(view.values[i], id);
    }
    return;
  }
  constexpr int kInFlight = 16;
  for (uint32_t begin = first + threadIdx.x; begin < last; begin += kInFlight * blockDim.x) {
    T values[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (begin + i * blockDim.x < last) values[i] = view.values[begin + i * blockDim.x];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (begin + i * blockDim.x < last) visit(values[i], begin + i * blockDim.x);
    }
  }
}

// The largest key t for which enough(the sum of weight(value(x)) over tokens whose value has key >= t); 0 if all tokens together are not enough.
template <typename Value, typename Weight, typename Enough>
__device__ uint32_t FindKey(const View<float>& view, Value value, Weight weight, Enough enough, ReduceSpace& space) {
  uint32_t key = 0;
  for (int shift = 30; shift >= 0; shift -= 2) {
    const uint32_t one = key | 1u << shift, two = key | 2u << shift, three = key | 3u << shift;
    uint64_t sums[3] = {0, 0, 0};
    ForEach(view, 0, view.end, [&](float x, uint32_t) {
      const float v = value(x);
      const uint32_t own = KeyOf(v);
      if (own < one) return;
      const uint64_t w = weight(v);
      sums[0] += w;
      if (own >= two) sums[1] += w;
      if (own >= three) sums[2] += w;
    });
    BlockReduce(sums, Sum(), space);
    key = enough(sums[2]) ? three : enough(sums[1]) ? two : enough(sums[0]) ? one : key;
  }
  return key;
}

// The smallest id for which enough(the sum of weight(x, id) over tokens up to it). The sum over all tokens must be enough.
template <typename T, typename Weight, typename Enough>
__device__ uint32_t FindId(const View<T>& view, Weight weight, Enough enough, ReduceSpace& space) {
  uint32_t first = 0, last = view.end;
  uint64_t before = 0;
  while (last - first > 1) {
    const uint32_t quarter = (last - first + 3) / 4;
    const uint32_t one = first + quarter, two = min(one + quarter, last), three = min(two + quarter, last);
    uint64_t sums[3] = {0, 0, 0};
    ForEach(view, first, three, [&](T x, uint32_t id) {
      const uint64_t w = weight(x, id);
      sums[2] += w;
      if (id < two) sums[1] += w;
      if (id < one) sums[0] += w;
    });
    BlockReduce(sums, Sum(), space);
    if (enough(before + sums[0])) {
      last = one;
    } else if (enough(before + sums[1])) {
      first = one, last = two, before += sums[0];
    } else if (enough(before + sums[2])) {
      first = two, last = three, before += sums[1];
    } else {
      first = three, before += sums[2];
    }
  }
  return min(first, view.end - 1);
}

struct FinishSpace {
  ReduceSpace reduce;
  RowStats stats;
  uint32_t bins[kBins];
  uint64_t ranks[kMaxDeviceCandidates];
  uint32_t taken;
};

// Tokens by how far they are below the best, in bins of equal width; the last bin has all that are further down.
struct Binning {
  float top, width, per_width;
  bool is_open;  // the last bin is wider than the others

  __device__ __forceinline__ Binning(float top_value, float least_value) : top(top_value) {
    float range = fminf(top - least_value, kNegligible);
    if (!(range > 1e-3f)) range = 1e-3f;
    width = range / (kBins - 1);
    per_width = (kBins - 1) / range;
    is_open = !(top - least_value <= kNegligible);
  }
  __device__ __forceinline__ uint32_t BinOf(float v) const { return static_cast<uint32_t>(fmaxf(fminf((top - v) * per_width, kBins - 1), 0.0f)); }
  // No token of bins 0 .. bin is below, whatever was rounded.
  __device__ __forceinline__ float FloorOf(uint32_t bin) const {
    return top - static_cast<float>(bin + 1) * width * 1.00001f - (fabsf(top) + kNegligible) * 0x1p-20f;
  }
};

__device__ __forceinline__ void ClearBins(FinishSpace& space) {
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) space.bins[i] = 0;
  __syncthreads();
}

// The first bin up to which there are `count` tokens; the last one if there are fewer.
__device__ uint32_t BinOfCount(uint32_t count, uint32_t end, FinishSpace& space) {
  const View<uint32_t> bins = {space.bins, nullptr, kBins, kBins};
  if (count > end) return kBins - 1;
  return FindId(bins, [](uint32_t n, uint32_t) -> uint64_t { return n; }, [=](uint64_t sum) { return sum >= count; }, space.reduce);
}

// The first bin behind which there is less than `rest` (kRowUnit), by the bins' upper ends; the last one if there is no such bin.
__device__ uint32_t BinOfRest(uint64_t rest, const Binning& binning, FinishSpace& space) {
  const View<uint32_t> bins = {space.bins, nullptr, kBins, kBins};
  const float width = binning.width;
  // The factor is for the rounding of what decides about the bin.
  const auto weight = [=](uint32_t n, uint32_t bin) -> uint64_t { return n * (Fixed(expf(-static_cast<float>(bin) * width) * 1.001f, kRowUnit) + 1); };
  uint64_t total[1] = {0};
  ForEach(bins, 0, kBins, [&](uint32_t n, uint32_t bin) { total[0] += weight(n, bin); });
  BlockReduce(total, Sum(), space.reduce);
  if (rest == 0 || rest > total[0]) return kBins - 1;
  const uint64_t goal = total[0] - rest;
  return FindId(bins, weight, [=](uint64_t sum) { return sum > goal; }, space.reduce);
}

// The tokens of the row with value(x) >= floor, in the row's place for them; the row itself if they are too many.
template <typename Value>
__device__ View<float> TakeOut(const View<float>& row, Value value, float floor, float* values, uint32_t* ids, FinishSpace& space) {
  if (threadIdx.x == 0) space.taken = 0;
  __syncthreads();
  ForEach(row, 0, row.end, [&](float x, uint32_t id) {
    if (value(x) < floor) return;
    const uint32_t place = atomicAdd(&space.taken, 1u);
    if (place >= kViewTokens) return;
    values[place] = x;
    ids[place] = id;
  });
  __syncthreads();
  const uint32_t taken = space.taken;
  if (taken > kViewTokens) return row;
  return {values, ids, taken, row.end};
}

// The first `wanted` of the tokens whose value has this key are those with ids up to the result.
template <typename Value>
__device__ uint32_t LastIdAmongEquals(const View<float>& view, Value value, uint32_t key, uint64_t wanted, ReduceSpace& space) {
  return FindId(view, [&](float x, uint32_t) -> uint64_t { return KeyOf(value(x)) == key; }, [=](uint64_t sum) { return sum >= wanted; }, space);
}

// What temperature makes of a logit. Where no token is possible, all are, and no cut-off takes any away: what it would make of their logits they are already.
struct ScaledLogit {
  float shift, temperature;
  bool is_uniform;
  __device__ __forceinline__ float operator()(float x) const { return is_uniform ? kBannedLogit : (x - shift) / temperature; }
};

// x / sum, rounded as the division in double that the CPU does is, but for cases that are hardly ever met.
struct Normaliser {
  float high, low, inverse;
  __device__ __forceinline__ explicit Normaliser(uint64_t fixed_sum) {
    const double sum = static_cast<double>(fixed_sum) * (1.0 / kRowUnit);
    high = static_cast<float>(sum);
    low = static_cast<float>(sum - high);
    inverse = 1.0f / high;
  }
  __device__ __forceinline__ float operator()(float x) const {
    const float quotient = x * inverse;
    return fmaf(fmaf(-quotient, low, fmaf(-quotient, high, x)), inverse, quotient);
  }
};

// SampleToken of sampling.cc at a temperature above 0.
__device__ uint32_t Draw(const SamplingRequest& request, const View<float>& row, float* view_values, uint32_t* view_ids, FinishSpace& space) {
  const float largest = ValueOfRank(space.stats.best), least = ValueOf(~static_cast<uint32_t>(space.stats.least));
  const float shift = fabsf(largest / request.temperature) < -kBannedLogit / 2 ? 0.0f : largest;
  const ScaledLogit value = {shift, request.temperature, !(largest > -HUGE_VALF)};
  const float top = value(largest), p = value.is_uniform ? 0.0f : request.top_p;
  const uint32_t k = value.is_uniform ? 0 : request.top_k;
  const bool is_cut = k > 0 || p > 0.0f;
  const Binning binning(top, value(least));

  ClearBins(space);
  uint64_t sum[1] = {0};
  ForEach(row, 0, row.end, [&](float x, uint32_t) {
    const float v = value(x);
    sum[0] += Fixed(expf(v - top), kRowUnit);
    if (is_cut) atomicAdd(&space.bins[binning.BinOf(v)], 1u);
  });
  BlockReduce(sum, Sum(), space.reduce);

  View<float> view = row;
  uint32_t least_key = 0, last_id = 0xffffffffu;  // kept are tokens with larger keys, and with this key up to this id
  if (is_cut) {
    // Behind the crossing there is less than 1 - p; a little less where the CPU's rounding of the sum could still hide it.
    const double rest = (1.0 - static_cast<double>(p) - 4e-7) * static_cast<double>(sum[0]);
    const uint32_t bin = k > 0 ? BinOfCount(k, row.end, space) : BinOfRest(rest > 0.0 ? static_cast<uint64_t>(rest) : 0, binning, space);
    // Where the last bin is open, what is lost with it has no probability.
    view = TakeOut(row, value, binning.FloorOf(bin), view_values, view_ids, space);
  }
  if (k > 0) {
    least_key = FindKey(view, value, [](float) -> uint64_t { return 1; }, [=](uint64_t n) { return n >= k; }, space.reduce);
    sum[0] = 0;
    ForEach(view, 0, view.end, [&](float x, uint32_t) {
      const float v = value(x);
      if (KeyOf(v) >= least_key) sum[0] += Fixed(expf(v - top), kRowUnit);
    });
    BlockReduce(sum, Sum(), space.reduce);
  }
  if (p > 0.0f) {
    const Normaliser normalise(sum[0]);
    const uint32_t kth = least_key;
    const float least_prob = (1.0f - p) / (2.0f * static_cast<float>(row.end));
    const auto weight = [&](float v) -> uint64_t {
      const float prob = normalise(expf(v - top));
      return KeyOf(v) >= kth && prob >= least_prob ? Fixed(prob, kProbUnit) : 0;
    };
    const auto crosses = [=](uint64_t mass) { return static_cast<float>(static_cast<double>(mass) * (1.0 / kProbUnit)) > p; };
    least_key = FindKey(view, value, weight, crosses, space.reduce);
    uint64_t sums[3] = {0, 0, 0};  // mass above the key, tokens with the key, mass in all
    ForEach(view, 0, view.end, [&](float x, uint32_t) {
      const float v = value(x);
      const uint64_t w = weight(v);
      sums[2] += w;
      if (KeyOf(v) > least_key) sums[0] += w;
      if (KeyOf(v) == least_key) ++sums[1];
    });
    BlockReduce(sums, Sum(), space.reduce);
    if (crosses(sums[2])) {
      const uint64_t each = weight(ValueOf(least_key));
      uint64_t too_few = 0, enough = sums[1];  // of the equals
      while (enough - too_few > 1) {
        const uint64_t middle = (too_few + enough) / 2;
        (crosses(sums[0] + middle * each) ? enough : too_few) = middle;
      }
      if (enough < sums[1]) last_id = LastIdAmongEquals(view, value, least_key, enough, space.reduce);
    } else {
      const uint64_t all = sums[2];
      least_key = FindKey(view, value, weight, [=](uint64_t mass) { return mass >= all; }, space.reduce);
    }
  }
  const auto is_kept = [&](float v, uint32_t id) {
    const uint32_t key = KeyOf(v);
    return key > least_key || (key == least_key && id <= last_id);
  };
  if (p > 0.0f) {
    sum[0] = 0;
    ForEach(view, 0, view.end, [&](float x, uint32_t id) {
      const float v = value(x);
      if (is_kept(v, id)) sum[0] += Fixed(expf(v - top), kRowUnit);
    });
    BlockReduce(sum, Sum(), space.reduce);
  }

  const Normaliser normalise(sum[0]);
  const auto weight = [&](float x, uint32_t id) -> uint64_t {
    const float v = value(x);
    return is_kept(v, id) ? Fixed(normalise(expf(v - top)), kProbUnit) : 0;
  };
  uint64_t total[1] = {0};
  ForEach(view, 0, view.end, [&](float x, uint32_t id) { total[0] += weight(x, id); });
  BlockReduce(total, Sum(), space.reduce);
  const double target = UniformOf(request.key) * static_cast<double>(total[0]);
  if (!(static_cast<double>(total[0]) > target)) return IdOf(space.stats.best);
  return FindId(view, weight, [=](uint64_t mass) { return static_cast<double>(mass) > target; }, space.reduce);
}

// What candidates are ordered by, where there is no noise.
struct LogProb {
  double log_sum;
  __device__ __forceinline__ float operator()(float x) const { return static_cast<float>(x - log_sum); }
};
struct AsIs {
  __device__ __forceinline__ float operator()(float x) const { return x; }
};

// The `count` best tokens by value(x); entry(place, id, value) for each. largest and least: of the row's x, without -infinity. Returns how many there are.
template <typename Value, typename Entry>
__device__ uint32_t Rank(const View<float>& row, Value value, float largest, float least, uint32_t count, float* view_values, uint32_t* view_ids,
                         FinishSpace& space, Entry entry) {
  const Binning binning(value(largest), value(least));
  ClearBins(space);
  ForEach(row, 0, row.end, [&](float x, uint32_t) { atomicAdd(&space.bins[binning.BinOf(value(x))], 1u); });
  __syncthreads();
  const uint32_t bin = BinOfCount(count, row.end, space);
  const float floor = bin == kBins - 1 ? -HUGE_VALF : binning.FloorOf(bin);
  const View<float> view = TakeOut(row, value, floor, view_values, view_ids, space);
  const uint32_t least_key = FindKey(view, value, [](float) -> uint64_t { return 1; }, [=](uint64_t n) { return n >= count; }, space.reduce);
  uint64_t sums[2] = {0, 0};  // tokens above the key, tokens with it
  ForEach(view, 0, view.end, [&](float x, uint32_t) {
    const uint32_t key = KeyOf(value(x));
    if (key > least_key) ++sums[0];
    if (key == least_key) ++sums[1];
  });
  BlockReduce(sums, Sum(), space.reduce);
  uint32_t last_id = 0xffffffffu;
  if (sums[0] + sums[1] > count) last_id = LastIdAmongEquals(view, value, least_key, count - sums[0], space.reduce);

  if (threadIdx.x == 0) space.taken = 0;
  __syncthreads();
  ForEach(view, 0, view.end, [&](float x, uint32_t id) {
    const float v = value(x);
    const uint32_t key = KeyOf(v);
    if (key < least_key || (key == least_key && id > last_id)) return;
    const uint32_t place = atomicAdd(&space.taken, 1u);
    if (place < kMaxDeviceCandidates) space.ranks[place] = RankOf(v, id);
  });
  __syncthreads();
  const uint32_t taken = min(space.taken, count);
  for (uint32_t i = threadIdx.x; i < taken; i += blockDim.x) {
    const uint64_t own = space.ranks[i];
    uint32_t place = 0;
    for (uint32_t j = 0; j < taken; ++j) place += space.ranks[j] > own;
    entry(place, IdOf(own), ValueOfRank(own));
  }
  return taken;
}

__device__ bool Contains(const SamplingList& list, const uint32_t* words, uint32_t token) {
  uint32_t first = list.begin, last = list.begin + list.count;
  while (first < last) {
    const uint32_t middle = first + (last - first) / 2;
    if (words[middle] < token) first = middle + 1;
    else last = middle;
  }
  return first < list.begin + list.count && words[first] == token;
}

// One block for a request.
__global__ void __launch_bounds__(kFinishThreads) FinishRows(const float* logits, int64_t stride, uint32_t vocab, const SamplingRequest* requests, const uint32_t* words,
                                                   Places places, SamplingOutcome* outcomes, RankedToken* ranked, uint32_t* tokens) {
  __shared__ FinishSpace space;
  const SamplingRequest& request = requests[blockIdx.x];
  SamplingOutcome outcome = {SamplingStatus::kOk, 0, 0.0f, 0};
  if (request.kind == SamplingKind::kNothing) {
    if (threadIdx.x == 0) outcomes[blockIdx.x] = outcome;
    return;
  }
  MergeSlices(places.stats + blockIdx.x * places.slices, places.slices, SumsChanged(request), space.stats);
  const float* unchanged = logits + request.row * stride;
  const float* changed = places.changed + blockIdx.x * places.row;
  float* view_values = places.view_values + blockIdx.x * static_cast<int64_t>(kViewTokens);
  uint32_t* view_ids = places.view_ids + blockIdx.x * static_cast<int64_t>(kViewTokens);
  RankedToken* to = ranked + request.ranked_begin;
  const double log_sum = space.stats.log_sum;

  if (space.stats.has_nan != 0) {
    outcome.status = SamplingStatus::kNaN;
  } else if (request.kind == SamplingKind::kTarget) {
    outcome.logprob = static_cast<float>(unchanged[request.target] - log_sum);
  } else if (ValueOfRank(space.stats.best_unchanged) == HUGE_VALF) {
    outcome.status = SamplingStatus::kInfinity;
    outcome.token = IdOf(space.stats.best_unchanged);
  } else if (request.kind == SamplingKind::kSample) {
    const View<float> row = {request.changes != 0 ? changed : unchanged, nullptr, vocab, vocab};
    outcome.token = request.temperature == 0.0f ? IdOf(space.stats.best) : Draw(request, row, view_values, view_ids, space);
    outcome.logprob = static_cast<float>(unchanged[outcome.token] - log_sum);
    if (threadIdx.x == 0 && tokens != nullptr) tokens[blockIdx.x] = outcome.token;
    if (request.count > 0) {
      const View<float> all = {unchanged, nullptr, vocab, vocab};
      // Their smallest logit is not known where others were changed; then the last bin is open.
      const float least = request.changes != 0 ? -HUGE_VALF : ValueOf(~static_cast<uint32_t>(space.stats.least));
      const float largest = ValueOfRank(space.stats.best_unchanged);
      outcome.ranked = Rank(all, LogProb{log_sum}, largest, least, request.count, view_values, view_ids, space,
                            [=](uint32_t place, uint32_t id, float value) { to[place] = {id, value, value}; });
    }
  } else if (request.has_noise == 0) {
    const View<float> row = {request.changes != 0 ? changed : unchanged, nullptr, vocab, vocab};
    const float largest = ValueOfRank(space.stats.best), least = ValueOf(~static_cast<uint32_t>(space.stats.least));
    outcome.ranked = Rank(row, LogProb{log_sum}, largest, least, request.count, view_values, view_ids, space,
                          [=](uint32_t place, uint32_t id, float value) { to[place] = {id, value, value}; });
  } else {
    const View<float> row = {changed, nullptr, vocab, vocab};
    uint64_t range[2] = {0, 0};
    ForEach(row, 0, vocab, [&](float x, uint32_t) {
      range[0] = Largest()(range[0], KeyOf(x));
      if (x > -HUGE_VALF) range[1] = Largest()(range[1], static_cast<uint32_t>(~KeyOf(x)));
    });
    BlockReduce(range, Largest(), space.reduce);
    const float largest = ValueOf(static_cast<uint32_t>(range[0])), least = ValueOf(~static_cast<uint32_t>(range[1]));
    outcome.ranked = Rank(row, AsIs(), largest, least, request.count, view_values, view_ids, space, [&](uint32_t place, uint32_t id, float value) {
      const float allowed = Contains(request.banned, words, id) ? kBannedLogit : unchanged[id];
      to[place] = {id, static_cast<float>(allowed - log_sum), value};
    });
  }
  if (threadIdx.x == 0) outcomes[blockIdx.x] = outcome;
}

int64_t RoundUp(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

Places MakePlaces(int64_t count, int64_t vocab, void* scratch, int64_t* bytes) {
  Places places = {};
  places.slices = (vocab + kSlice - 1) / kSlice;
  places.row = RoundUp(vocab, 4);
  char* next = static_cast<char*>(scratch);
  int64_t used = 0;
  const auto take = [&](int64_t size) {
    char* place = next + used;
    used += RoundUp(size, 16);
    return place;
  };
  places.stats = reinterpret_cast<SliceStats*>(take(count * places.slices * static_cast<int64_t>(sizeof(SliceStats))));
  places.changed = reinterpret_cast<float*>(take(count * places.row * static_cast<int64_t>(sizeof(float))));
  places.view_values = reinterpret_cast<float*>(take(count * kViewTokens * static_cast<int64_t>(sizeof(float))));
  places.view_ids = reinterpret_cast<uint32_t*>(take(count * kViewTokens * static_cast<int64_t>(sizeof(uint32_t))));
  *bytes = used;
  return places;
}

std::vector<uint32_t> SortedOnce(std::vector<uint32_t> tokens) {
  std::sort(tokens.begin(), tokens.end());
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  return tokens;
}

}  // namespace

void SamplingBatch::Clear() {
  requests_.clear();
  words_.clear();
  ranked_ = 0;
  has_noise_ = false;
}

SamplingRequest& SamplingBatch::Add(SamplingKind kind, int64_t row) {
  SamplingRequest request = {};
  request.kind = kind;
  request.row = static_cast<uint32_t>(row);
  request.repetition_penalty = 1.0f;
  requests_.push_back(request);
  return requests_.back();
}

SamplingList SamplingBatch::AddList(const std::vector<uint32_t>& words) {
  const SamplingList list = {static_cast<uint32_t>(words_.size()), static_cast<uint32_t>(words.size())};
  words_.insert(words_.end(), words.begin(), words.end());
  return list;
}

uint32_t SamplingBatch::AddRanked(uint32_t count) {
  const uint32_t begin = ranked_;
  ranked_ += count;
  return begin;
}

void SamplingBatch::AddSample(int64_t row, const SamplingParams& params, const NoiseKey& key, uint32_t top_logprobs) {
  CheckSamplingParams(params, vocab_, "params");
  if (top_logprobs > vocab_ || top_logprobs > kMaxDeviceCandidates) {
    throw Error(ErrorCode::kInvalidArgument, "topLogprobs: " + std::to_string(top_logprobs) + ", at most " +
                                                 std::to_string(std::min<int64_t>(vocab_, kMaxDeviceCandidates)) + " are found on the device");
  }
  SamplingRequest& request = Add(SamplingKind::kSample, row);
  request.key = key;
  request.temperature = params.temperature;
  request.top_k = params.top_k == vocab_ ? 0 : params.top_k;
  request.top_p = params.top_p == 1.0f ? 0.0f : params.top_p;
  request.count = top_logprobs;
  request.ranked_begin = AddRanked(top_logprobs);
  request.banned = AddList(SortedOnce(params.banned_tokens));
  if (params.repetition_penalty != 1.0f) {
    request.repetition_penalty = params.repetition_penalty;
    request.repeated = AddList(SortedOnce(params.repeated_tokens));
  }
  // The biases of one token are added in the order they were given in.
  std::vector<size_t> order(params.bias_tokens.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return params.bias_tokens[a] < params.bias_tokens[b]; });
  std::vector<uint32_t> tokens, biases(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    tokens.push_back(params.bias_tokens[order[i]]);
    std::memcpy(&biases[i], &params.biases[order[i]], sizeof(float));
  }
  request.biased = AddList(tokens);
  AddList(biases);
  request.changes = request.banned.count + request.biased.count + request.repeated.count > 0;
}

void SamplingBatch::AddCandidates(int64_t row, uint32_t count, const std::vector<uint32_t>& banned, const NoiseKey* key) {
  if (count > vocab_ || count > kMaxDeviceCandidates) {
    throw Error(ErrorCode::kInvalidArgument, "count: " + std::to_string(count) + ", at most " +
                                                 std::to_string(std::min<int64_t>(vocab_, kMaxDeviceCandidates)) + " candidates are found on the device");
  }
  std::vector<uint32_t> sorted = SortedOnce(banned);
  if (!sorted.empty() && sorted.back() >= vocab_) {
    throw Error(ErrorCode::kInvalidArgument, "bannedTokens: token " + std::to_string(sorted.back()) + ", the vocabulary has " + std::to_string(vocab_));
  }
  SamplingRequest& request = Add(SamplingKind::kCandidates, row);
  request.count = count;
  request.ranked_begin = AddRanked(count);
  request.banned = AddList(sorted);
  request.changes = request.banned.count > 0;
  if (key == nullptr) return;
  request.has_noise = 1;
  request.key = *key;
  has_noise_ = true;
}

void SamplingBatch::AddTarget(int64_t row, uint32_t token) {
  if (token >= vocab_) {
    throw Error(ErrorCode::kInvalidArgument, "target: token " + std::to_string(token) + ", the vocabulary has " + std::to_string(vocab_));
  }
  Add(SamplingKind::kTarget, row).target = token;
}

void SamplingBatch::AddNothing() { Add(SamplingKind::kNothing, 0); }

int64_t SamplingBatch::RequestBytes() const {
  return static_cast<int64_t>(requests_.size() * sizeof(SamplingRequest) + words_.size() * sizeof(uint32_t));
}

void SamplingBatch::Pack(void* to) const {
  const size_t bytes = requests_.size() * sizeof(SamplingRequest);
  if (bytes > 0) std::memcpy(to, requests_.data(), bytes);
  if (!words_.empty()) std::memcpy(static_cast<char*>(to) + bytes, words_.data(), words_.size() * sizeof(uint32_t));
}

int64_t SamplingBatch::ResultBytes() const { return static_cast<int64_t>(requests_.size() * sizeof(SamplingOutcome) + ranked_ * sizeof(RankedToken)); }

SamplingResult SamplingBatch::Read(const void* results, int64_t i) const {
  SamplingOutcome outcome;
  std::memcpy(&outcome, static_cast<const char*>(results) + static_cast<size_t>(i) * sizeof outcome, sizeof outcome);
  if (outcome.status == SamplingStatus::kNaN) throw Error(ErrorCode::kInternal, "a logit is NaN: the weights or the KV cache are damaged");
  if (outcome.status == SamplingStatus::kInfinity) {
    throw Error(ErrorCode::kInternal, "sampling: the logit of token " + std::to_string(outcome.token) + " is " +
                                          std::to_string(std::numeric_limits<float>::infinity()) + ", not a number below infinity");
  }
  SamplingResult result;
  result.token = outcome.token;
  result.logprob = outcome.logprob;
  const char* ranked = static_cast<const char*>(results) + requests_.size() * sizeof(SamplingOutcome) +
                       requests_[static_cast<size_t>(i)].ranked_begin * sizeof(RankedToken);
  for (uint32_t place = 0; place < outcome.ranked; ++place) {
    RankedToken token;
    std::memcpy(&token, ranked + place * sizeof token, sizeof token);
    result.ranked.tokens.push_back(token.token);
    result.ranked.logprobs.push_back(token.logprob);
    result.ranked.keys.push_back(token.key);
  }
  return result;
}

int64_t SamplingScratchBytes(int64_t count, int64_t vocab) {
  int64_t bytes = 0;
  MakePlaces(count, vocab, nullptr, &bytes);
  return bytes;
}

void EvaluateRequests(const float* logits, int64_t stride, int64_t vocab, const void* requests, int64_t count, bool with_noise, void* scratch, void* results,
                      uint32_t* tokens, Stream stream) {
  if (count == 0) return;
  constexpr int64_t kMaxVocab = int64_t{1} << 19;  // what the sums in fixed point have room for
  if (vocab < 1 || vocab >= kMaxVocab) {
    throw Error(ErrorCode::kInvalidArgument, "sampling: a vocabulary of " + std::to_string(vocab) + ", possible are 1 to " + std::to_string(kMaxVocab - 1));
  }
  int64_t bytes = 0;
  const Places places = MakePlaces(count, vocab, scratch, &bytes);
  const auto* packed = static_cast<const SamplingRequest*>(requests);
  const auto* words = reinterpret_cast<const uint32_t*>(packed + count);
  auto* outcomes = static_cast<SamplingOutcome*>(results);
  auto* ranked = reinterpret_cast<RankedToken*>(outcomes + count);
  const uint32_t tokens_of_row = static_cast<uint32_t>(vocab);
  const dim3 slices(static_cast<unsigned>(places.slices), static_cast<unsigned>(count));
  Launch("sampling: scan", ScanSlices, slices, dim3(kSliceThreads), 0, stream, logits, stride, tokens_of_row, packed, words, places);
  if (with_noise) Launch("sampling: noise", AddNoise, slices, dim3(kSliceThreads), 0, stream, logits, stride, tokens_of_row, packed, places);
  const unsigned threads = vocab <= kSlice ? kFewFinishThreads : kFinishThreads;
  Launch("sampling: finish", FinishRows, dim3(static_cast<unsigned>(count)), dim3(threads), 0, stream, logits, stride, tokens_of_row, packed, words, places,
         outcomes, ranked, tokens);
}

}  // namespace tandem::cuda
