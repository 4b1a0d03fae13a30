#include "model/cuda/cuda_backend.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/half.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/geglu.h"
#include "kernels/cuda/kv_layout.h"
#include "kernels/cuda/layernorm.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/rope.h"
#include "kernels/cuda/rows.h"
#include "kernels/cuda/sampling.h"
#include "model/cuda/cuda_weights.h"
#include "model/cuda/gpu.h"
#include "model/evaluate_want.h"

namespace tandem {
namespace cuda {
namespace {

// Steps of at most so many rows that only decode are recorded and played again.
constexpr int64_t kMostGraphRows = 64;
// Requests that name more tokens, or get more, than these hold are the host's.
constexpr int64_t kSamplingRequestBytes = 1 << 20;
constexpr int64_t kSamplingResultBytes = 1 << 20;
// Rows whose states AttentionSplit keeps in its scratch at a time.
constexpr int64_t kSplitSlots = 128;
static_assert(kMostGraphRows <= kSplitSlots, "a recorded step has one launch of it");
constexpr int64_t kMostCopies = 1024;  // of KV blocks, in one launch

int64_t Aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Places in one block of memory, at 256-byte boundaries: counted first, so that the block can be one.
class Arena {
 public:
  int64_t Add(int64_t bytes) {
    const int64_t at = bytes_;
    bytes_ += Aligned(bytes);
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

// fp16 rows on the device. They begin `stride` elements apart, a multiple of 64; what is between rows is zero and stays so, as products read it.
struct Rows {
  __half* data = nullptr;
  int64_t columns = 0;
  int64_t stride = 0;

  __half* At(int64_t row) const { return data + row * stride; }
  int64_t Bytes(int64_t rows) const { return rows * stride * static_cast<int64_t>(sizeof(__half)); }
};

// Where a step of at most `capacity` rows has what its kernels are told of them: made in pinned memory, copied as one. The tables are last, as long as needed.
struct InputLayout {
  Arena arena;
  int64_t tokens, sampled_by, slots, rows, tiles, tables;

  explicit InputLayout(int64_t capacity)
      : tokens(arena.Add(capacity * 4)),
        sampled_by(arena.Add(capacity * 4)),
        slots(arena.Add(capacity * static_cast<int64_t>(sizeof(KvSlot)))),
        rows(arena.Add(capacity * static_cast<int64_t>(sizeof(CudaAttentionRow)))),
        tiles(arena.Add(capacity * static_cast<int64_t>(sizeof(CudaAttentionTile)))),
        tables(arena.bytes()) {}
};

// Which tiles of a batch which kernel takes. The tiles lie one behind the other on the device, those for AttentionSplit first.
struct AttentionPlan {
  struct Launch {
    int64_t first_tile, tiles, slots;
  };
  std::vector<Launch> splits;
  int64_t first_whole = 0, whole_tiles = 0;
  int64_t rows_at = 0, tiles_at = 0;  // in the workspace
};

Rows RowsOf(int64_t columns) { return {nullptr, columns, (columns + 63) / 64 * 64}; }

const char* Refusal(const EngineOptions& options) {
  if (options.kv_type == KvType::kF32) return "kv.dtype: an fp32 KV cache is for the CPU; fp16 and int8 are there on GPUs";
  if (options.model.head_dim() % 8 != 0 || options.model.head_dim() > kMaxCudaHeadDim) {
    return "model: GPU kernels take heads of 8, 16, 24, ... 256 values; use device cpu for this model";
  }
  if (options.kv_block_size % 8 != 0) return "kv.blockSize: GPU kernels take multiples of 8";
  return nullptr;
}

void TakeResult(SamplingResult from, const LogitsRow& row, ExtendResult& to) {
  if (auto* sample = std::get_if<SampleResult>(&to)) {
    *sample = {from.token, from.logprob, std::move(from.ranked.tokens), std::move(from.ranked.logprobs)};
  } else if (auto* candidates = std::get_if<Candidates>(&to)) {
    *candidates = std::move(from.ranked);
  } else if (auto* targets = std::get_if<TargetsResult>(&to)) {
    targets->logprobs[static_cast<size_t>(row.index)] = from.logprob;
  }
}

// The first error of an Extend is told.
void Fail(const LogitsRow& row, const std::exception& error, std::vector<ExtendResult>& results) {
  if (!std::holds_alternative<ErrorResult>(results[row.extend])) results[row.extend] = ErrorResult{error.what()};
}

// How the weights come on to the GPU, and what they will take of its memory.
struct WeightsForGpu {
  int64_t bytes;
  std::function<DeviceWeights(Stream)> load;
};

// The GPU's number, once this thread uses it and the options are known to be for it.
int UsedGpu(const EngineOptions& options) {
  if (const char* refusal = Refusal(options)) throw Error(ErrorCode::kInvalidArgument, refusal);
  UseGpu(options.gpu);
  return options.gpu;
}

}  // namespace

class CudaBackend final : public Backend {
 public:
  CudaBackend(const EngineOptions& options, Communicator& communicator, const WeightsForGpu& weights);
  ~CudaBackend() override;

