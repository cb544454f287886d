// The mean cross-entropy of hidden weight^T, some rows at a time, and the gradient of hidden with it.
#include <algorithm>
#include <cmath>
#include <vector>

#include "buffers.h"
#include "gemm.h"
#include "threads.h"
#include "vector_math.h"

namespace {

constexpr int64_t kMostLogits = int64_t{1} << 25;  // floats: 128 MB

// Logits of one row become softmax - one at the label, times share; returns the loss.
float to_gradient(float* logits, int64_t count, int32_t label, float share) {
  float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) most = logits[i] > most ? logits[i] : most;
  const float wanted = logits[label];
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    logits[i] = mindpeft::exponential(logits[i] - most);
    sum += logits[i];
  }
  const float factor = share / sum;
  for (int64_t i = 0; i < count; ++i) logits[i] *= factor;
  logits[label] -= share;
  return std::log(sum) + most - wanted;
}

// The rows whose labels count, some at a time.
class Counted {
 public:
  explicit Counted(const mindpeft::Arguments& arguments)
      : width_(arguments.width(0)), vocabulary_(arguments.axis(1, 0)), hidden_(arguments.at(0)),
        labels_(arguments.at<int32_t>(2)), weight_(arguments.at<void>(1)), bfloat_(arguments.is_bfloat16(1)) {
    for (int64_t row = 0; row < arguments.rows(0); ++row) {
      if (labels_[row] >= 0 && labels_[row] < vocabulary_) places_.push_back(row);
      unknown_ |= labels_[row] >= vocabulary_;
    }
    const int64_t most = std::clamp<int64_t>(kMostLogits / std::max<int64_t>(vocabulary_, 1), 16, 256);
    at_once_ = std::min<int64_t>(most, places_.size());
  }

  int64_t at_once() const { return at_once_; }
  int64_t place(int64_t number) const { return places_[number]; }
  mindpeft::Matrix weight(bool transposed) const { return {weight_, width_, transposed, bfloat_}; }

  // Calls visit(first, count, rows, gradients of their logits) for all; returns the mean loss.
  template <typename Visit>
  float visit(const Visit& visit) const {
    const int64_t all = places_.size();
    const mindpeft::Shared logit_memory(at_once_ * vocabulary_), row_memory(at_once_ * width_);
    float *logits = logit_memory.data(), *rows = row_memory.data();
    std::vector<float> losses(all);
    for (int64_t first = 0; first < all; first += at_once_) {
      const int64_t count = std::min(at_once_, all - first);
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(hidden_ + places_[first + i] * width_, width_, rows + i * width_);
      }
      mindpeft::multiply_in_parallel(count, vocabulary_, width_, 1.0f, mindpeft::Matrix(rows, width_),
                                     weight(true), 0.0f, logits, vocabulary_);
      mindpeft::in_parallel(count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int32_t label = labels_[places_[first + i]];
          losses[first + i] = to_gradient(logits + i * vocabulary_, vocabulary_, label, 1.0f / all);
        }
      });
      visit(first, count, rows, logits);
    }
    double sum = 0;
    for (const float value : losses) sum += value;
    return unknown_ ? NAN : all == 0 ? 0.0f : static_cast<float>(sum / all);
  }

 private:
  int64_t width_, vocabulary_, at_once_;
  const float* hidden_;
  const int32_t* labels_;
  void* weight_;
  bool bfloat_, unknown_ = false;  // a label beyond the vocabulary: the loss is not a number
  std::vector<int64_t> places_;
};

}  // namespace

// hidden (rows, width), weight (vocabulary, width), labels (rows) int32 -> loss (1), dhidden (rows, width). Rows
// whose label is negative count for nothing, and nothing is computed for them.
MINDPEFT_KERNEL(projected_cross_entropy) {
  const Counted counted(arguments);
  const int64_t width = arguments.width(0), vocabulary = arguments.axis(1, 0);
  float* dhidden = arguments.at(4);
  std::fill(dhidden, dhidden + arguments.size(0), 0.0f);
  const mindpeft::Shared memory(counted.at_once() * width);
  float* out = memory.data();
  *arguments.at(3) = counted.visit([&](int64_t first, int64_t count, const float*, const float* dlogits) {
    mindpeft::multiply_in_parallel(count, width, vocabulary, 1.0f, mindpeft::Matrix(dlogits, vocabulary),
                                   counted.weight(false), 0.0f, out, width);
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(out + i * width, width, dhidden + counted.place(first + i) * width);
    }
  });
}

// hidden, weight, labels -> dweight (vocabulary, width)
MINDPEFT_KERNEL(projected_cross_entropy_grad_weight) {
  const Counted counted(arguments);
  const int64_t width = arguments.width(0), vocabulary = arguments.axis(1, 0);
  float* dweight = arguments.at(3);
  std::fill(dweight, dweight + vocabulary * width, 0.0f);
  counted.visit([&](int64_t, int64_t count, const float* rows, const float* dlogits) {
    mindpeft::multiply_in_parallel(vocabulary, width, count, 1.0f, mindpeft::Matrix(dlogits, vocabulary, true),
                                   mindpeft::Matrix(rows, width), 1.0f, dweight, width);
  });
}
