#include "binding/convert.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "core/error.h"
#include "model/step_codec.h"

namespace tandem {
namespace {

constexpr int64_t kMostUint32 = std::numeric_limits<uint32_t>::max();
constexpr int64_t kMostSafeInteger = (int64_t{1} << 53) - 1;

TensorSource TensorFromJs(const Field& tensor) {
  TensorSource source;
  source.name = tensor.Get("name").Text();
  source.file = tensor.Get("file").Text();
  if (source.file.find('\0') != std::string::npos) tensor.Get("file").Fail("a path");
  source.offset = tensor.Get("offset").Integer(0, kMostSafeInteger);
  source.type = static_cast<TensorType>(tensor.Get("dtype").OneOf({"F32", "F16", "I8", "U8"}));
  for (const Field& size : tensor.Get("shape").Elements()) source.shape.push_back(size.Integer(0, kMostSafeInteger));
  return source;
}

Napi::Value CodedError(Napi::Env env, ErrorCode code, const std::string& message) {
  const char* names[] = {"INVALID_ARGUMENT", "CHECKPOINT", "OUT_OF_MEMORY", "TIMEOUT", "ABORTED", "INTERNAL"};
  Napi::Error error = Napi::Error::New(env, message);
  error.Set("code", Napi::String::New(env, names[static_cast<int>(code)]));
  return error.Value();
}

}  // namespace

Field Field::Get(const char* name) const {
  if (!value_.IsObject()) Fail("an object");
  return Field(value_.As<Napi::Object>().Get(name), path_.empty() ? name : path_ + "." + name);
}

std::vector<Field> Field::Elements() const {
  if (!value_.IsArray()) Fail("an array");
  const Napi::Array array = value_.As<Napi::Array>();
  std::vector<Field> elements;
  elements.reserve(array.Length());
  for (uint32_t i = 0; i < array.Length(); ++i) elements.emplace_back(array.Get(i), path_ + "[" + std::to_string(i) + "]");
  return elements;
}

int64_t Field::Integer(int64_t least, int64_t most) const {
  const std::string expected = "an integer from " + std::to_string(least) + " to " + std::to_string(most);
  if (!value_.IsNumber()) Fail(expected);
  const double number = value_.As<Napi::Number>().DoubleValue();
  if (!(number >= static_cast<double>(least) && number <= static_cast<double>(most)) || number != std::floor(number)) Fail(expected);
  return static_cast<int64_t>(number);
}

double Field::Number() const {
  if (!value_.IsNumber()) Fail("a number");
  return value_.As<Napi::Number>().DoubleValue();
}

std::string Field::Text() const {
  if (!value_.IsString()) Fail("a string");
  return value_.As<Napi::String>().Utf8Value();
}

std::vector<uint32_t> Field::Uint32s() const {
  if (!value_.IsTypedArray() || value_.As<Napi::TypedArray>().TypedArrayType() != napi_uint32_array) Fail("a Uint32Array");
  const Napi::Uint32Array array = value_.As<Napi::Uint32Array>();
  std::vector<uint32_t> values(array.ElementLength());
  if (!values.empty()) std::memcpy(values.data(), array.Data(), values.size() * sizeof(uint32_t));
  return values;
}

size_t Field::OneOf(const std::vector<std::string>& names) const {
  std::string expected = "one of";
  for (const std::string& name : names) expected += " " + name;
  if (!value_.IsString()) Fail(expected);
  const std::string text = value_.As<Napi::String>().Utf8Value();
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == text) return i;
  }
  Fail(expected);
}

Napi::Float32Array Field::Float32s() const {
  if (!value_.IsTypedArray() || value_.As<Napi::TypedArray>().TypedArrayType() != napi_float32_array) Fail("a Float32Array");
  return value_.As<Napi::Float32Array>();
}

Napi::Uint8Array Field::Uint8s() const {
  if (!value_.IsTypedArray() || value_.As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array) Fail("a Uint8Array");
  return value_.As<Napi::Uint8Array>();
}

Napi::Uint16Array Field::Uint16s() const {
  if (!value_.IsTypedArray() || value_.As<Napi::TypedArray>().TypedArrayType() != napi_uint16_array) Fail("a Uint16Array");
  return value_.As<Napi::Uint16Array>();
}

void Field::Fail(const std::string& expected) const {
  std::string seen = "is not ";
  if (value_.IsUndefined()) seen = "is missing, expected ";
  throw Error(ErrorCode::kInvalidArgument, (path_.empty() ? "the argument" : path_) + ": " + seen + expected);
}

SamplingParams SamplingParamsFromJs(const Field& params) {
  SamplingParams result;
  result.temperature = static_cast<float>(params.Get("temperature").Number());
  result.top_k = static_cast<uint32_t>(params.Get("topK").Integer(0, kMostUint32));
  result.top_p = static_cast<float>(params.Get("topP").Number());
  result.banned_tokens = params.Get("bannedTokens").Uint32s();
  result.bias_tokens = params.Get("biasTokens").Uint32s();
  const Napi::Float32Array biases = params.Get("biases").Float32s();
  result.biases.assign(biases.Data(), biases.Data() + biases.ElementLength());
  result.repetition_penalty = static_cast<float>(params.Get("repetitionPenalty").Number());
  result.repeated_tokens = params.Get("repeatedTokens").Uint32s();
  return result;
}

Isa IsaFromJs(const Field& isa) {
  constexpr Isa kIsas[] = {Isa::kAvx512Vnni, Isa::kAvx512, Isa::kAvx2, Isa::kNeon, Isa::kGeneric};
  return kIsas[isa.OneOf({"avx512vnni", "avx512", "avx2", "neon", "generic"})];
}

