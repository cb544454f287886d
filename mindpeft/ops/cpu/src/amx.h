// Products on the matrix units of x86 processors (AMX), which know bfloat16s alone.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace mindpeft::amx {

constexpr int64_t kPanel = 32;  // rows of a, or columns of b, that are multiplied together

// Whether the processor has them, the system lets this process use them, and the compiler knew them.
bool available();

// Whether a product is to be made on them: it is large enough, and b holds bfloat16s. Products of floats gain half
// where a core's units are free, but lose where they are shared with other work, as in a virtual machine; they are
// made here only if the environment says MINDPEFT_AMX=float32.
bool worthwhile(int64_t m, int64_t n, int64_t k, bool bfloat);

// c (m, n) = scale a (m, k) b (k, n) + keep c on this thread alone, for a of floats. Where b holds bfloat16s, a is
// rounded to them. Where b holds floats, all numbers are split into three bfloat16s, which hold every bit; of the
// nine products of parts the three smallest, below 2^-21 of the whole, are left out.
void multiply(int64_t m, int64_t n, int64_t k, float scale, Matrix a, Matrix b, float keep, float* c,
              int64_t stride);

// The same on all threads for 3 to 16 rows of floats and the transpose of a weight of bfloat16s, which is read once,
// at the speed of the memory; the rows are split into two parts, so 16 of their bits count. Returns whether it was
// done: it is not where the sizes do not fit, or a number is not finite.
bool few_rows(int64_t m, int64_t n, int64_t k, float scale, const Matrix& a, const Matrix& b, float keep, float* c,
              int64_t stride);

}  // namespace mindpeft::amx
