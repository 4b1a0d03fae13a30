// cuda_on_cpu.cc: the emulator's fibers, its scheduler and the host API.
#include "test/cuda_on_cpu.h"

#include <sys/mman.h>

#include <chrono>
#include <cstdlib>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
#define TANDEM_FIBER_ASSEMBLY
#else
#include <ucontext.h>
#endif

struct CUstream_st {
  std::unique_ptr<std::vector<std::function<void()>>> captured;  // null when not capturing
  std::mutex mutex;                                              // of the next two
  std::deque<std::function<void()>> waiting;
  uint64_t done = 0;      // of all that was given to it
  std::mutex run_mutex;   // one thread runs what waits
};
struct CUevent_st {
  std::chrono::steady_clock::time_point recorded;
  cudaStream_t stream = nullptr;  // where it was recorded last
  uint64_t place = 0;             // how much of the stream is done with it
};
struct CUgraph_st {
  std::vector<std::function<void()>> nodes;
};
struct CUgraphExec_st {
  std::vector<std::function<void()>> nodes;
};

#ifdef TANDEM_FIBER_ASSEMBLY
// Pushes the registers that a callee must keep, stores the stack pointer in *from, and goes on where `to` was stored.
extern "C" void TandemSwitchFiber(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.globl TandemSwitchFiber
.type TandemSwitchFiber,@function
TandemSwitchFiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size TandemSwitchFiber,.-TandemSwitchFiber
)");
#else
asm(R"(
.text
.globl TandemSwitchFiber
.type TandemSwitchFiber,%function
TandemSwitchFiber:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size TandemSwitchFiber,.-TandemSwitchFiber
)");
#endif
#endif

namespace tandem::cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr size_t kCanaryBytes = 1024;  // behind the dynamic shared memory
constexpr int kPoison = 0xff;          // NaN as fp16 and fp32, -1 as an integer

[[noreturn]] void Refuse(const std::string& what) { throw Error(ErrorCode::kInternal, "cuda on cpu: " + what); }

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

enum class FiberState { kRunnable, kAtBarrier, kInWarp, kEnded };

struct Fiber {
  FiberState state = FiberState::kEnded;
  uint3 index{};
  bool vote = false;  // at a barrier
  int votes = 0;      // what the barrier gave
  uint32_t mask = 0;  // in a warp collective
  void* mine = nullptr;
  WarpOperation run = nullptr;
  std::vector<Copy> open_group;
  std::vector<std::vector<Copy>> groups;
  char* stack = nullptr;
#ifdef TANDEM_FIBER_ASSEMBLY
  void* context = nullptr;
#else
  ucontext_t context;
#endif
};

// One launch at a time in the process, so all of this is its own.
std::mutex launch_mutex;
ThreadOrder thread_order = ThreadOrder::kForward;
uint32_t random_state = 1;
std::vector<Fiber> fibers;  // those of the block that runs come first
int num_fibers = 0, num_live = 0, num_at_barrier = 0;
Fiber* current = nullptr;
const std::function<void()>* thread_function = nullptr;
std::exception_ptr failure;
std::vector<unsigned char> shared_memory;
#ifdef TANDEM_FIBER_ASSEMBLY
void* scheduler_context = nullptr;
#else
ucontext_t scheduler_context;
#endif

uint32_t NextRandom() {  // xorshift
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return random_state;
}

// Puts 0 .. count - 1 into the order of the setting. kRandom mixes what is there.
void PutInOrder(std::vector<uint32_t>& order, size_t count) {
  if (order.size() != count) {
    order.resize(count);
    std::iota(order.begin(), order.end(), 0u);
    if (thread_order == ThreadOrder::kBackward) std::reverse(order.begin(), order.end());
  }
  if (thread_order != ThreadOrder::kRandom) return;
  for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[NextRandom() % i]);
}

void SwitchToScheduler(Fiber& fiber) {
#ifdef TANDEM_FIBER_ASSEMBLY
  TandemSwitchFiber(&fiber.context, scheduler_context);
#else
  swapcontext(&fiber.context, &scheduler_context);
#endif
}

void Resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
#ifdef TANDEM_FIBER_ASSEMBLY
  TandemSwitchFiber(&scheduler_context, fiber.context);
#else
  swapcontext(&scheduler_context, &fiber.context);
#endif
}

void ReleaseBarrierIfComplete() {
  if (num_live == 0 || num_at_barrier < num_live) return;
  int votes = 0;
  for (int i = 0; i < num_fibers; ++i) votes += fibers[i].state == FiberState::kAtBarrier && fibers[i].vote;
  for (int i = 0; i < num_fibers; ++i) {
    if (fibers[i].state != FiberState::kAtBarrier) continue;
    fibers[i].votes = votes;
    fibers[i].state = FiberState::kRunnable;
  }
  num_at_barrier = 0;
}