  bool is_first_rank() const override { return communicator_.rank() == 0; }
  EngineMemory memory() const override { return {weights_.bytes(), kv_memory_.bytes(), workspace_.bytes()}; }
  void CopyKvBlocks(const std::vector<uint32_t>& from_to_pairs) override;
  void Begin(const Batch& batch) override;
  void RunForward(bool repeatable, const std::function<void()>& forward) override;
  void UseRows(int64_t count) override { rows_ = count; }
  void SaveCarry(int64_t first, int64_t count) override { Copy(carry_.data, hidden_.At(first), hidden_.Bytes(count)); }
  void RestoreCarry(int64_t first, int64_t count) override { Copy(hidden_.At(first), carry_.data, hidden_.Bytes(count)); }
  void Embed(Activation out) override;
  void InputNorm(Activation x) override;
  void Linear(int64_t layer, Projection projection, Activation in, Activation out) override;
  void RotaryAndWriteKv(int64_t layer, Activation qkv, Activation q) override;
  void KeepRows(const std::vector<int64_t>& rows) override;
  void Attention(int64_t layer, Activation q) override;
  void GegluLinear(int64_t layer, Activation u, Activation y) override;
  void AllReduce(Activation x) override;
  void AddResidualAndNorm(int64_t layer, Projection projection, float alpha, Activation delta, Activation x) override;
  void Logits(int64_t first, int64_t count) override;
  void Evaluate(const std::vector<LogitsRow>& rows, const std::vector<Extend>& extends, std::vector<ExtendResult>& results) override;
  int EvaluateLater(const std::vector<LogitsRow>& rows, const std::vector<Extend>& extends) override;
  void Collect(int later, std::vector<ExtendResult>& results) override;
  void Finish() override { stream_.Wait(); }
  int64_t collective_micros() const override { return collective_nanos_ / 1000; }

 private:
  // What the host tells the device of a step and hears of it. While the results of one are awaited the next step has the other one.
  struct Exchange {
    PinnedBuffer input, kept, copies;  // its rows, the kept ones of them, copies of blocks
    PinnedBuffer requests, results;    // what is wanted of logits, what comes of it
    SamplingBatch sampling;
    std::vector<LogitsRow> rows{};  // of the results
    OwnedEvent done{};              // the results are there
    std::atomic<bool> is_awaited{false};
  };

  struct Graph {
    bool has_run = false;  // kernels are loaded when they run first, which cannot be recorded
    cudaGraphExec_t executable = nullptr;
  };

  // kHidden and kDelta; which buffer a wide or a narrow one is, the operations know.
  const Rows& At(Activation activation) const { return activation == Activation::kHidden ? hidden_ : delta_; }
  const DeviceLayer& Layer(int64_t layer) const { return weights_.layers[static_cast<size_t>(layer)]; }
  CudaKvLayer KvOf(int64_t layer) const;
  int64_t PlanWorkspace();
  int64_t InputBytes() const { return InputLayout(max_rows_).tables + max_rows_ * blocks_per_sequence_ * 4; }
  // Puts tiles for these rows at `tiles`.
  AttentionPlan PlanAttention(const std::vector<CudaAttentionRow>& rows, CudaAttentionTile* tiles) const;
  void CheckMemory(int64_t weight_bytes, int64_t workspace_bytes) const;
  int64_t KvBytes() const { return 2 * shape_.num_layers * (kv_plane_bytes_ + kv_scale_plane_bytes_); }
  template <typename T>
  T* Device(int64_t place) const {
    return reinterpret_cast<T*>(workspace_.as<char>() + place);
  }
  void Copy(void* to, const void* from, int64_t bytes) {
    Check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, stream_.get()), "a copy");
  }
  void Multiply(const DeviceMatrix& matrix, const Rows& x, const float* bias, const Rows& y) {
    cuda::Linear(matrix.weight, x.data, rows_, x.stride, bias, y.data, y.stride, stream_.get(), product_scratch());
  }
  void* product_scratch() const { return uses_warpgroups_ ? Device<char>(product_scratch_at_) : nullptr; }
  cudaGraphExec_t Record(const std::function<void()>& forward);
  Exchange& exchange() { return *exchanges_[current_]; }
  bool AddRequest(const LogitsRow& row, const Want& want, SamplingBatch& sampling) const;
  bool DeviceTakes(const SamplingBatch& sampling) const {
    return sampling.RequestBytes() <= kSamplingRequestBytes && sampling.ResultBytes() <= kSamplingResultBytes;
  }
  // Has the requests of the step's exchange done, and their results on their way.
  void StartRequests();
  void TakeResults(const Exchange& from, std::vector<ExtendResult>& results) const;

