#!/usr/bin/env bash
# Measures the CUDA backend on GPU 0: each kernel family at GLM-130B's shapes, then whole models with random weights made on the card.
# bench-gpu.sh [matrix rate in TFLOP/s]: what a library's fp16 product reaches on this card, where that was measured
set -euo pipefail
cd "$(dirname "$0")/../native/build"
benches=(linear_bench attention_bench small_kernels_bench model_bench)
for bench in "${benches[@]}"; do cmake --build . --target "tandem_gpu_$bench"; done
nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm --format=csv,noheader
for bench in "${benches[@]::3}"; do "./tandem_gpu_$bench"; done
for weights in int4 int8; do ./tandem_gpu_model_bench "$weights" 70 "${1:-0}"; done
./tandem_gpu_model_bench fp16 20 "${1:-0}" # all 70 layers take 260 GB
