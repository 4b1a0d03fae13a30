#include "model/engine.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <utility>

#include "core/cpu_affinity.h"
#include "core/error.h"
#include "model/glm.h"

namespace tandem {
namespace {

constexpr int kMostUnderWay = 2;

void Check(bool legal, const std::string& what) {
  if (!legal) throw Error(ErrorCode::kInvalidArgument, what);
}

// What can be known to be wrong before threads are started and other ranks are met.
ModelShape CheckedShape(const EngineOptions& options) {
  CheckModelShape(options.model, options.shard);
  Check(options.threads >= 1 && options.threads <= 1024, "threads: " + std::to_string(options.threads) + " is not in 1 .. 1024");
  Check(options.max_batch_tokens >= 1 && options.max_batch_tokens <= int64_t{1} << 24,
        "maxBatchTokens: " + std::to_string(options.max_batch_tokens) + " is not in 1 .. 2^24");
  if (options.isa) Check(IsaSupported(*options.isa), std::string("isa: this CPU has no ") + IsaName(*options.isa) + ", its best is " + IsaName(CpuIsa()));
  Check(options.shard.world_size == 1 || options.communicator, "communicator: world size " + std::to_string(options.shard.world_size) + " needs one");
  return options.model;
}

// Of all ranks: they wait for one another.
bool HasCpuForEachThread(const EngineOptions& options) {
  if (!options.cpus.empty()) return static_cast<int>(options.cpus.size()) >= options.threads;
  return AllowedCpuCount() >= options.threads * options.shard.world_size;
}

ThreadPoolOptions PoolOptions(const EngineOptions& options) {
  ThreadPoolOptions pool;
  pool.cpus = options.cpus;
  if (!HasCpuForEachThread(options)) pool.spin = std::chrono::microseconds(0);
  return pool;
}

std::unique_ptr<Communicator> Connect(const EngineOptions& options, const std::atomic<bool>& cancelled) {
  if (options.shard.world_size == 1) return MakeLocalCommunicator();
  ShmOptions shm;
  shm.name = options.communicator->name;
  shm.timeout_ms = options.communicator->timeout_ms;
  shm.rank = options.shard.rank;
  shm.world_size = options.shard.world_size;
  if (HasCpuForEachThread(options)) shm.spin = std::chrono::microseconds(500);
  return MakeShmCommunicator(shm, cancelled);
}

}  // namespace

Engine::Engine(EngineOptions options, const std::atomic<bool>& cancelled, MakeBackend make_backend)
    : shape_(CheckedShape(options)),
      cancelled_(cancelled),
      limits_{shape_.num_layers, shape_.vocab_size, shape_.max_sequence_length, options.kv_blocks, options.kv_block_size, options.max_batch_tokens},
      pool_(options.threads, PoolOptions(options)),
      communicator_(Connect(options, cancelled)),
      backend_(make_backend(std::move(options), *communicator_, pool_, cancelled)) {}

Engine::UnderWay::UnderWay(Engine& engine) : engine_(engine) {
  std::unique_lock<std::mutex> lock(engine.mutex_);
  engine.changed_.wait(lock, [&] { return engine.under_way_ < kMostUnderWay; });
  engine.under_way_ += 1;
}

Engine::UnderWay::~UnderWay() {
  const std::lock_guard<std::mutex> lock(engine_.mutex_);
  engine_.under_way_ -= 1;
  engine_.changed_.notify_all();
}

Engine::~Engine() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return under_way_ == 0; });
}

void Engine::TakeSamples(Step& step) {
  if (is_last_later_) return;
  if (std::none_of(step.extends.begin(), step.extends.end(), [](const Extend& extend) { return extend.sampled_by.has_value(); })) return;
  samples_.resize(before_.sampled.size());
  communicator_->Broadcast(samples_.data(), static_cast<int64_t>(samples_.size() * sizeof(uint32_t)), 0);
  for (Extend& extend : step.extends) {
    if (extend.sampled_by) extend.tokens[0] = samples_[*extend.sampled_by];
  }
}

void Engine::FailStep(const std::exception& error) {
  communicator_->Abort();  // the other ranks wait for this one in a collective that it will not come to
  const auto* own = dynamic_cast<const Error*>(&error);
  // No longer a matter of the step's arguments: after this the ranks are not in step.
  if (own != nullptr && (own->code() == ErrorCode::kTimeout || own->code() == ErrorCode::kAborted)) throw;
  throw Error(ErrorCode::kInternal, error.what());
}

std::unique_ptr<Engine::UnderWay> Engine::Begin(Step step) {
  if (cancelled_.load()) throw Error(ErrorCode::kAborted, "the engine was aborted");
  try {
    ValidateStep(step, limits_, before_);
  } catch (const Error&) {
    before_.sampled.clear();  // no step can go on from this one
    throw;
  }
  std::unique_ptr<UnderWay> under_way(new UnderWay(*this));
  try {
    TakeSamples(step);
    before_ = After(step, shape_.num_layers, std::move(before_));
    under_way->step_ = BeginStep(shape_, std::move(step), limits_.block_size, *backend_, cancelled_, is_last_later_);
  } catch (const std::exception& error) {
    FailStep(error);
  }
  is_last_later_ = !under_way->has_ended();
  samples_.clear();
  for (const ExtendResult& each : under_way->step_.result.results) {
    const auto* sample = std::get_if<SampleResult>(&each);
    samples_.push_back(sample == nullptr ? 0 : sample->token);
  }
  return under_way;
}

StepResult Engine::End(UnderWay& under_way) {
  if (under_way.has_ended()) return EndStep(under_way.step_, *backend_);
  try {
    under_way.step_.begin = std::max(under_way.step_.begin, last_end_);  // it may have begun while another one ran
    StepResult result = EndStep(under_way.step_, *backend_);
    last_end_ = std::chrono::steady_clock::now();
    return result;
  } catch (const std::exception& error) {
    FailStep(error);
  }
}

}  // namespace tandem