  const ModelShape shape_;
  const int gpu_;
  Communicator& communicator_;
  const int64_t local_hidden_, local_inner_, local_vocab_, local_heads_;
  const int64_t max_rows_, logits_rows_;
  const KvType kv_type_;
  const int64_t kv_blocks_, kv_block_size_;
  const int64_t blocks_per_sequence_, max_parts_;
  const int64_t kv_plane_bytes_, kv_scale_plane_bytes_;  // of K or V of one layer

  OwnedStream stream_;
  DeviceWeights weights_;
  DeviceBuffer kv_memory_;  // planes of values [num_layers, 2 (k, v)], then planes of scales
  DeviceBuffer workspace_;
  // In workspace_.
  Rows hidden_, delta_, qkv_, context_, halves_, inner_, carry_, spare_;
  std::vector<std::pair<Rows*, int64_t>> row_places_;
  int64_t input_at_ = 0, kept_at_ = 0, copies_at_ = 0, cos_at_ = 0, sin_at_ = 0, attention_scratch_at_ = 0;
  // Products of many rows through wgmma: not before that has been seen on a card (docs/performance.md).
  const bool uses_warpgroups_ = std::getenv("TANDEM_CUDA_WGMMA") != nullptr;
  int64_t product_scratch_at_ = 0;
  int64_t local_logits_at_ = 0, logits_at_ = 0, requests_at_ = 0, sampling_scratch_at_ = 0, results_at_ = 0;
  std::unique_ptr<Exchange> exchanges_[2];
  int current_ = 0;  // the step's own
  int64_t sampled_at_ = 0;                // [logits_rows_] tokens that the last step's requests drew
  std::vector<int32_t> request_of_extend_;  // of the last step
  PinnedBuffer among_ranks_;              // where other ranks are: activations on their way through the host
  std::vector<float> exchanged_;
  std::vector<float> host_logits_;  // [1, V]
  std::map<int64_t, Graph> graphs_;  // by rows