// The collective that `of`, a lane of this warp, waits in.
void RunCollectiveIfComplete(int first_of_warp, const Fiber& of) {
  const int warp_end = std::min(num_fibers, first_of_warp + 32);
  const uint32_t mask = of.mask;
  void* lanes[32] = {};
  for (int i = first_of_warp; i < warp_end; ++i) {
    const Fiber& fiber = fibers[i];
    if ((mask >> (i - first_of_warp) & 1u) == 0 || fiber.state == FiberState::kEnded) continue;
    if (fiber.state != FiberState::kInWarp) return;
    if (fiber.run != of.run || fiber.mask != mask) Refuse("lanes of a warp are in different collectives, or name different masks");
    lanes[i - first_of_warp] = fiber.mine;
  }
  const WarpOperation run = of.run;
  for (int i = first_of_warp; i < warp_end; ++i) {
    if (lanes[i - first_of_warp] != nullptr) fibers[i].state = FiberState::kRunnable;
  }
  run(lanes);
}

int FirstOfWarp(const Fiber& fiber) { return static_cast<int>(&fiber - fibers.data()) / 32 * 32; }

void EndFiber(Fiber& fiber) {
  fiber.state = FiberState::kEnded;
  --num_live;
  ReleaseBarrierIfComplete();
  const int first = FirstOfWarp(fiber);
  for (int i = first; i < std::min(num_fibers, first + 32); ++i) {
    if (fibers[i].state == FiberState::kInWarp) RunCollectiveIfComplete(first, fibers[i]);
  }
}

void FiberMain() {
  try {
    (*thread_function)();
    EndFiber(*current);
  } catch (...) {
    failure = std::current_exception();
  }
  SwitchToScheduler(*current);
  std::abort();  // nobody resumes a fiber that has ended
}

void StartFiber(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, 4096, PROT_NONE);
    fiber.stack = static_cast<char*>(memory);
  }
#if defined(TANDEM_FIBER_ASSEMBLY) && defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;                                 // where FiberMain would return to; keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&FiberMain);
  for (int i = 0; i < 6; ++i) *--top = nullptr;     // the registers
  fiber.context = top;
#elif defined(TANDEM_FIBER_ASSEMBLY)
  void** registers = reinterpret_cast<void**>(fiber.stack + kStackBytes - 160);
  std::fill(registers, registers + 20, nullptr);
  registers[11] = reinterpret_cast<void*>(&FiberMain);  // x30, where the switch returns to
  fiber.context = registers;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, FiberMain, 0);
#endif
  fiber.state = FiberState::kRunnable;
  fiber.open_group.clear();
  fiber.groups.clear();
}

std::string DescribeDeadlock() {
  int in_warp = 0;
  for (int i = 0; i < num_fibers; ++i) in_warp += fibers[i].state == FiberState::kInWarp;
  return "deadlock in block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z) + ": of " +
         std::to_string(num_live) + " threads " + std::to_string(num_at_barrier) + " are at a barrier and " + std::to_string(in_warp) +
         " in a warp collective that the others never reach";
}

// An error leaves the fibers where they are; their stacks are used anew.
void RunBlock(std::vector<uint32_t>& order) {
  num_live = num_fibers;
  num_at_barrier = 0;
  for (int i = 0; i < num_fibers; ++i) StartFiber(fibers[i]);
  while (num_live > 0) {
    bool any_ran = false;
    PutInOrder(order, static_cast<size_t>(num_fibers));
    for (const uint32_t i : order) {
      if (fibers[i].state != FiberState::kRunnable) continue;
      any_ran = true;
      Resume(fibers[i]);
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    }
    if (!any_ran) Refuse(DescribeDeadlock());
  }
}

void CheckLaunch(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > kMaxThreads || block.z > 64) Refuse("a block of " + std::to_string(threads) + " threads; 1 to 1024 are possible");
  if (shared_bytes > kMaxSharedBytes) Refuse(std::to_string(shared_bytes) + " bytes of shared memory; 232448 are possible");
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) Refuse("a grid that no GPU takes");
}

void RunLaunch(const std::function<void()>& thread, dim3 grid, dim3 block, size_t shared_bytes) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  num_fibers = static_cast<int>(block.x * block.y * block.z);
  if (fibers.size() < kMaxThreads) fibers.resize(kMaxThreads);
  for (int i = 0; i < num_fibers; ++i) {
    const auto place = static_cast<unsigned>(i);
    fibers[i].index = {place % block.x, place / block.x % block.y, place / block.x / block.y};
  }
  thread_function = &thread;
  gridDim = grid;
  blockDim = block;
  shared_memory.resize(kMaxSharedBytes + kCanaryBytes + 128);
  std::vector<uint32_t> block_order, fiber_order;
  PutInOrder(block_order, size_t{grid.x} * grid.y * grid.z);
  auto* shared = static_cast<unsigned char*>(DynamicShared());
  for (const uint32_t place : block_order) {
    blockIdx = {place % grid.x, place / grid.x % grid.y, place / grid.x / grid.y};
    std::memset(shared, kPoison, shared_bytes + kCanaryBytes);
    RunBlock(fiber_order);
    for (size_t i = shared_bytes; i < shared_bytes + kCanaryBytes; ++i) {
      if (shared[i] != kPoison) Refuse("a write " + std::to_string(i - shared_bytes) + " bytes behind the dynamic shared memory");
    }
  }
}

