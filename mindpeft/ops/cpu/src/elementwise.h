// Kernels that work on each number by itself.
#pragma once

#include "arguments.h"
#include "threads.h"
#include "vector_math.h"

namespace mindpeft {

constexpr int64_t kLeastNumbers = 16384;  // fewer are not worth another thread

// out[i] = function(a[i], ...) for all elements.
template <typename Output, typename Function, typename... Inputs>
void each(int64_t count, Output* out, const Function& function, const Inputs*... inputs) {
  in_parallel(count, kLeastNumbers, [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) out[i] = function(inputs[i]...);
  });
}

// What the backward pass will need, at half its size.
inline void keep(int64_t count, const float* x, bfloat16* kept) {
  each(count, kept, [](float value) { return narrow(value); }, x);
}
inline void restore(int64_t count, const bfloat16* kept, float* x) {
  each(count, x, [](bfloat16 value) { return widen(value); }, kept);
}

}  // namespace mindpeft
