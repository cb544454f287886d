// Kernels that work on each number by itself.
#pragma once

#include "arguments.h"
#include "threads.h"

namespace mindpeft {

constexpr int64_t kLeastNumbers = 16384;  // fewer are not worth another thread

// out[i] = function(a[i], ...) for all elements.
template <typename Function, typename... Inputs>
void each(int64_t count, float* out, const Function& function, const Inputs*... inputs) {
  in_parallel(count, kLeastNumbers, [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) out[i] = function(inputs[i]...);
  });
}

}  // namespace mindpeft