EngineOptions EngineOptionsFromJs(Napi::Value value) {
  constexpr int64_t kMostInt = std::numeric_limits<int32_t>::max();
  const Field options(value, "");
  EngineOptions result;
  const Field model = options.Get("model");
  result.model.num_layers = model.Get("numLayers").Integer(1, kMostInt);
  result.model.hidden_size = model.Get("hiddenSize").Integer(1, kMostInt);
  result.model.num_attention_heads = model.Get("numAttentionHeads").Integer(1, kMostInt);
  result.model.inner_hidden_size = model.Get("innerHiddenSize").Integer(1, kMostInt);
  result.model.vocab_size = model.Get("vocabSize").Integer(1, kMostInt);
  result.model.max_sequence_length = model.Get("maxSequenceLength").Integer(1, kMostInt);
  result.model.layernorm_epsilon = static_cast<float>(model.Get("layernormEpsilon").Number());
  result.model.rotary_base = model.Get("rotaryBase").Number();
  constexpr RotaryPrecision kPrecisions[] = {RotaryPrecision::kF32, RotaryPrecision::kHalf, RotaryPrecision::kHalfFreq};
  result.model.rotary_precision = kPrecisions[model.Get("rotaryPrecision").OneOf({"fp32", "half", "half_freq"})];
  for (const Field& tensor : options.Get("tensors").Elements()) result.tensors.push_back(TensorFromJs(tensor));
  result.shard.rank = static_cast<int>(options.Get("rank").Integer(0, kMostInt));
  result.shard.world_size = static_cast<int>(options.Get("worldSize").Integer(1, kMostInt));
  result.threads = static_cast<int>(options.Get("threads").Integer(1, kMostInt));
  for (const Field& cpu : options.Get("cpus").Elements()) result.cpus.push_back(static_cast<int>(cpu.Integer(0, kMostInt)));
  const Field isa = options.Get("isa");
  if (!isa.IsNull()) result.isa = IsaFromJs(isa);
  result.device = options.Get("device").OneOf({"cpu", "cuda"}) == 0 ? Device::kCpu : Device::kCuda;
  result.gpu = static_cast<int>(options.Get("gpu").Integer(0, kMostInt));
  result.weights.integer_products = options.Get("activations").OneOf({"int8", "float"}) == 0;
  result.weights.quantize_embedding = options.Get("quantizeEmbedding").OneOf({"none", "int8"}) == 1;
  const Field kv = options.Get("kv");
  result.kv_blocks = kv.Get("numBlocks").Integer(1, kMostInt);
  result.kv_block_size = kv.Get("blockSize").Integer(1, kMostInt);
  constexpr KvType kKvTypes[] = {KvType::kF16, KvType::kF32, KvType::kI8};
  result.kv_type = kKvTypes[kv.Get("dtype").OneOf({"fp16", "fp32", "int8"})];
  result.max_batch_tokens = options.Get("maxBatchTokens").Integer(1, kMostInt);
  const Field communicator = options.Get("communicator");
  if (!communicator.IsNull()) {
    result.communicator = {communicator.Get("name").Text(), communicator.Get("timeoutMs").Integer(1, kMostInt)};
  }
  return result;
}

Step StepFromJs(Napi::Value step_id, Napi::Value body) {
  const uint32_t id = static_cast<uint32_t>(Field(step_id, "stepId").Integer(0, kMostUint32));
  if (!body.IsTypedArray() || body.As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array) Field(body, "body").Fail("a Uint8Array");
  const Napi::Uint8Array bytes = body.As<Napi::Uint8Array>();
  return DecodeStep(id, bytes.Data(), bytes.ElementLength());
}

Napi::Value StepResultToJs(Napi::Env env, const EncodedStepResult& result) {
  Napi::Object object = Napi::Object::New(env);
  const size_t bytes = result.body.size() * sizeof(uint32_t);
  Napi::Uint8Array body = Napi::Uint8Array::New(env, bytes);
  if (bytes > 0) std::memcpy(body.Data(), result.body.data(), bytes);
  object.Set("stepId", Napi::Number::New(env, result.step_id));
  object.Set("body", body);
  object.Set("computeMicros", Napi::Number::New(env, static_cast<double>(result.compute_micros)));
  object.Set("collectiveMicros", Napi::Number::New(env, static_cast<double>(result.collective_micros)));
  object.Set("evaluateMicros", Napi::Number::New(env, static_cast<double>(result.evaluate_micros)));
  return object;
}

Napi::Value ProgressToJs(Napi::Env env, const LoadProgress& progress) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("doneBytes", Napi::Number::New(env, static_cast<double>(progress.done_bytes.load())));
  object.Set("totalBytes", Napi::Number::New(env, static_cast<double>(progress.total_bytes.load())));
  return object;
}

Napi::Value MemoryToJs(Napi::Env env, const EngineMemory& memory) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("weightBytes", Napi::Number::New(env, static_cast<double>(memory.weight_bytes)));
  object.Set("kvBytes", Napi::Number::New(env, static_cast<double>(memory.kv_bytes)));
  object.Set("workspaceBytes", Napi::Number::New(env, static_cast<double>(memory.workspace_bytes)));
  return object;
}

Napi::Value ErrorToJs(Napi::Env env, std::exception_ptr error) {
  try {
    std::rethrow_exception(error);
  } catch (const Napi::Error& thrown) {
    return thrown.Value();
  } catch (const Error& thrown) {
    return CodedError(env, thrown.code(), thrown.what());
  } catch (const std::bad_alloc&) {
    return CodedError(env, ErrorCode::kOutOfMemory, "memory is exhausted");
  } catch (const std::exception& thrown) {
    return CodedError(env, ErrorCode::kInternal, thrown.what());
  } catch (...) {
    return CodedError(env, ErrorCode::kInternal, "an unknown native exception");
  }
}

}  // namespace tandem
