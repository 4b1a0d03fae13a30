// What the addon exports (addon.ts says what each means).
#include <napi.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>

#include "binding/async_call.h"
#include "binding/convert.h"
#include "binding/engine_wrap.h"
#include "core/cpu_features.h"
#include "core/error.h"
#include "core/file_hints.h"
#include "kernels/crc32.h"
#include "kernels/quantize_weights.h"
#include "kernels/sampling.h"
#include "model/cuda/cuda_backend.h"
#include "model/product_peak.h"
#include "model/read_bandwidth.h"

namespace tandem {
namespace {

// What one JavaScript environment has of the addon.
struct Instance {
  std::shared_ptr<Runtime> runtime;
  Napi::FunctionReference engine_constructor;
};

class MeasuringThread final : public Stoppable {
 public:
  void Stop() override {
    cancelled.store(true);
    thread.Stop();
  }

  std::atomic<bool> cancelled{false};
  TaskThread thread;
};

Napi::Value CreateEngine(const Napi::CallbackInfo& info) {
  Instance& instance = *info.Env().GetInstanceData<Instance>();
  return EngineWrap::Create(info, instance.runtime, instance.engine_constructor);
}

Napi::Value DistributionOf(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  try {
    const Napi::Float32Array logits = Field(info[0], "logits").Float32s();
    const SamplingParams params = SamplingParamsFromJs(Field(info[1], "params"));
    Napi::Float32Array probs = Napi::Float32Array::New(env, logits.ElementLength());
    Distribution(logits.Data(), static_cast<int64_t>(logits.ElementLength()), params, probs.Data());
    return probs;
  } catch (...) {
    throw Napi::Error(env, ErrorToJs(env, std::current_exception()));
  }
}

using Measurement = std::function<double(const std::atomic<bool>& cancelled)>;

// A promise of what `parse` of the options measures, on a thread of its own.
Napi::Value Measure(const Napi::CallbackInfo& info, Measurement (*parse)(const Field& options)) {
  const Napi::Env env = info.Env();
  try {
    const Measurement measurement = parse(Field(info[0], ""));
    const std::shared_ptr<Runtime> runtime = env.GetInstanceData<Instance>()->runtime;
    auto measuring = std::make_shared<MeasuringThread>();
    runtime->Watch(measuring);
    return AsyncCall<double>::Start(env, runtime, measuring->thread, [measuring, measurement] { return measurement(measuring->cancelled); },
                                    [](Napi::Env env, double& result) { return Napi::Number::New(env, result); });
  } catch (...) {
    const Napi::Promise::Deferred deferred = Napi::Promise::Deferred::New(env);
    deferred.Reject(ErrorToJs(env, std::current_exception()));
    return deferred.Promise();
  }
}

Napi::Value MeasureReadBandwidthCall(const Napi::CallbackInfo& info) {
  return Measure(info, [](const Field& options) -> Measurement {
    const int64_t bytes = options.Get("bytes").Integer(1, int64_t{1} << 40);
    const int threads = static_cast<int>(options.Get("threads").Integer(1, 1024));
    const int repeats = static_cast<int>(options.Get("repeats").Integer(1, 1000));
    return [=](const std::atomic<bool>& cancelled) { return MeasureReadBandwidth(bytes, threads, repeats, cancelled); };
  });
}

Napi::Value MeasureProductPeakCall(const Napi::CallbackInfo& info) {
  return Measure(info, [](const Field& options) -> Measurement {
    const Isa isa = IsaFromJs(options.Get("isa"));
    const int threads = static_cast<int>(options.Get("threads").Integer(1, 1024));
    return [=](const std::atomic<bool>& cancelled) { return MeasureProductPeak(isa, threads, cancelled); };
  });
}

Napi::Value Crc32Of(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  try {
    const Napi::Uint8Array bytes = Field(info[0], "bytes").Uint8s();
    const auto previous = static_cast<uint32_t>(Field(info[1], "previous").Integer(0, 0xffffffff));
    return Napi::Number::New(env, Crc32(bytes.Data(), bytes.ElementLength(), previous));
  } catch (...) {
    throw Napi::Error(env, ErrorToJs(env, std::current_exception()));
  }
}

Napi::Value QuantizeWeightsOf(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  try {
    const Field options(info[0], "");
    const Napi::Uint16Array weights = options.Get("weights").Uint16s();
    Napi::Uint8Array qweight = options.Get("qweight").Uint8s();
    Napi::Uint16Array scales = options.Get("scales").Uint16s();
    const auto count = static_cast<int64_t>(weights.ElementLength());
    const int64_t cols = options.Get("columns").Integer(1, int64_t{1} << 40);
    const int64_t groups = options.Get("groups").Integer(1, cols);
    const int bits = options.Get("bits").Integer(4, 8) == 8 ? 8 : 4;
    if (count % cols != 0) options.Get("columns").Fail("a divisor of the number of weights");
    const int64_t rows = count / cols;
    if (cols % groups != 0 || (bits == 4 && cols / groups % 2 != 0)) options.Get("groups").Fail("a divisor of the columns, for 4 bits into even parts");
    if (static_cast<int64_t>(qweight.ElementLength()) != count * bits / 8) options.Get("qweight").Fail("as many bytes as the weights take");
    if (static_cast<int64_t>(scales.ElementLength()) != rows * groups) options.Get("scales").Fail("a scale for each row and group");
    return Napi::Number::New(env, static_cast<double>(QuantizeWeights(BestIsa(), weights.Data(), rows, cols, groups, bits, qweight.Data(), scales.Data())));
  } catch (...) {
    throw Napi::Error(env, ErrorToJs(env, std::current_exception()));
  }
}

template <void (*Hint)(int, int64_t, int64_t)>
void HintOf(const Napi::CallbackInfo& info) {
  constexpr int64_t kMost = int64_t{1} << 53;
  try {
    Hint(static_cast<int>(Field(info[0], "fd").Integer(0, 0x7fffffff)), Field(info[1], "offset").Integer(0, kMost), Field(info[2], "length").Integer(0, kMost));
  } catch (...) {
    throw Napi::Error(info.Env(), ErrorToJs(info.Env(), std::current_exception()));
  }
}

Napi::Value DescribeGpuOf(const Napi::CallbackInfo& info) {
  try {
    const GpuDescription gpu = DescribeGpu(static_cast<int>(Field(info[0], "gpu").Integer(0, 0x7fffffff)));
    Napi::Object object = Napi::Object::New(info.Env());
    object.Set("name", gpu.name);
    object.Set("totalBytes", Napi::Number::New(info.Env(), static_cast<double>(gpu.total_bytes)));
    return object;
  } catch (...) {
    throw Napi::Error(info.Env(), ErrorToJs(info.Env(), std::current_exception()));
  }
}

Napi::Object BuildInfo(Napi::Env env) {
  Napi::Object build = Napi::Object::New(env);
  Napi::Array backends = Napi::Array::New(env);
  backends.Set(uint32_t{0}, "cpu");
  if (HasCuda()) backends.Set(uint32_t{1}, "cuda");
  build.Set("backends", backends);
#if defined(__clang__)
  build.Set("compiler", "clang " __clang_version__);
#else
  build.Set("compiler", "gcc " __VERSION__);
#endif
  build.Set("isa", IsaName(BestIsa()));
  return build;
}

Napi::Object Init(Napi::Env env, Napi::Object exports) {
  auto instance = std::make_unique<Instance>();
  instance->runtime = Runtime::Create(env);
  instance->engine_constructor = Napi::Persistent(EngineWrap::Define(env));
  env.SetInstanceData(instance.release());

  exports.Set("build", BuildInfo(env));
  exports.Set("crc32", Napi::Function::New<Crc32Of>(env, "crc32"));
  exports.Set("quantizeWeights", Napi::Function::New<QuantizeWeightsOf>(env, "quantizeWeights"));
  exports.Set("hintRead", Napi::Function::New<HintOf<HintRead>>(env, "hintRead"));
  exports.Set("hintWritten", Napi::Function::New<HintOf<HintWritten>>(env, "hintWritten"));
  exports.Set("createEngine", Napi::Function::New<CreateEngine>(env, "createEngine"));
  exports.Set("describeGpu", Napi::Function::New<DescribeGpuOf>(env, "describeGpu"));
  exports.Set("distribution", Napi::Function::New<DistributionOf>(env, "distribution"));
  exports.Set("measureProductPeak", Napi::Function::New<MeasureProductPeakCall>(env, "measureProductPeak"));
  exports.Set("measureReadBandwidth", Napi::Function::New<MeasureReadBandwidthCall>(env, "measureReadBandwidth"));
  return exports;
}

}  // namespace
}  // namespace tandem

static Napi::Object InitAddon(Napi::Env env, Napi::Object exports) {
  try {
    return tandem::Init(env, exports);
  } catch (const tandem::Error&) {
    throw Napi::Error(env, tandem::ErrorToJs(env, std::current_exception()));
  }
}
NODE_API_MODULE(tandem_addon, InitAddon)
