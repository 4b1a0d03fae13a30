// The operations that the forward pass is written against. A backend owns the weights of one rank, its KV cache, the activations and the way to the other
// ranks; where they lie (host or device) is its own affair. Calls come from one thread and take effect in their order.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/attention.h"
#include "kernels/rope.h"
#include "model/engine_options.h"
#include "model/step.h"

namespace tandem {

// Activations: one row for each row of the batch. A wide or narrow one holds whatever the operation that wrote it last put there, dense.
enum class Activation {
  kHidden,  // [m, h]
  kDelta,   // [m, h]
  kWide,    // [m, 3 h / R] or [m, 2 f / R]
  kNarrow,  // [m, h / R] or [m, f / R]
};

enum class Projection { kQueryKeyValue, kDense, kHTo4h, k4hToH };

// The rows of one step: the runs of the Extends one after another, a run that is not whole (Extend::is_whole) behind all others.
struct Batch {
  std::vector<uint32_t> tokens;
  std::vector<KvSlot> slots;
  std::vector<AttentionRow> attention;  // block tables: memory of the step
  // Of each row, which Extend of the step before samples its token; -1: none. Empty: of no row, or that step was not evaluated later.
  std::vector<int32_t> sampled_by;
};

// A row of logits to be looked at: row `row` of the last Logits call is wanted row `index` of extends[extend].
struct LogitsRow {
  int64_t row;
  size_t extend;
  int64_t index;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual bool is_first_rank() const = 0;
  virtual EngineMemory memory() const = 0;

  // Starts a step of batch.tokens.size() rows; `batch` lives until the last Logits call.
  virtual void Begin(const Batch& batch) = 0;
  virtual void CopyKvBlocks(const std::vector<uint32_t>& from_to_pairs) = 0;
  // Runs `forward`, the operations below up to Logits. repeatable: they are the same calls whenever a step of one row a run has as many rows; a backend
  // may then do what it recorded before instead.
  virtual void RunForward(bool, const std::function<void()>& forward) { forward(); }
  // The operations that follow work on the first `count` rows of the batch; the other rows of kHidden stay as they are.
  virtual void UseRows(int64_t count) = 0;
  // Keeps rows [first, first + count) of kHidden over the end of the step; and puts back what the last SaveCarry kept. One run's at a time.
  virtual void SaveCarry(int64_t first, int64_t count) = 0;
  virtual void RestoreCarry(int64_t first, int64_t count) = 0;
  // The rows' embeddings where this rank has them, else zeros.
  virtual void Embed(Activation out) = 0;
  virtual void InputNorm(Activation x) = 0;  // layer 0's, in place
  // Column-parallel layers (kQueryKeyValue, kHTo4h) with their bias; row-parallel ones (kDense, k4hToH) without: AddResidualAndNorm adds it once for all ranks.
  virtual void Linear(int64_t layer, Projection projection, Activation in, Activation out) = 0;
  virtual void RotaryAndWriteKv(int64_t layer, Activation qkv, Activation q) = 0;
  // Goes on with these of the rows in use alone, in kHidden, kNarrow and the batch. Ascending, not empty.
  virtual void KeepRows(const std::vector<int64_t>& rows) = 0;
  virtual void Attention(int64_t layer, Activation q) = 0;  // in place
  // y = k4hToH's product with GEGLU(u), through kNarrow or not
  virtual void GegluLinear(int64_t layer, Activation u, Activation y) = 0;
  virtual void AllReduce(Activation x) = 0;
  // x = the layer norm of (alpha x + delta + the projection's bias): after kDense layer's own second one, after k4hToH the next layer's first one or, behind
  // the last layer, the final one.
  virtual void AddResidualAndNorm(int64_t layer, Projection projection, float alpha, Activation delta, Activation x) = 0;
  // Logits [count, V] of rows [first, first + count) of kHidden, gathered on rank 0. count <= kMaxLogitsRows.
  virtual void Logits(int64_t first, int64_t count) = 0;
  // Rank 0: what the Extends want of the logits of the last Logits call. An Extend whose want cannot be met gets an ErrorResult, which stays.
  virtual void Evaluate(const std::vector<LogitsRow>& rows, const std::vector<Extend>& extends, std::vector<ExtendResult>& results) = 0;

  // The same without waiting for it: the step ends with Collect, and the next one may begin before. At most one such step may have begun, and not been
  // collected, when another one begins. Returns a name for Collect; -1: it cannot be done, and nothing was.
  virtual int EvaluateLater(const std::vector<LogitsRow>&, const std::vector<Extend>&) { return -1; }
  // Waits for what EvaluateLater gave the name for. From any one thread, beside the other calls.
  virtual void Collect(int, std::vector<ExtendResult>&) {}

  // The step is over, where it was not evaluated later: what it computes has been computed.
  virtual void Finish() {}

  // Time since Begin that went into collectives.
  virtual int64_t collective_micros() const = 0;
};

// Keeps the memory for logits bounded however many rows are wanted.
constexpr int64_t kMaxLogitsRows = 64;

}  // namespace tandem