  int64_t rows_ = 0;
  InputLayout input_;
  std::vector<CudaAttentionRow> attention_rows_;
  AttentionPlan attention_;
  int64_t collective_nanos_ = 0;
};

CudaBackend::CudaBackend(const EngineOptions& options, Communicator& communicator, const WeightsForGpu& weights)
    : shape_(options.model),
      gpu_(UsedGpu(options)),
      communicator_(communicator),
      local_hidden_(shape_.hidden_size / communicator.world_size()),
      local_inner_(shape_.inner_hidden_size / communicator.world_size()),
      local_vocab_(shape_.vocab_size / communicator.world_size()),
      local_heads_(shape_.num_attention_heads / communicator.world_size()),
      max_rows_(options.max_batch_tokens),
      logits_rows_(std::min(kMaxLogitsRows, options.max_batch_tokens)),
      kv_type_(options.kv_type),
      kv_blocks_(options.kv_blocks),
      kv_block_size_(options.kv_block_size),
      blocks_per_sequence_((shape_.max_sequence_length + kv_block_size_ - 1) / kv_block_size_),
      max_parts_((shape_.max_sequence_length + kAttentionPart - 1) / kAttentionPart),
      kv_plane_bytes_(Aligned(kv_blocks_ * local_heads_ * kv_block_size_ * shape_.head_dim() * (kv_type_ == KvType::kI8 ? 1 : 2))),
      kv_scale_plane_bytes_(kv_type_ == KvType::kI8 ? Aligned(kv_blocks_ * local_heads_ * kv_block_size_ * 2) : 0),
      input_(max_rows_) {
  const int64_t workspace_bytes = PlanWorkspace();
  CheckMemory(weights.bytes, workspace_bytes);
  kv_memory_ = DeviceBuffer(KvBytes(), "the KV cache");
  workspace_ = DeviceBuffer(workspace_bytes, "the workspace");
  for (const auto& [rows, place] : row_places_) rows->data = Device<__half>(place);
  const RotaryTable rotary = MakeRotaryTable(shape_.max_sequence_length, shape_.head_dim(), shape_.rotary_base, shape_.rotary_precision);
  Copy(Device<float>(cos_at_), rotary.cos.data(), static_cast<int64_t>(rotary.cos.size() * sizeof(float)));
  Copy(Device<float>(sin_at_), rotary.sin.data(), static_cast<int64_t>(rotary.sin.size() * sizeof(float)));
  stream_.Wait();  // the table is this function's
  weights_ = weights.load(stream_.get());
}

CudaBackend::~CudaBackend() {
  cudaStreamSynchronize(stream_.get());
  for (const auto& [rows, graph] : graphs_) {
    if (graph.executable != nullptr) cudaGraphExecDestroy(graph.executable);
  }
}

// Sets all places, and says how many bytes hold them.
int64_t CudaBackend::PlanWorkspace() {
  Arena arena;
  const auto place_rows = [&](Rows& rows, int64_t columns, int64_t count) {
    rows = RowsOf(columns);
    row_places_.emplace_back(&rows, arena.Add(rows.Bytes(count)));
  };
  place_rows(hidden_, shape_.hidden_size, max_rows_);
  place_rows(delta_, shape_.hidden_size, max_rows_);
  place_rows(carry_, shape_.hidden_size, max_rows_);
  place_rows(spare_, shape_.hidden_size, max_rows_);
  place_rows(qkv_, 3 * local_hidden_, max_rows_);
  place_rows(context_, local_hidden_, max_rows_);
  place_rows(halves_, 2 * local_inner_, max_rows_);
  place_rows(inner_, local_inner_, max_rows_);
  input_at_ = arena.Add(InputBytes());
  kept_at_ = arena.Add(InputLayout(max_rows_).tables);
  copies_at_ = arena.Add(kMostCopies * static_cast<int64_t>(sizeof(uint2)));
  cos_at_ = arena.Add(shape_.max_sequence_length * shape_.head_dim() / 2 * 4);
  sin_at_ = arena.Add(shape_.max_sequence_length * shape_.head_dim() / 2 * 4);
  attention_scratch_at_ = arena.Add(AttentionScratchBytes(kSplitSlots, max_parts_, local_heads_, shape_.head_dim()));
  if (uses_warpgroups_) {
    DeviceWeight widest;
    widest.cols = std::max({shape_.hidden_size, local_hidden_, local_inner_});
    product_scratch_at_ = arena.Add(LinearScratchBytes(widest, max_rows_));
  }
  local_logits_at_ = arena.Add(logits_rows_ * local_vocab_ * 4);
  logits_at_ = communicator_.world_size() == 1 ? local_logits_at_ : arena.Add(is_first_rank() ? logits_rows_ * shape_.vocab_size * 4 : 0);
  if (is_first_rank()) {
    requests_at_ = arena.Add(kSamplingRequestBytes);
    sampling_scratch_at_ = arena.Add(SamplingScratchBytes(logits_rows_, shape_.vocab_size));
    results_at_ = arena.Add(kSamplingResultBytes);
    sampled_at_ = arena.Add(logits_rows_ * 4);
    host_logits_.resize(static_cast<size_t>(shape_.vocab_size));
  }
  for (std::unique_ptr<Exchange>& each : exchanges_) {
    const auto pinned = [](int64_t bytes) { return PinnedBuffer(bytes, "copies"); };
    const int64_t sampling_bytes = is_first_rank() ? 1 : 0;
    each.reset(new Exchange{pinned(InputBytes()), pinned(InputLayout(max_rows_).tables), pinned(kMostCopies * static_cast<int64_t>(sizeof(uint2))),
                            pinned(sampling_bytes * kSamplingRequestBytes), pinned(sampling_bytes * kSamplingResultBytes), SamplingBatch(shape_.vocab_size)});
  }
  if (communicator_.world_size() > 1) {
    const int64_t values = std::max(max_rows_ * hidden_.stride, logits_rows_ * shape_.vocab_size);
    among_ranks_ = PinnedBuffer(values * 4, "copies");
    exchanged_.resize(static_cast<size_t>(values));
  }
  return arena.bytes();
}

// Before anything is allocated: a plan that does not fit is told as a whole.
void CudaBackend::CheckMemory(int64_t weight_bytes, int64_t workspace_bytes) const {
  const GpuMemory memory = MemoryOfGpu();
  const int64_t needed = weight_bytes + KvBytes() + workspace_bytes;
  if (needed <= memory.free) return;
  throw Error(ErrorCode::kOutOfMemory, "gpu " + std::to_string(gpu_) + ": weights (" + GiB(weight_bytes) + "), KV cache (" + GiB(KvBytes()) + ") and workspace (" +
                                           GiB(workspace_bytes) + ") take " + GiB(needed) + ", " + GiB(memory.free) + " of " + GiB(memory.total) +
                                           " are free: give fewer --kv-blocks, quantise the weights, or take more GPUs; tandem plan says what fits");
}

CudaKvLayer CudaBackend::KvOf(int64_t layer) const {
  char* values = kv_memory_.as<char>() + 2 * layer * kv_plane_bytes_;
  char* scales = kv_memory_.as<char>() + 2 * shape_.num_layers * kv_plane_bytes_ + 2 * layer * kv_scale_plane_bytes_;
  CudaKvLayer kv;
  kv.k = values;
  kv.v = values + kv_plane_bytes_;
  kv.type = kv_type_;
  if (kv_type_ == KvType::kI8) {
    kv.k_scales = reinterpret_cast<__half*>(scales);
    kv.v_scales = reinterpret_cast<__half*>(scales + kv_scale_plane_bytes_);
  }
  kv.num_blocks = kv_blocks_;
  kv.num_heads = local_heads_;
  kv.block_size = kv_block_size_;
  kv.head_dim = shape_.head_dim();
  return kv;
}

void CudaBackend::CopyKvBlocks(const std::vector<uint32_t>& from_to_pairs) {
  const int64_t planes = 2 * shape_.num_layers, count = static_cast<int64_t>(from_to_pairs.size() / 2);
  const int64_t block_values = local_heads_ * kv_block_size_ * shape_.head_dim(), block_bytes = block_values * (kv_type_ == KvType::kI8 ? 1 : 2);
  char* scales = kv_memory_.as<char>() + planes * kv_plane_bytes_;
  for (int64_t first = 0; first < count; first += kMostCopies) {
    const int64_t n = std::min(kMostCopies, count - first);
    if (first > 0) stream_.Wait();  // the copy before this one has left the staging memory
    std::memcpy(exchange().copies.data(), from_to_pairs.data() + 2 * first, static_cast<size_t>(n) * sizeof(uint2));
    const uint2* pairs = Device<uint2>(copies_at_);
    Copy(Device<uint2>(copies_at_), exchange().copies.data(), n * static_cast<int64_t>(sizeof(uint2)));
    cuda::CopyKvBlocks(kv_memory_.data(), kv_plane_bytes_, planes, block_bytes, pairs, n, stream_.get());
    if (kv_scale_plane_bytes_ == 0) continue;
    cuda::CopyKvBlocks(scales, kv_scale_plane_bytes_, planes, local_heads_ * kv_block_size_ * 2, pairs, n, stream_.get());
  }
}

void CudaBackend::Begin(const Batch& batch) {
  rows_ = static_cast<int64_t>(batch.tokens.size());
  collective_nanos_ = 0;
  if (exchanges_[current_]->is_awaited.load()) current_ = 1 - current_;
  // Recorded steps know where what they read lies: in one layout for all of them.
  input_ = InputLayout(rows_ <= kMostGraphRows ? std::min(kMostGraphRows, max_rows_) : max_rows_);
  char* staging = exchange().input.as<char>();
  std::memcpy(staging + input_.tokens, batch.tokens.data(), batch.tokens.size() * 4);
  const bool goes_on = std::any_of(batch.sampled_by.begin(), batch.sampled_by.end(), [](int32_t extend) { return extend >= 0; });
  if (goes_on) {
    int32_t* requests = reinterpret_cast<int32_t*>(staging + input_.sampled_by);
    for (size_t i = 0; i < batch.sampled_by.size(); ++i) {
      requests[i] = batch.sampled_by[i] < 0 ? -1 : request_of_extend_.at(static_cast<size_t>(batch.sampled_by[i]));
    }
  }
  std::memcpy(staging + input_.slots, batch.slots.data(), batch.slots.size() * sizeof(KvSlot));
  // One table for each run: its rows have the same pointer, and the last of them sees most.
  attention_rows_.clear();
  uint32_t* tables = reinterpret_cast<uint32_t*>(staging + input_.tables);
  int64_t table_begin = 0, table_end = 0;
  for (size_t i = 0; i < batch.attention.size(); ++i) {
    const AttentionRow& row = batch.attention[i];
    if (i == 0 || row.block_table != batch.attention[i - 1].block_table) table_begin = table_end;
    const int64_t blocks = (row.visible + kv_block_size_ - 1) / kv_block_size_;
    if (blocks > blocks_per_sequence_) {
      throw Error(ErrorCode::kInternal, "attention: a row sees " + std::to_string(row.visible) + " tokens, the model has " +
                                            std::to_string(shape_.max_sequence_length) + " positions");
    }
    for (; table_end < table_begin + blocks; ++table_end) tables[table_end] = row.block_table[table_end - table_begin];
    attention_rows_.push_back({static_cast<uint32_t>(table_begin), static_cast<uint32_t>(row.visible)});
  }
  std::memcpy(staging + input_.rows, attention_rows_.data(), attention_rows_.size() * sizeof(CudaAttentionRow));
  attention_ = PlanAttention(attention_rows_, reinterpret_cast<CudaAttentionTile*>(staging + input_.tiles));
  attention_.rows_at = input_at_ + input_.rows;
  attention_.tiles_at = input_at_ + input_.tiles;
  Copy(Device<char>(input_at_), staging, input_.tables + table_end * 4);
  if (goes_on) {
    TakeSamples(Device<uint32_t>(sampled_at_), Device<int32_t>(input_at_ + input_.sampled_by), rows_, shape_.vocab_size,
                Device<uint32_t>(input_at_ + input_.tokens), stream_.get());
  }
}

AttentionPlan CudaBackend::PlanAttention(const std::vector<CudaAttentionRow>& rows, CudaAttentionTile* tiles) const {
  std::vector<CudaAttentionTile> split, whole;
  BuildAttentionTiles(rows, shape_.head_dim(), &split, &whole);
  AttentionPlan plan;
  for (CudaAttentionTile& tile : split) {
    if (plan.splits.empty() || plan.splits.back().slots + tile.row_count > kSplitSlots) plan.splits.push_back({plan.first_whole, 0, 0});
    AttentionPlan::Launch& launch = plan.splits.back();
    tile.first_slot = static_cast<uint32_t>(launch.slots);
    launch.slots += tile.row_count;
    launch.tiles += 1;
    plan.first_whole += 1;
  }
  plan.whole_tiles = static_cast<int64_t>(whole.size());
  std::copy(split.begin(), split.end(), tiles);
  std::copy(whole.begin(), whole.end(), tiles + plan.first_whole);
  return plan;
}

void CudaBackend::Attention(int64_t layer, Activation) {
  CudaAttentionBatch batch;
  batch.q = batch.out = context_.data;
  batch.q_stride = batch.out_stride = context_.stride;
  batch.rows = Device<CudaAttentionRow>(attention_.rows_at);
  batch.tables = Device<uint32_t>(input_at_ + input_.tables);
  batch.kv = KvOf(layer);
  const CudaAttentionTile* tiles = Device<CudaAttentionTile>(attention_.tiles_at);
  for (const AttentionPlan::Launch& launch : attention_.splits) {
    AttentionSplit(batch, tiles + launch.first_tile, launch.tiles, launch.slots, max_parts_, Device<char>(attention_scratch_at_), stream_.get());
  }
  if (attention_.whole_tiles > 0) AttentionWhole(batch, tiles + attention_.first_whole, attention_.whole_tiles, stream_.get());
}

void CudaBackend::RunForward(bool repeatable, const std::function<void()>& forward) {
  if (!repeatable || communicator_.world_size() > 1 || rows_ > kMostGraphRows) return forward();
  Graph& graph = graphs_[rows_];
  if (!graph.has_run) {
    forward();
    graph.has_run = true;
    return;
  }
  if (graph.executable == nullptr) graph.executable = Record(forward);
  Check(cudaGraphLaunch(graph.executable, stream_.get()), "playing a recorded step");
}

cudaGraphExec_t CudaBackend::Record(const std::function<void()>& forward) {
  Check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal), "recording a step");
  cudaGraph_t graph = nullptr;
  try {
    forward();
  } catch (...) {
    cudaStreamEndCapture(stream_.get(), &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    throw;
  }
  Check(cudaStreamEndCapture(stream_.get(), &graph), "recording a step");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  Check(status, "recording a step");
  return executable;
}

void CudaBackend::Embed(Activation out) {
  const uint32_t first_token = static_cast<uint32_t>(communicator_.rank() * local_vocab_);
  const Rows& y = At(out);
  cuda::Embed(weights_.word_embeddings.weight, first_token, Device<uint32_t>(input_at_ + input_.tokens), rows_, y.data, y.stride, stream_.get());
}

void CudaBackend::InputNorm(Activation x) {
  const DeviceNorm& norm = Layer(0).input_layernorm;
  const Rows& rows = At(x);
  LayerNorm(rows.data, rows_, rows.columns, rows.stride, norm.weight, norm.bias, shape_.layernorm_epsilon, rows.data, stream_.get());
}

void CudaBackend::Linear(int64_t layer, Projection projection, Activation, Activation) {
  const DeviceLayer& weights = Layer(layer);
  switch (projection) {
    case Projection::kQueryKeyValue: return Multiply(weights.query_key_value, hidden_, weights.query_key_value_bias, qkv_);
    case Projection::kDense: return Multiply(weights.dense, context_, nullptr, delta_);
    case Projection::kHTo4h: return Multiply(weights.dense_h_to_4h, hidden_, weights.dense_h_to_4h_bias, halves_);
    case Projection::k4hToH: return Multiply(weights.dense_4h_to_h, inner_, nullptr, delta_);
  }
}

void CudaBackend::RotaryAndWriteKv(int64_t layer, Activation, Activation) {
  cuda::RotaryAndWriteKv(qkv_.data, rows_, qkv_.stride, Device<KvSlot>(input_at_ + input_.slots), Device<float>(cos_at_), Device<float>(sin_at_), KvOf(layer),
                         context_.data, context_.stride, stream_.get());
}

void CudaBackend::KeepRows(const std::vector<int64_t>& rows) {
  const int64_t count = static_cast<int64_t>(rows.size());
  if (count == rows_) return;  // ascending: all of them
  const InputLayout layout(max_rows_);
  char* staging = exchange().kept.as<char>();
  std::vector<CudaAttentionRow> kept;
  for (size_t i = 0; i < rows.size(); ++i) {
    kept.push_back(attention_rows_[static_cast<size_t>(rows[i])]);
    reinterpret_cast<uint32_t*>(staging + layout.tokens)[i] = static_cast<uint32_t>(rows[i]);
  }
  std::memcpy(staging + layout.rows, kept.data(), kept.size() * sizeof(CudaAttentionRow));
  attention_ = PlanAttention(kept, reinterpret_cast<CudaAttentionTile*>(staging + layout.tiles));
  attention_.rows_at = kept_at_ + layout.rows;
  attention_.tiles_at = kept_at_ + layout.tiles;
  Copy(Device<char>(kept_at_), staging, layout.tables);
  const uint32_t* from = Device<uint32_t>(kept_at_ + layout.tokens);
  for (const Rows& kept_rows : {hidden_, context_}) {  // back to where they were: recorded steps know these places
    GatherRows(kept_rows.data, from, count, kept_rows.columns, kept_rows.stride, spare_.data, stream_.get());
    Copy(kept_rows.data, spare_.data, kept_rows.Bytes(count));
  }
  rows_ = count;
}

void CudaBackend::GegluLinear(int64_t layer, Activation, Activation) {
  Geglu(halves_.data, rows_, local_inner_, halves_.stride, inner_.data, inner_.stride, stream_.get());
  Multiply(Layer(layer).dense_4h_to_h, inner_, nullptr, delta_);
}

// Through the host: what ranks that share no NCCL have. Sums are made in fp32 and rounded once.
void CudaBackend::AllReduce(Activation x) {
  if (communicator_.world_size() == 1) return;
  const auto begin = std::chrono::steady_clock::now();
  const Rows& rows = At(x);
  const size_t count = static_cast<size_t>(rows_ * rows.stride);
  uint16_t* halves = among_ranks_.as<uint16_t>();
  Copy(halves, rows.data, rows.Bytes(rows_));
  stream_.Wait();
  for (size_t i = 0; i < count; ++i) exchanged_[i] = HalfToFloat(halves[i]);
  communicator_.AllReduceSum(exchanged_.data(), static_cast<int64_t>(count));
  for (size_t i = 0; i < count; ++i) halves[i] = FloatToHalf(exchanged_[i]);
  Copy(rows.data, halves, rows.Bytes(rows_));
  stream_.Wait();
  collective_nanos_ += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin).count();
}

