// From rows of logits to tokens, to candidates and to log-probabilities, on the device (kernels/sampling.h and model/evaluate_want.cc are the definitions).
//
// Tokens are those of the CPU unless a rounding decides: exponentials are fp32 on both, but a GPU's may differ in the last bit. A row's result has the same
// bits whatever the other rows are. All sums over tokens are sums of integers (fixed point), so that no order of threads shows in them.
//
// Use: add the requests of a batch to a SamplingBatch, Pack it into page-locked memory, copy that to the device, EvaluateRequests, copy the results back, Read.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cuda/device.h"
#include "kernels/sampling.h"

namespace tandem::cuda {

// More candidates (or top log-probabilities) than these are for the host.
constexpr uint32_t kMaxDeviceCandidates = 256;

enum class SamplingKind : uint32_t { kNothing, kSample, kCandidates, kTarget };

// A list of a request: words [begin, begin + count) behind the requests.
struct SamplingList {
  uint32_t begin, count;
};

// What is wanted of one row, as it lies in device memory. Lists are sorted by token.
struct SamplingRequest {
  SamplingKind kind;
  uint32_t row;            // of the logits
  uint32_t target;         // kTarget: the token whose log-probability is wanted
  uint32_t count;          // kSample: top log-probabilities, kCandidates: candidates
  uint32_t ranked_begin;   // where they go in the results' ranked tokens
  uint32_t changes;        // whether the lists change any logit
  uint32_t has_noise;      // kCandidates: Gumbel noise with `key`
  uint32_t top_k;          // 0: off
  float top_p;             // 0: off
  float temperature;
  float repetition_penalty;
  SamplingList banned;     // set to -infinity for kSample, to kBannedLogit for kCandidates
  SamplingList biased;     // tokens; their biases, fp32, are the `count` words behind them
  SamplingList repeated;   // no token twice
  NoiseKey key;
};

enum class SamplingStatus : uint32_t { kOk, kNaN, kInfinity };

struct SamplingOutcome {
  SamplingStatus status;
  uint32_t token;  // kSample; with kInfinity the first token whose logit is
  float logprob;   // kSample, kTarget: of the unchanged logits
  uint32_t ranked; // how many ranked tokens there are
};

// Best first, among equals the lower id. kSample: logprob and key are the log-softmax of the unchanged logits. kCandidates: as in tandem::Candidates.
struct RankedToken {
  uint32_t token;
  float logprob;
  float key;
};

struct SamplingResult {
  uint32_t token = 0;
  float logprob = 0;
  Candidates ranked;
};

// Gathers the requests of one launch on the host. Result i is that of the i-th added request. Requests do not share results, rows may be shared.
class SamplingBatch {
 public:
  explicit SamplingBatch(int64_t vocab) : vocab_(vocab) {}

  void Clear();

  // All throw kInvalidArgument naming the field; more than kMaxDeviceCandidates are refused.
  //   row: of the logits
  void AddSample(int64_t row, const SamplingParams& params, const NoiseKey& key, uint32_t top_logprobs);
  void AddCandidates(int64_t row, uint32_t count, const std::vector<uint32_t>& banned, const NoiseKey* key);
  void AddTarget(int64_t row, uint32_t token);
  // Fills a batch up to the size of a captured graph.
  void AddNothing();

  int64_t count() const { return static_cast<int64_t>(requests_.size()); }
  bool has_noise() const { return has_noise_; }

  int64_t RequestBytes() const;
  // to: RequestBytes(), to be copied to the device, 8-byte aligned
  void Pack(void* to) const;

  int64_t ResultBytes() const;
  // results: ResultBytes() copied back from the device. Throws kInternal, with the words of the CPU backend, if the row has a NaN, or infinity where a token
  // or candidates were wanted.
  SamplingResult Read(const void* results, int64_t i) const;

 private:
  SamplingRequest& Add(SamplingKind kind, int64_t row);
  SamplingList AddList(const std::vector<uint32_t>& words);
  uint32_t AddRanked(uint32_t count);

  int64_t vocab_;
  std::vector<SamplingRequest> requests_;
  std::vector<uint32_t> words_;
  uint32_t ranked_ = 0;
  bool has_noise_ = false;
};

int64_t SamplingScratchBytes(int64_t count, int64_t vocab);

// Does what is requested of rows of logits: [*, vocab] fp32, rows `stride` elements apart; unchanged.
//   requests: what SamplingBatch::Pack made of `count` requests, in device memory
//   with_noise: the batch's has_noise (true is always right, and costs a launch)
//   scratch: SamplingScratchBytes(count, vocab), 16-byte aligned; results: ResultBytes(), 8-byte aligned
//   tokens: null, or [count] uint32 in device memory: the tokens of kSample requests once more, for the step that follows; others are left alone
void EvaluateRequests(const float* logits, int64_t stride, int64_t vocab, const void* requests, int64_t count, bool with_noise, void* scratch, void* results,
                      uint32_t* tokens, Stream stream);

}  // namespace tandem::cuda
