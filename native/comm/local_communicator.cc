// The communicator of a world of one rank.
#include <cstring>

#include "comm/communicator.h"
#include "core/error.h"

namespace tandem {
namespace {

class LocalCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int world_size() const override { return 1; }
  void AllReduceSum(float*, int64_t) override { ThrowIfAborted("all-reduce"); }
  void AllGather(const void* in, int64_t bytes, void* out) override {
    ThrowIfAborted("all-gather");
    if (bytes > 0) std::memcpy(out, in, static_cast<size_t>(bytes));
  }
  void Broadcast(void*, int64_t, int) override { ThrowIfAborted("broadcast"); }
  void Abort() override { aborted_.store(true); }

 private:
  void ThrowIfAborted(const char* operation) const {
    if (aborted_.load()) throw Error(ErrorCode::kAborted, std::string(operation) + ": aborted");
  }

  std::atomic<bool> aborted_{false};
};

}  // namespace

std::unique_ptr<Communicator> MakeLocalCommunicator() { return std::make_unique<LocalCommunicator>(); }

}  // namespace tandem
