// Functions of floats that a compiler can turn into vector code: no branches, no tables.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "arguments.h"

namespace mindpeft {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float widen(bfloat16 value) { return from_bits(static_cast<uint32_t>(value) << 16); }

// A number of either type.
inline float number(float value) { return value; }
inline float number(bfloat16 value) { return widen(value); }

// To the nearest bfloat16, to the even one half-way; NaN stays NaN.
inline bfloat16 narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return static_cast<bfloat16>(value != value ? (bits >> 16) | 0x40 : rounded);
}

// e^x within 2 units in the last place; 0, infinity and NaN where they belong.
inline float exponential(float x) {
  x = x < -104.0f ? -104.0f : x;  // comparisons that let NaN pass
  x = x > 89.0f ? 89.0f : x;
  const float whole = std::nearbyint(x * 1.44269504f);
  float rest = x - whole * 0.693359375f;  // ln 2 in two pieces
  rest = rest - whole * -2.12194440e-4f;
  // Taylor's series about 0, for |rest| < 0.35
  float sum = 1.0f / 5040.0f;
  sum = sum * rest + 1.0f / 720.0f;
  sum = sum * rest + 1.0f / 120.0f;
  sum = sum * rest + 1.0f / 24.0f;
  sum = sum * rest + 1.0f / 6.0f;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  // The power of two in two factors: one alone could overflow where the product does not.
  const int32_t power = static_cast<int32_t>(whole == whole ? whole : 0.0f);
  const int32_t half = power >> 1;
  return sum * from_bits(static_cast<uint32_t>(half + 127) << 23) *
         from_bits(static_cast<uint32_t>(power - half + 127) << 23);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Near 0, where the difference would leave few digits, an odd polynomial (Cephes, Moshier 1984).
inline float hyperbolic_tangent(float x) {
  const float t = x * x;
  float sum = -5.70498872745e-3f;
  sum = sum * t + 2.06390887954e-2f;
  sum = sum * t - 5.37397155531e-2f;
  sum = sum * t + 1.33314422036e-1f;
  sum = sum * t - 3.33332819422e-1f;
  const float near = x + x * t * sum, far = 2.0f * sigmoid(2.0f * x) - 1.0f;
  return t < 0.390625f ? near : far;
}

// The error function within 4e-7: an odd rational function fitted on |x| < 3.92, beyond which it is 1.
inline float error_function(float x) {
  float bounded = x < -3.92f ? -3.92f : x;
  bounded = bounded > 3.92f ? 3.92f : bounded;
  const float t = bounded * bounded;
  float above = 2.034733824984869e-06f;
  above = above * t + 0.0002874791098292917f;
  above = above * t + 0.00386832351796329f;
  above = above * t + 0.05306047201156616f;
  above = above * t + 0.19276398420333862f;
  above = above * t + 1.128378987312317f;
  float below = 3.8070611481089145e-05f;
  below = below * t + 0.0011881138198077679f;
  below = below * t + 0.015172289684414864f;
  below = below * t + 0.11508458852767944f;
  below = below * t + 0.5041642785072327f;
  below = below * t + 1.0f;
  return bounded * above / below;
}

}  // namespace mindpeft
