#!/usr/bin/env bash
# Build the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and run all of them over many shapes.
# $CXX is the compiler (g++), $PYTHON a Python with numpy (python3); arguments are those of tests.ops.cpu.sweep.
# SANITIZE=thread looks for races instead. $MARCH is the x86 level (x86-64-v3); x86-64-v4 also covers products on
# matrix units, where the processor has them, and with MINDPEFT_AMX=float32 those of floats.
set -euo pipefail
cd "$(dirname "$0")/.."
compiler=${CXX:-g++}
python=${PYTHON:-python3}
checks=${SANITIZE:-address,undefined}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

flags=(-std=c++17 -g -O1 -fPIC -shared -fopenmp-simd -fno-omit-frame-pointer -Wall -Wextra -Wno-psabi)
[ "$(uname -m)" = x86_64 ] && flags+=("-march=${MARCH:-x86-64-v3}")
"$compiler" "${flags[@]}" "-fsanitize=$checks" -fno-sanitize-recover=undefined -o "$folder/kernels.so" \
    mindpeft/ops/cpu/src/*.cpp

# Python itself is not built with the sanitizer, whose library must then come first.
preload=
for library in lib${checks%%,*}.so libstdc++.so; do
    library=${library/libaddress/libasan}
    preload+=" $("$compiler" -print-file-name="${library/libthread/libtsan}")"
done
# A Python interpreter leaves memory to the end of its process.
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:die_after_fork=0
for threads in 1 4; do
    LD_PRELOAD=$preload MINDPEFT_NUM_THREADS=$threads OPENBLAS_NUM_THREADS=1 \
        "$python" -m tests.ops.cpu.sweep "$folder/kernels.so" --count 40 "$@"
done
echo "clean"