void CudaBackend::AddResidualAndNorm(int64_t layer, Projection projection, float alpha, Activation, Activation) {
  const DeviceLayer& weights = Layer(layer);
  const bool is_attention = projection == Projection::kDense, is_last = layer == shape_.num_layers - 1;
  const DeviceNorm& norm = is_attention ? weights.post_attention_layernorm : is_last ? weights_.final_layernorm : Layer(layer + 1).input_layernorm;
  ResidualLayerNorm(hidden_.data, alpha, delta_.data, is_attention ? weights.dense_bias : weights.dense_4h_to_h_bias, rows_, hidden_.columns, hidden_.stride,
                    norm.weight, norm.bias, shape_.layernorm_epsilon, stream_.get());
}

void CudaBackend::Logits(int64_t first, int64_t count) {
  float* local = Device<float>(local_logits_at_);
  cuda::Linear(weights_.word_embeddings.weight, hidden_.At(first), count, hidden_.stride, nullptr, local, local_vocab_, stream_.get());
  const int64_t world_size = communicator_.world_size();
  if (world_size == 1) return;
  const auto begin = std::chrono::steady_clock::now();
  const int64_t local_values = count * local_vocab_;
  float* mine = among_ranks_.as<float>();
  Copy(mine, local, local_values * 4);
  stream_.Wait();
  communicator_.AllGather(mine, local_values * 4, exchanged_.data());
  collective_nanos_ += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin).count();
  if (!is_first_rank()) return;
  for (int64_t rank = 0; rank < world_size; ++rank) {
    for (int64_t row = 0; row < count; ++row) {
      std::memcpy(mine + row * shape_.vocab_size + rank * local_vocab_, exchanged_.data() + rank * local_values + row * local_vocab_,
                  static_cast<size_t>(local_vocab_) * sizeof(float));
    }
  }
  Copy(Device<float>(logits_at_), mine, count * shape_.vocab_size * 4);
}

