// Products with the sum of a weight and a delta weight, both (out, in). The delta is dense, or sparse: a few numbers
// and their rows and columns. Each kernel makes the sum anew, in memory that it gives back, so that no sum lives from
// the forward pass to the backward pass.
#include <algorithm>

#include "buffers.h"
#include "elementwise.h"
#include "gemm.h"
#include "rows.h"
#include "threads.h"

namespace {

using mindpeft::Matrix;
using mindpeft::multiply_in_parallel;

// Up to so many rows, a product with a dense delta costs less than the sum, which goes through three matrices.
constexpr int64_t kFewRows = 32;
// Rows that are transposed together, so that a column's numbers lie side by side.
constexpr int64_t kTogether = 64;
// A product makes so many entries in the time that one takes by itself.
constexpr int64_t kDenseSpeed = 12;

struct Size {
  int64_t out, in;
  int64_t count() const { return out * in; }
};

// c (rows, out) = a (rows, in) matrix^T + keep c; back: c (rows, in) = a (rows, out) matrix + keep c
void multiply_by(const float* matrix, Size size, int64_t rows, bool back, const float* a, float keep, float* c) {
  const int64_t from = back ? size.out : size.in, to = back ? size.in : size.out;
  multiply_in_parallel(rows, to, from, 1.0f, Matrix(a, from), Matrix(matrix, size.in, !back), keep, c, to);
}

struct DenseDelta {
  const float* values;
  Size size;

  DenseDelta(const mindpeft::Arguments& arguments, int first)
      : values(arguments.at(first)), size{arguments.axis(first, 0), arguments.axis(first, 1)} {}

  bool wants_sum(int64_t rows) const { return rows > kFewRows; }

  void add(const float* weight, float* sum) const {
    mindpeft::each(size.count(), sum, [](float number, float change) { return number + change; }, weight, values);
  }

  void multiply_add(int64_t rows, bool back, const float* a, float* c) const {
    multiply_by(values, size, rows, back, a, 1.0f, c);
  }
};

struct SparseDelta {
  const float* values;
  const int32_t *rows_of, *columns_of;
  int64_t count;
  Size size;

  // Its numbers are tensor `first`, its places the next one; the weight is tensor 1.
  SparseDelta(const mindpeft::Arguments& arguments, int first)
      : values(arguments.at(first)), rows_of(arguments.at<int32_t>(first + 1)),
        columns_of(rows_of + arguments.size(first)), count(arguments.size(first)), size{arguments.axis(1, 0), arguments.axis(1, 1)} {}

  bool wants_sum(int64_t rows) const { return rows * count > size.count(); }

  void add(const float* weight, float* sum) const {
    mindpeft::each(size.count(), sum, [](float number) { return number; }, weight);
    for (int64_t i = 0; i < count; ++i) sum[rows_of[i] * size.in + columns_of[i]] += values[i];
  }

  void multiply_add(int64_t rows, bool back, const float* a, float* c) const {
    const int32_t *from = back ? rows_of : columns_of, *to = back ? columns_of : rows_of;
    const int64_t wide = back ? size.out : size.in, result = back ? size.in : size.out;
    mindpeft::in_parallel(rows, mindpeft::least_rows(count), [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t i = 0; i < count; ++i) c[row * result + to[i]] += values[i] * a[row * wide + from[i]];
      }
    });
  }
};

// The same as `multiply_by` with weight + delta for the matrix.
template <typename Delta>
void multiply_by_sum(const float* weight, const Delta& delta, int64_t rows, bool back, const float* a, float keep,
                     float* c) {
  if (!delta.wants_sum(rows)) {
    multiply_by(weight, delta.size, rows, back, a, keep, c);
    delta.multiply_add(rows, back, a, c);
    return;
  }
  const mindpeft::Shared sum(delta.size.count());
  delta.add(weight, sum.data());
  multiply_by(sum.data(), delta.size, rows, back, a, keep, c);
}

