// Matrix products, row by row in memory.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace mindpeft {

// A matrix, or its transpose, in floats or bfloat16s.
struct Matrix {
  const void* data;
  int64_t stride;  // elements from one row in memory to the next
  bool transposed = false;
  bool bfloat = false;

  Matrix(const float* floats, int64_t stride, bool transposed = false)
      : data(floats), stride(stride), transposed(transposed) {}
  Matrix(const void* data, int64_t stride, bool transposed, bool bfloat)
      : data(data), stride(stride), transposed(transposed), bfloat(bfloat) {}

  // Part of it as it is multiplied, from a row and a column on.
  Matrix from(int64_t row, int64_t column) const {
    const int64_t place = transposed ? column * stride + row : row * stride + column;
    const int64_t bytes = place * (bfloat ? sizeof(bfloat16) : sizeof(float));
    return Matrix(static_cast<const char*>(data) + bytes, stride, transposed, bfloat);
  }
};

// The oneDNN that MindSpore has loaded, or null: version 3 in MindSpore 2.10, version 2 in 2.7.
void* products_library();

// c (m, n) = scale a (m, k) b (k, n) + keep c, for floats, on this thread alone.
void multiply(int64_t m, int64_t n, int64_t k, float scale, Matrix a, Matrix b, float keep, float* c,
              int64_t stride);

// The same on all threads. b may hold bfloat16s: where products of those are fast, a is rounded to them. Few rows
// and a transposed b (as in a step that writes one token) are read at the speed of the memory.
void multiply_in_parallel(int64_t m, int64_t n, int64_t k, float scale, Matrix a, Matrix b, float keep,
                          float* c, int64_t stride);

}  // namespace mindpeft

// Whether MindSpore's library of products was found, and has fast ones of bfloat16s.
extern "C" int has_fast_products();
extern "C" int has_fast_bfloat16_products();
// Whether the processor has matrix units (AMX) that this process may use.
extern "C" int has_matrix_units();
