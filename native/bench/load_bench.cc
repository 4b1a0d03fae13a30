// Measures loading a store of random INT4 weights (the shape of bench/synthetic-store.ts, fewer layers) that is in the page cache, against a plain read
// of the same file by as many threads.
// Build and run:  cmake --build native/build --target tandem_load_bench && native/build/tandem_load_bench [threads]
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "model/weights.h"

namespace tandem {
namespace {

double Seconds(const std::function<void()>& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

struct StoreFile {
  explicit StoreFile(const ModelShape& shape) {
    char name[] = "/tmp/tandem-load-bench-XXXXXX";
    const int descriptor = mkstemp(name);
    path = name;
    const int64_t h = shape.hidden_size, f = shape.inner_hidden_size;
    const auto add = [&](const std::string& tensor, TensorType type, std::vector<int64_t> sizes) {
      int64_t bytes = TensorTypeBytes(type);
      for (const int64_t size : sizes) bytes *= size;
      tensors.push_back({tensor, path, this->bytes, type, std::move(sizes)});
      this->bytes += bytes;
    };
    const auto add_linear = [&](const std::string& tensor, int64_t rows, int64_t cols) {
      add(tensor + ".qweight", TensorType::kU8, {rows, cols / 2});
      add(tensor + ".scales", TensorType::kF16, {rows, 2});
      add(tensor + ".bias", TensorType::kF16, {rows});
    };
    const auto add_norm = [&](const std::string& tensor) {
      for (const char* part : {".weight", ".bias"}) add(tensor + part, TensorType::kF16, {h});
    };
    add("transformer.word_embeddings.weight", TensorType::kF16, {shape.vocab_size, h});
    add_norm("transformer.final_layernorm");
    for (int64_t i = 0; i < shape.num_layers; ++i) {
      const std::string layer = "transformer.layers." + std::to_string(i) + ".";
      add_norm(layer + "input_layernorm");
      add_norm(layer + "post_attention_layernorm");
      add_linear(layer + "attention.query_key_value", 3 * h, h);
      add_linear(layer + "attention.dense", h, h);
      add_linear(layer + "mlp.dense_h_to_4h", 2 * f, h);
      add_linear(layer + "mlp.dense_4h_to_h", h, f);
    }
    std::mt19937_64 random(1);
    std::vector<uint64_t> piece(1 << 17);
    for (int64_t done = 0; done < bytes;) {
      for (uint64_t& word : piece) word = random();
      const size_t size = static_cast<size_t>(std::min<int64_t>(bytes - done, static_cast<int64_t>(piece.size() * 8)));
      if (write(descriptor, piece.data(), size) != static_cast<ssize_t>(size)) {
        std::perror("write");
        std::exit(1);
      }
      done += static_cast<int64_t>(size);
    }
    close(descriptor);
  }
  ~StoreFile() { unlink(path.c_str()); }

  std::string path;
  std::vector<TensorSource> tensors;
  int64_t bytes = 0;
};

int Run(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 2;
  ModelShape shape;
  shape.num_layers = 8;
  shape.hidden_size = 4096;
  shape.num_attention_heads = 32;
  shape.inner_hidden_size = 10944;
  shape.vocab_size = 32000;
  shape.max_sequence_length = 2048;
  const StoreFile file(shape);
  ThreadPool pool(threads);
  const std::atomic<bool> cancelled{false};
  const double gigabytes = static_cast<double>(file.bytes) / 1e9;
  for (int round = 0; round < 3; ++round) {
    const double plain = Seconds([&] {
      const int descriptor = open(file.path.c_str(), O_RDONLY);
      constexpr int64_t kPiece = 1 << 18;
      pool.ParallelFor(file.bytes, kPiece, [&](int64_t begin, int64_t end, int) {
        std::vector<char> piece(kPiece);
        for (; begin < end; begin += kPiece) {
          if (pread(descriptor, piece.data(), static_cast<size_t>(std::min(kPiece, end - begin)), begin) < 0) std::perror("pread");
        }
      });
      close(descriptor);
    });
    std::printf("%d threads: %.2f GB read in %.2f s = %.1f GB/s; loaded", threads, gigabytes, plain, gigabytes / plain);
    WeightOptions options;
    for (const bool packed : {false, true}) {
      options.integer_products = packed;
      int64_t bytes = 0;
      const double seconds = Seconds([&] { bytes = LoadWeights(shape, {0, 1}, file.tensors, options, pool, cancelled).bytes(); });
      struct rusage usage;
      getrusage(RUSAGE_SELF, &usage);
      std::printf("%s in %.2f s = %.1f GB/s (%.2f GB of weights, at most %.2f GB resident so far)", packed ? ", packed" : " as they are", seconds,
                  gigabytes / seconds, static_cast<double>(bytes) / 1e9, static_cast<double>(usage.ru_maxrss) * 1024 / 1e9);
    }
    std::printf("\n");
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) { return tandem::Run(argc, argv); }