void CudaBackend::StartRequests() {
  Exchange& to = exchange();
  to.sampling.Pack(to.requests.data());
  Copy(Device<char>(requests_at_), to.requests.data(), to.sampling.RequestBytes());
  EvaluateRequests(Device<float>(logits_at_), shape_.vocab_size, shape_.vocab_size, Device<char>(requests_at_), to.sampling.count(), to.sampling.has_noise(),
                   Device<char>(sampling_scratch_at_), Device<char>(results_at_), Device<uint32_t>(sampled_at_), stream_.get());
  Copy(to.results.data(), Device<char>(results_at_), to.sampling.ResultBytes());
}

void CudaBackend::TakeResults(const Exchange& from, std::vector<ExtendResult>& results) const {
  for (size_t i = 0; i < from.rows.size(); ++i) {
    const LogitsRow& row = from.rows[i];
    try {
      TakeResult(from.sampling.Read(from.results.data(), static_cast<int64_t>(i)), row, results[row.extend]);
    } catch (const std::exception& error) {
      Fail(row, error, results);
    }
  }
}

void CudaBackend::Evaluate(const std::vector<LogitsRow>& rows, const std::vector<Extend>& extends, std::vector<ExtendResult>& results) {
  Exchange& to = exchange();
  to.sampling.Clear();
  to.rows.clear();
  std::vector<LogitsRow> on_host;
  for (const LogitsRow& row : rows) (AddRequest(row, extends[row.extend].want, to.sampling) ? to.rows : on_host).push_back(row);
  if (!DeviceTakes(to.sampling)) {
    on_host.insert(on_host.end(), to.rows.begin(), to.rows.end());
    to.rows.clear();
  }
  if (!to.rows.empty()) {
    StartRequests();
    stream_.Wait();
    TakeResults(to, results);
  }
  for (const LogitsRow& row : on_host) {
    try {
      Copy(host_logits_.data(), Device<float>(logits_at_) + row.row * shape_.vocab_size, shape_.vocab_size * 4);
      stream_.Wait();
      EvaluateRow(BestIsa(), host_logits_.data(), shape_.vocab_size, extends[row.extend].want, row.index, results[row.extend]);
    } catch (const std::exception& error) {
      Fail(row, error, results);
    }
  }
}