std::mutex streams_mutex;
std::set<cudaStream_t> streams;

// When somebody waits for the stream, or when the graph that is captured runs; on the default stream at once.
cudaError_t Do(cudaStream_t stream, std::function<void()> work) {
  if (stream == nullptr) {
    work();
  } else if (stream->captured) {
    stream->captured->push_back(std::move(work));
  } else {
    const std::lock_guard<std::mutex> lock(stream->mutex);
    stream->waiting.push_back(std::move(work));
  }
  return cudaSuccess;
}

// Runs what waits until `place` of all that was given to the stream is done, or all of it.
void RunUntil(cudaStream_t stream, uint64_t place) {
  const std::lock_guard<std::mutex> running(stream->run_mutex);
  for (;;) {
    std::function<void()> work;
    {
      const std::lock_guard<std::mutex> lock(stream->mutex);
      if (stream->done >= place || stream->waiting.empty()) return;
      work = std::move(stream->waiting.front());
      stream->waiting.pop_front();
      stream->done += 1;
    }
    work();
  }
}

constexpr uint64_t kAll = ~uint64_t{0};

void RunAllStreams() {
  std::set<cudaStream_t> all;
  {
    const std::lock_guard<std::mutex> lock(streams_mutex);
    all = streams;
  }
  for (const cudaStream_t stream : all) RunUntil(stream, kAll);
}

std::mutex memory_mutex;
size_t total_memory = size_t{16} << 30, used_memory = 0;
std::map<void*, size_t> allocations;

void* AllocatePoisoned(size_t bytes) {
  const size_t rounded = (std::max<size_t>(bytes, 1) + 255) / 256 * 256;
  void* memory = std::aligned_alloc(256, rounded);
  if (memory != nullptr) std::memset(memory, kPoison, rounded);
  return memory;
}

}  // namespace

void SetThreadOrder(ThreadOrder order, uint32_t seed) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  thread_order = order;
  random_state = seed == 0 ? 1 : seed;
}

void SetTotalMemory(size_t bytes) {
  const std::lock_guard<std::mutex> lock(memory_mutex);
  total_memory = bytes;
}

void Launch(std::function<void()> thread, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
  CheckLaunch(grid, block, shared_bytes);
  Do(stream, [=] { RunLaunch(thread, grid, block, shared_bytes); });
}

void* DynamicShared() {
  const auto address = reinterpret_cast<uintptr_t>(shared_memory.data());
  return shared_memory.data() + (128 - address % 128) % 128;
}

void WarpCollective(uint32_t mask, void* mine, WarpOperation run) {
  Fiber& fiber = *current;
  const int first = FirstOfWarp(fiber);
  if ((mask >> (&fiber - fibers.data() - first) & 1u) == 0) Refuse("a lane calls a warp collective whose mask does not name it");
  fiber.mask = mask;
  fiber.mine = mine;
  fiber.run = run;
  fiber.state = FiberState::kInWarp;
  RunCollectiveIfComplete(first, fiber);
  if (fiber.state == FiberState::kInWarp) SwitchToScheduler(fiber);
}

int BlockBarrier(bool value) {
  Fiber& fiber = *current;
  fiber.vote = value;
  fiber.state = FiberState::kAtBarrier;
  ++num_at_barrier;
  ReleaseBarrierIfComplete();
  if (fiber.state == FiberState::kAtBarrier) SwitchToScheduler(fiber);
  return fiber.votes;
}

void StartCopy16(void* to, const void* from, bool valid) {
  const bool aligned = reinterpret_cast<uintptr_t>(to) % 16 == 0 && (!valid || reinterpret_cast<uintptr_t>(from) % 16 == 0);
  if (!aligned) Refuse("cp.async from or to a place that is not 16-byte aligned");
  std::memset(to, kPoison, 16);
  current->open_group.push_back({to, from, valid});
}

void CommitCopies() { current->groups.push_back(std::exchange(current->open_group, {})); }

void WaitForCopies(int groups_left) {
  std::vector<std::vector<Copy>>& groups = current->groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

void Trap(const char* what) { Refuse(what); }

}  // namespace tandem::cuda_on_cpu

using tandem::cuda_on_cpu::Do;

