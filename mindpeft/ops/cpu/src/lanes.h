// Vectors of numbers, for what a compiler makes too little of: at the end of a loop that sums up, it adds one lane
// after the other.
#pragma once

#include <cstdint>
#include <cstring>

#include "vector_math.h"

namespace mindpeft {

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef uint16_t HalfLanes __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(2)));
typedef uint32_t WordLanes __attribute__((vector_size(kLanes * sizeof(uint32_t))));

inline Lanes load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }

inline Lanes load(const bfloat16* from) {
  const HalfLanes halves = *reinterpret_cast<const HalfLanes*>(from);
  return reinterpret_cast<Lanes>(__builtin_convertvector(halves, WordLanes) << 16);
}

inline float total(Lanes lanes) {
  typedef float Half __attribute__((vector_size(kLanes * 2)));
  typedef float Quarter __attribute__((vector_size(kLanes)));
  Half halves[2];
  std::memcpy(halves, &lanes, sizeof(lanes));
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof(half));
  const Quarter sums = quarters[0] + quarters[1];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// The sum over i of term(i, load), for a term that takes what `load` makes of an address: vectors, or one number.
template <typename Term>
inline float sum_of(int64_t count, const Term& term) {
  Lanes sums = {}, others = {};  // two, for a sum waits for the one before
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    sums += term(i, [](const auto* from) { return load(from); });
    others += term(i + kLanes, [](const auto* from) { return load(from); });
  }
  for (; i + kLanes <= count; i += kLanes) sums += term(i, [](const auto* from) { return load(from); });
  float sum = total(sums + others);
  for (; i < count; ++i) sum += term(i, [](const auto* from) { return number(*from); });
  return sum;
}

inline float sum(const float* x, int64_t count) {
  return sum_of(count, [=](int64_t i, auto load) { return load(x + i); });
}

inline float dot(const float* a, const float* b, int64_t count) {
  return sum_of(count, [=](int64_t i, auto load) { return load(a + i) * load(b + i); });
}

}  // namespace mindpeft
