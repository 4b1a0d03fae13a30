#include "model/step_codec.h"

#include <cstring>
#include <string>
#include <variant>

#include "core/error.h"

namespace tandem {
namespace {

static_assert(sizeof(float) == 4, "floats travel as 32-bit words");

enum Kind : uint32_t { kNone, kSample, kCandidates, kTargets, kLogits, kError };

class Reader {
 public:
  Reader(const uint8_t* bytes, size_t size) : words_(size / 4) {
    if (size % 4 != 0) Fail("of " + std::to_string(size) + " bytes, which are no whole words");
    if (size > 0) std::memcpy(words_.data(), bytes, size);
  }

  uint32_t Word() {
    if (at_ == words_.size()) FailTooShort();
    return words_[at_++];
  }

  float Float() {
    const uint32_t word = Word();
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }

  // A number of things, each of at least one word.
  size_t Count() {
    const uint32_t count = Word();
    if (count > words_.size() - at_) FailTooShort();
    return count;
  }

  std::vector<uint32_t> Words() {
    const size_t count = Count();
    at_ += count;
    return {words_.begin() + static_cast<std::ptrdiff_t>(at_ - count), words_.begin() + static_cast<std::ptrdiff_t>(at_)};
  }

  std::vector<float> Floats() {
    std::vector<float> values(Count());
    if (!values.empty()) std::memcpy(values.data(), words_.data() + at_, values.size() * sizeof(float));
    at_ += values.size();
    return values;
  }

  NoiseKey Noise() {
    NoiseKey key;
    key.seed = Word();
    key.seed |= static_cast<uint64_t>(Word()) << 32;
    key.stream = Word();
    key.position = Word();
    return key;
  }

  SamplingParams Params() {
    SamplingParams params;
    params.temperature = Float();
    params.top_k = Word();
    params.top_p = Float();
    params.banned_tokens = Words();
    params.bias_tokens = Words();
    params.biases = Floats();
    params.repetition_penalty = Float();
    params.repeated_tokens = Words();
    return params;
  }

  tandem::Want Want() {
    switch (Word()) {
      case kNone: return WantNothing{};
      case kSample: {
        WantSample sample;
        sample.params = Params();
        sample.noise = Noise();
        sample.top_logprobs = Word();
        return sample;
      }
      case kCandidates: {
        WantCandidates candidates;
        candidates.count = Word();
        candidates.banned_tokens = Words();
        if (Word() != 0) candidates.noise = Noise();
        return candidates;
      }
      case kTargets: return WantTargets{Words()};
      case kLogits: return WantLogits{Word()};
      default: Fail("with an unknown kind in word " + std::to_string(at_ - 1));
    }
  }

  tandem::Extend Extend() {
    tandem::Extend extend;
    extend.cached_tokens = Word();
    extend.bidirectional_tokens = Word();
    extend.first_layer = Word();
    extend.end_layer = Word();
    const uint32_t sampled_by = Word();  // counted from 1
    if (sampled_by > 0) extend.sampled_by = sampled_by - 1;
    extend.tokens = Words();
    extend.positions = Words();
    extend.block_table = Words();
    extend.want = Want();
    return extend;
  }

  void End() const {
    if (at_ != words_.size()) Fail("with " + std::to_string(words_.size() - at_) + " words left over");
  }

 private:
  [[noreturn]] static void Fail(const std::string& how) { throw Error(ErrorCode::kInternal, "a step body " + how); }
  [[noreturn]] void FailTooShort() const { Fail("of " + std::to_string(words_.size()) + " words ends too early"); }

  std::vector<uint32_t> words_;
  size_t at_ = 0;
};

class Writer {
 public:
  void Word(uint32_t value) { words.push_back(value); }

  void Float(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    Word(word);
  }

  void Words(const std::vector<uint32_t>& values) {
    Word(static_cast<uint32_t>(values.size()));
    words.insert(words.end(), values.begin(), values.end());
  }

  void Floats(const std::vector<float>& values) {
    Word(static_cast<uint32_t>(values.size()));
    Bytes(values.data(), values.size() * sizeof(float));
  }

  void Text(const std::string& text) {
    Word(static_cast<uint32_t>(text.size()));
    Bytes(text.data(), text.size());
  }

  std::vector<uint32_t> words;

 private:
  void Bytes(const void* bytes, size_t size) {
    const size_t at = words.size();
    words.resize(at + (size + 3) / 4);
    if (size > 0) std::memcpy(words.data() + at, bytes, size);
  }
};

void Write(const ExtendResult& result, Writer& out) {
  if (const auto* sample = std::get_if<SampleResult>(&result)) {
    out.Word(kSample);
    out.Word(sample->token);
    out.Float(sample->logprob);
    out.Words(sample->top_tokens);
    out.Floats(sample->top_logprobs);
  } else if (const auto* candidates = std::get_if<Candidates>(&result)) {
    out.Word(kCandidates);
    out.Words(candidates->tokens);
    out.Floats(candidates->logprobs);
    out.Floats(candidates->keys);
  } else if (const auto* targets = std::get_if<TargetsResult>(&result)) {
    out.Word(kTargets);
    out.Floats(targets->logprobs);
  } else if (const auto* logits = std::get_if<LogitsResult>(&result)) {
    out.Word(kLogits);
    out.Floats(logits->logits);
  } else if (const auto* error = std::get_if<ErrorResult>(&result)) {
    out.Word(kError);
    out.Text(error->message);
  } else {
    out.Word(kNone);
  }
}

}  // namespace

Step DecodeStep(uint32_t step_id, const uint8_t* bytes, size_t size) {
  Reader from(bytes, size);
  Step step;
  step.step_id = step_id;
  step.block_copies = from.Words();
  const size_t count = from.Count();
  step.extends.reserve(count);
  for (size_t i = 0; i < count; ++i) step.extends.push_back(from.Extend());
  from.End();
  return step;
}

std::vector<uint32_t> EncodeResults(const std::vector<ExtendResult>& results) {
  Writer out;
  out.Word(static_cast<uint32_t>(results.size()));
  for (const ExtendResult& result : results) Write(result, out);
  return std::move(out.words);
}

}  // namespace tandem