const char* cudaGetErrorName(cudaError_t status) {
  switch (status) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
  }
  return "unknown";
}
const char* cudaGetErrorString(cudaError_t status) { return status == cudaErrorMemoryAllocation ? "out of memory" : cudaGetErrorName(status); }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return tandem::cuda_on_cpu::RunAllStreams(), cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  *properties = {};
  std::strcpy(properties->name, "emulated");
  properties->totalGlobalMem = tandem::cuda_on_cpu::total_memory;
  properties->sharedMemPerBlock = 48 * 1024;
  properties->sharedMemPerBlockOptin = tandem::cuda_on_cpu::kMaxSharedBytes;
  properties->sharedMemPerMultiprocessor = 228 * 1024;
  properties->major = 9;
  properties->multiProcessorCount = 4;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = static_cast<int>(tandem::cuda_on_cpu::kMaxThreads);
  properties->l2CacheSize = 4 << 20;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  const std::lock_guard<std::mutex> lock(tandem::cuda_on_cpu::memory_mutex);
  *total_bytes = tandem::cuda_on_cpu::total_memory;
  *free_bytes = *total_bytes - std::min(*total_bytes, tandem::cuda_on_cpu::used_memory);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  using namespace tandem::cuda_on_cpu;
  const std::lock_guard<std::mutex> lock(memory_mutex);
  *memory = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (bytes > total_memory - std::min(total_memory, used_memory) || (*memory = AllocatePoisoned(bytes)) == nullptr) return cudaErrorMemoryAllocation;
  allocations[*memory] = bytes;
  used_memory += bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  using namespace tandem::cuda_on_cpu;
  if (memory == nullptr) return cudaSuccess;
  RunAllStreams();  // CUDA waits, too
  const std::lock_guard<std::mutex> lock(memory_mutex);
  const auto found = allocations.find(memory);
  if (found == allocations.end()) return cudaErrorInvalidValue;
  used_memory -= found->second;
  allocations.erase(found);
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** memory, size_t bytes) {
  *memory = tandem::cuda_on_cpu::AllocatePoisoned(bytes);
  return *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned int) { return cudaMallocHost(memory, bytes); }
cudaError_t cudaFreeHost(void* memory) {
  if (memory != nullptr) tandem::cuda_on_cpu::RunAllStreams();
  return std::free(memory), cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) { return cudaMemcpyAsync(to, from, bytes, kind); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return Do(stream, [=] { std::memmove(to, from, bytes); });
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind,
                              cudaStream_t stream) {
  if (width > to_pitch || width > from_pitch) return cudaErrorInvalidValue;
  return Do(stream, [=] {
    for (size_t y = 0; y < height; ++y) std::memmove(static_cast<char*>(to) + y * to_pitch, static_cast<const char*>(from) + y * from_pitch, width);
  });
}
cudaError_t cudaMemset(void* memory, int value, size_t bytes) { return cudaMemsetAsync(memory, value, bytes); }
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  return Do(stream, [=] { std::memset(memory, value, bytes); });
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = new CUstream_st;
  const std::lock_guard<std::mutex> lock(tandem::cuda_on_cpu::streams_mutex);
  tandem::cuda_on_cpu::streams.insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  {
    const std::lock_guard<std::mutex> lock(tandem::cuda_on_cpu::streams_mutex);
    tandem::cuda_on_cpu::streams.erase(stream);
  }
  delete stream;  // with what nobody has waited for
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream == nullptr) return cudaSuccess;
  if (stream->captured) return cudaErrorStreamCaptureUnsupported;
  return tandem::cuda_on_cpu::RunUntil(stream, tandem::cuda_on_cpu::kAll), cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int) {
  return Do(stream, [event] { cudaEventSynchronize(event); });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream == nullptr || stream->captured) return cudaErrorStreamCaptureUnsupported;
  stream->captured = std::make_unique<std::vector<std::function<void()>>>();
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (stream == nullptr || !stream->captured) return cudaErrorInvalidValue;
  *graph = new CUgraph_st{std::move(*stream->captured)};
  stream->captured.reset();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  return *executable = new CUgraphExec_st{graph->nodes}, cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return Do(stream, [executable] {
    for (const std::function<void()>& node : executable->nodes) node();
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  tandem::cuda_on_cpu::RunAllStreams();
  return delete executable, cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = new CUevent_st, cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const cudaError_t status = Do(stream, [event] { event->recorded = std::chrono::steady_clock::now(); });
  event->stream = stream;
  if (stream == nullptr) return status;
  const std::lock_guard<std::mutex> lock(stream->mutex);
  event->place = stream->done + stream->waiting.size();
  return status;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (event->stream != nullptr) tandem::cuda_on_cpu::RunUntil(event->stream, event->place);
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  *milliseconds = std::chrono::duration<float, std::milli>(to->recorded - from->recorded).count();
  return cudaSuccess;
}