int CudaBackend::EvaluateLater(const std::vector<LogitsRow>& rows, const std::vector<Extend>& extends) {
  if (communicator_.world_size() > 1) return -1;  // their tokens go through the host
  Exchange& to = exchange();
  to.sampling.Clear();
  to.rows = rows;
  request_of_extend_.assign(extends.size(), -1);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!AddRequest(rows[i], extends[rows[i].extend].want, to.sampling)) return -1;
    request_of_extend_[rows[i].extend] = static_cast<int32_t>(i);
  }
  if (!DeviceTakes(to.sampling)) return -1;
  StartRequests();
  to.done.Record(stream_.get());
  to.is_awaited.store(true);
  return current_;
}

void CudaBackend::Collect(int later, std::vector<ExtendResult>& results) {
  Check(cudaSetDevice(gpu_), "choosing the GPU");  // the thread's may be another one
  Exchange& from = *exchanges_[later];
  from.done.Wait();
  TakeResults(from, results);
  from.is_awaited.store(false);
}

// False: what is wanted is for the host, raw logits and very long lists.
bool CudaBackend::AddRequest(const LogitsRow& row, const Want& want, SamplingBatch& sampling) const {
  if (const auto* sample = std::get_if<WantSample>(&want)) {
    if (sample->top_logprobs > kMaxDeviceCandidates) return false;
    sampling.AddSample(row.row, sample->params, sample->noise, sample->top_logprobs);
    return true;
  }
  if (const auto* candidates = std::get_if<WantCandidates>(&want)) {
    if (candidates->count > kMaxDeviceCandidates) return false;
    sampling.AddCandidates(row.row, candidates->count, candidates->banned_tokens, candidates->noise ? &*candidates->noise : nullptr);
    return true;
  }
  if (const auto* targets = std::get_if<WantTargets>(&want)) {
    sampling.AddTarget(row.row, targets->tokens[static_cast<size_t>(row.index)]);
    return true;
  }
  return false;
}

}  // namespace cuda

