// Rows of a table, looked up by number.
#include <algorithm>
#include <cmath>

#include "arguments.h"
#include "threads.h"
#include "vector_math.h"

namespace {

constexpr int64_t kLeastNumbers = 16384;  // fewer are not worth another thread

template <typename Weight, typename Convert>
void look_up(const mindpeft::Arguments& arguments, const Convert& convert) {
  const auto* ids = arguments.at<int32_t>(0);
  const auto* weight = arguments.at<Weight>(1);
  float* rows = arguments.at(2);
  const int64_t vocabulary = arguments.axis(1, 0), width = arguments.axis(1, 1);
  mindpeft::in_parallel(arguments.size(0), kLeastNumbers / (width + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* row = rows + i * width;
      if (ids[i] < 0 || ids[i] >= vocabulary) {
        std::fill_n(row, width, NAN);
      } else {
        std::transform(weight + ids[i] * width, weight + (ids[i] + 1) * width, row, convert);
      }
    }
  });
}

}  // namespace

// ids (...) int32, weight (vocabulary, width) -> rows (..., width); NaN for an id that the table does not have
MINDPEFT_LOOKUP_KERNEL(embedding, 1) {
  if (arguments.is_bfloat16(1)) {
    look_up<mindpeft::bfloat16>(arguments, [](mindpeft::bfloat16 value) { return mindpeft::widen(value); });
  } else {
    look_up<float>(arguments, [](float value) { return value; });
  }
}

// ids, weight (for its shape alone), dy (..., width) -> dweight (vocabulary, width)
MINDPEFT_LOOKUP_KERNEL(embedding_grad, 1) {
  const auto* ids = arguments.at<int32_t>(0);
  const float* dy = arguments.at(2);
  float* dweight = arguments.at(3);
  const int64_t count = arguments.size(0), vocabulary = arguments.axis(1, 0), width = arguments.axis(1, 1);
  mindpeft::in_parallel(vocabulary, kLeastNumbers / (width + 1) + 1, [=](int64_t begin, int64_t end) {
    std::fill(dweight + begin * width, dweight + end * width, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
      if (ids[i] < begin || ids[i] >= end) continue;
      float* row = dweight + ids[i] * width;
      for (int64_t j = 0; j < width; ++j) row[j] += dy[i * width + j];
    }
  });
}
