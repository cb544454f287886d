// Products with a Kronecker product of two small matrices, left (p, m) and right (k, n), which is never made: a row x
// of m n numbers, laid out as X (m, n), becomes left X right^T (p, k).
#include <algorithm>

#include "buffers.h"
#include "gemm.h"
#include "rows.h"
#include "threads.h"

namespace {

using mindpeft::Matrix;
using mindpeft::multiply;

constexpr int64_t kNumbers = 32768;  // of the rows that are worked on together: they stay in a core's cache
constexpr int64_t kLeastRows = 8;    // fewer are not worth another thread

// Both matrices, as they lie or transposed; rows go from m n numbers to p k.
struct Kron {
  Matrix left, right;
  int64_t p, m, k, n;

  Kron(const mindpeft::Arguments& arguments, bool back)
      : left(arguments.at(1), arguments.axis(1, 1), back), right(arguments.at(2), arguments.axis(2, 1), !back),
        p(arguments.axis(1, back)), m(arguments.axis(1, !back)), k(arguments.axis(2, back)),
        n(arguments.axis(2, !back)) {}

  int64_t in() const { return m * n; }
  int64_t out() const { return p * k; }
  int64_t middle() const { return m * k; }

  // So many rows are worked on together.
  int64_t rows() const { return std::max<int64_t>(1, kNumbers / std::max({in(), out(), middle(), int64_t{1}})); }

  // apart (m, count n) -> result (m, count k): X right^T
  void by_right(int64_t count, const float* apart, float* result) const {
    multiply(m * count, k, n, 1.0f, Matrix(apart, n), right, 0.0f, result, k);
  }

  // middle (m, count k) -> result (p, count k): left X
  void by_left(int64_t count, const float* middle, float* result) const {
    multiply(p, count * k, m, 1.0f, left, Matrix(middle, count * k), 0.0f, result, count * k);
  }
};

// x (count, blocks, width) -> result (blocks, count, width); the same brings it back.
void exchange(const float* x, int64_t count, int64_t blocks, int64_t width, float* result) {
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t block = 0; block < blocks; ++block) {
      const float* from = x + (row * blocks + block) * width;
      std::copy(from, from + width, result + (block * count + row) * width);
    }
  }
}

// x (..., m n), left, right -> y (..., p k); back: y, left, right -> x
void kron_product(const mindpeft::Arguments& arguments, bool back) {
  const Kron kron(arguments, back);
  const float* x = arguments.at(0);
  float* y = arguments.at(3);
  mindpeft::in_parallel(arguments.rows(0), kLeastRows, [&](int64_t begin, int64_t end) {
    const int64_t most = std::min(kron.rows(), end - begin);
    float *apart = mindpeft::scratch(0, most * std::max(kron.in(), kron.out()));
    float *middle = mindpeft::scratch(1, most * kron.middle());
    for (int64_t row = begin; row < end; row += most) {
      const int64_t count = std::min(most, end - row);
      exchange(x + row * kron.in(), count, kron.m, kron.n, apart);
      kron.by_right(count, apart, middle);
      kron.by_left(count, middle, apart);
      exchange(apart, kron.p, count, kron.k, y + row * kron.out());
    }
  });
}

// The shares of some rows of dleft and dright, added: x (count, m n), dy (count, p k).
void add_gradients(const Kron& kron, const float* x, const float* dy, int64_t count, float* dleft, float* dright) {
  const int64_t wide = count * kron.k;
  float *apart = mindpeft::scratch(0, count * kron.in()), *middle = mindpeft::scratch(1, count * kron.middle());
  float* dapart = mindpeft::scratch(2, count * kron.out());
  exchange(x, count, kron.m, kron.n, apart);
  exchange(dy, count, kron.p, kron.k, dapart);
  kron.by_right(count, apart, middle);
  multiply(kron.p, kron.m, wide, 1.0f, Matrix(dapart, wide), Matrix(middle, wide, true), 1.0f, dleft, kron.m);
  const Matrix turned(kron.left.data, kron.left.stride, true, false);
  multiply(kron.m, wide, kron.p, 1.0f, turned, Matrix(dapart, wide), 0.0f, middle, wide);
  multiply(kron.k, kron.n, kron.m * count, 1.0f, Matrix(middle, kron.k, true), Matrix(apart, kron.n), 1.0f, dright,
           kron.n);
}

// x, left, right, dy -> dleft, dright
void kron_gradients(const mindpeft::Arguments& arguments) {
  const Kron kron(arguments, false);
  const int64_t left = kron.p * kron.m, right = kron.k * kron.n;
  const float *x = arguments.at(0), *dy = arguments.at(3);
  const mindpeft::Shared both(left + right);
  mindpeft::sum_over_pieces(
      arguments.rows(0), kLeastRows, left + right, both.data(), [&](int64_t begin, int64_t end, float* sums) {
        for (int64_t row = begin; row < end; row += kron.rows()) {
          const int64_t count = std::min(kron.rows(), end - row);
          add_gradients(kron, x + row * kron.in(), dy + row * kron.out(), count, sums, sums + left);
        }
      });
  std::copy(both.data(), both.data() + left, arguments.at(4));
  std::copy(both.data() + left, both.data() + left + right, arguments.at(5));
}

}  // namespace

// x (..., m n), left (p, m), right (k, n) -> y (..., p k)
MINDPEFT_KERNEL(kron_linear) { kron_product(arguments, false); }

// dy (..., p k), left, right -> dx (..., m n)
MINDPEFT_KERNEL(kron_linear_grad) { kron_product(arguments, true); }

// x, left, right, dy -> dleft, dright
MINDPEFT_KERNEL(kron_linear_grad_pair) { kron_gradients(arguments); }