bool HasCuda() { return true; }

GpuDescription DescribeGpu(int gpu) {
  const cudaDeviceProp properties = cuda::FindGpu(gpu);
  return {properties.name, static_cast<int64_t>(properties.totalGlobalMem)};
}

std::unique_ptr<Backend> MakeCudaBackend(EngineOptions options, Communicator& communicator, ThreadPool& pool, const std::atomic<bool>& cancelled) {
  const WeightReader reader(options.model, options.shard, std::move(options.tensors), options.progress.get());
  const bool quantize_embedding = options.weights.quantize_embedding;
  const auto load = [&](cuda::Stream stream) {
    return cuda::LoadDeviceWeights(reader, options.model, quantize_embedding, options.gpu, pool, cancelled, stream);
  };
  const int64_t bytes = cuda::DeviceWeightsBytes(reader, options.model, quantize_embedding);
  return std::make_unique<cuda::CudaBackend>(options, communicator, cuda::WeightsForGpu{bytes, load});
}

std::unique_ptr<Backend> MakeSyntheticCudaBackend(const EngineOptions& options, WeightType type, Communicator& communicator) {
  const auto load = [&](cuda::Stream stream) { return cuda::RandomDeviceWeights(options.model, options.shard, type, stream); };
  return std::make_unique<cuda::CudaBackend>(options, communicator, cuda::WeightsForGpu{0, load});
}

}  // namespace tandem