// x, weight, the delta's tensors, perhaps a bias -> y
template <typename Delta>
void forward(const mindpeft::Arguments& arguments, bool has_bias) {
  const Delta delta(arguments, 2);
  const int last = arguments.count() - 1;
  float* y = arguments.at(last);
  if (has_bias) mindpeft::fill_rows(arguments.at(last - 1), arguments.rows(0), delta.size.out, y);
  multiply_by_sum(arguments.at(1), delta, arguments.rows(0), false, arguments.at(0), has_bias ? 1.0f : 0.0f, y);
}

// dy, weight, the delta's tensors -> dx
template <typename Delta>
void backward(const mindpeft::Arguments& arguments) {
  multiply_by_sum(arguments.at(1), Delta(arguments, 2), arguments.rows(0), true, arguments.at(0), 0.0f,
                  arguments.at(arguments.count() - 1));
}

// x (count, width) -> result (width, kTogether), zeros behind the last row
void transpose(const float* x, int64_t count, int64_t width, float* result) {
  for (int64_t column = 0; column < width; ++column) {
    float* mine = result + column * kTogether;
    for (int64_t row = 0; row < count; ++row) mine[row] = x[row * width + column];
    std::fill(mine + count, mine + kTogether, 0.0f);
  }
}

float dot(const float* a, const float* b) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < kTogether; ++i) sum += a[i] * b[i];
  return sum;
}

// Some entries of dy^T x, by themselves.
void sampled_product(const mindpeft::Arguments& arguments, const int32_t* places, int64_t count, float* result) {
  const float *x = arguments.at(0), *dy = arguments.at(1);
  const int64_t rows = arguments.rows(0), in = arguments.width(0), out = arguments.width(1);
  mindpeft::sum_over_pieces(rows, 4 * kTogether, count, result, [=](int64_t begin, int64_t end, float* sums) {
    float *turned_x = mindpeft::scratch(0, in * kTogether), *turned_dy = mindpeft::scratch(1, out * kTogether);
    for (int64_t row = begin; row < end; row += kTogether) {
      const int64_t together = std::min(kTogether, end - row);
      transpose(x + row * in, together, in, turned_x);
      transpose(dy + row * out, together, out, turned_dy);
      for (int64_t i = 0; i < count; ++i) {
        sums[i] += dot(turned_dy + places[i] * kTogether, turned_x + places[count + i] * kTogether);
      }
    }
  });
}

// The same from the whole product.
void picked_product(const mindpeft::Arguments& arguments, const int32_t* places, int64_t count, float* result) {
  const int64_t rows = arguments.rows(0), in = arguments.width(0), out = arguments.width(1);
  const mindpeft::Shared memory(out * in);
  const float* product = memory.data();
  multiply_in_parallel(out, in, rows, 1.0f, Matrix(arguments.at(1), out, true), Matrix(arguments.at(0), in), 0.0f,
                       memory.data(), in);
  for (int64_t i = 0; i < count; ++i) result[i] = product[places[i] * in + places[count + i]];
}

}  // namespace

// x (..., in), weight (out, in), delta (out, in), perhaps bias (out) -> y (..., out)
MINDPEFT_KERNEL(delta_linear) { forward<DenseDelta>(arguments, false); }
MINDPEFT_KERNEL(delta_linear_bias) { forward<DenseDelta>(arguments, true); }

// dy (..., out), weight, delta -> dx (..., in)
MINDPEFT_KERNEL(delta_linear_grad) { backward<DenseDelta>(arguments); }

// x (..., in), weight (out, in), values (n), rows and columns (2, n) as int32, perhaps bias (out) -> y (..., out)
MINDPEFT_KERNEL(sparse_delta_linear) { forward<SparseDelta>(arguments, false); }
MINDPEFT_KERNEL(sparse_delta_linear_bias) { forward<SparseDelta>(arguments, true); }

// dy (..., out), weight, values, rows and columns -> dx (..., in)
MINDPEFT_KERNEL(sparse_delta_linear_grad) { backward<SparseDelta>(arguments); }

// x (..., in), dy (..., out), rows and columns (2, n) -> dvalues (n)
MINDPEFT_KERNEL(sparse_delta_linear_grad_values) {
  const int64_t count = arguments.axis(2, 1), entries = arguments.width(0) * arguments.width(1);
  const auto product = count * kDenseSpeed > entries ? picked_product : sampled_product;
  product(arguments, arguments.at<int32_t>(2), count, arguments.at(3));
}
