// What the passes of attention share: the sizes of a call, and the scores of one block.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "buffers.h"
#include "gemm.h"
#include "mask.h"
#include "noise.h"
#include "threads.h"
#include "vector_math.h"

namespace mindpeft {

constexpr int64_t kQueries = 64, kKeys = 256;

// The sizes of a call, and where a head's rows begin.
struct Problem {
  int64_t batch, heads, key_heads, length, keys, size, value_size;
  const float *q, *k, *v;
  Mask mask;
  float scale, cap;
  Noise noise;

  // The noise stands behind the settings.
  Problem(const Arguments& arguments, int settings, int mask_tensor)
      : batch(arguments.axis(0, 0)), heads(arguments.axis(0, 1)), key_heads(arguments.axis(1, 1)),
        length(arguments.axis(0, 2)), keys(arguments.axis(1, 2)), size(arguments.axis(0, 3)),
        value_size(arguments.axis(2, 3)), q(arguments.at(0)), k(arguments.at(1)), v(arguments.at(2)),
        mask(mask_tensor < 0 ? Mask() : Mask(arguments, mask_tensor, batch, heads, keys)),
        scale(arguments.at(settings)[0]),
        cap(arguments.at(settings)[1]), noise(arguments.at(settings + 1)) {}

  // The same of other tensors.
  Problem of(const float* queries, const float* their_keys, const float* values) const {
    Problem other = *this;
    other.q = queries;
    other.k = their_keys;
    other.v = values;
    return other;
  }

  // The same queries on the keys and values that a cache (batch, key heads, keys, size) holds.
  Problem on(const float* cached_keys, const float* cached_values, int64_t room) const {
    Problem other = of(q, cached_keys, cached_values);
    other.keys = room;
    return other;
  }

  int64_t group() const { return heads / key_heads; }
  int64_t all_queries() const { return batch * heads * length; }
  // What tells the noise of one query's weights.
  uint32_t noise_row(int64_t text, int64_t head, int64_t row) const {
    return noise.row((text * heads + head) * length + row);
  }
  const float* queries(int64_t text, int64_t head, int64_t row) const {
    return q + ((text * heads + head) * length + row) * size;
  }
  const float* keys_of(int64_t text, int64_t head, int64_t row) const {
    return k + ((text * key_heads + head / group()) * keys + row) * size;
  }
  const float* values_of(int64_t text, int64_t head, int64_t row) const {
    return v + ((text * key_heads + head / group()) * keys + row) * value_size;
  }
};

// One block of scores: some queries of a head, some keys.
struct Block {
  int64_t text, head, query, queries, key, keys;

  // Without the keys that are hidden by their places, at its end or all.
  Block near(const Problem& problem) const {
    Block other = *this;
    other.keys = problem.mask.near(query, queries, key, keys);
    return other;
  }
};

// Whether no query of a block sees one of its keys.
inline bool hidden(const Problem& problem, const Block& block) {
  const Mask& mask = problem.mask;
  if (block.keys == 0) return true;
  if (mask.open(block.text, block.query, block.queries, block.key, block.keys)) return false;
  float* room = scratch(6, kKeys);
  const int64_t rows = mask.same_for_all_queries() ? 1 : block.queries;
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = mask.row(block.text, block.head, block.query + i, block.key, block.keys, room);
    int seen = 0;
#pragma omp simd reduction(| : seen)
    for (int64_t j = 0; j < block.keys; ++j) seen |= !(row[j] < kHidden);  // what is not a number is seen
    if (seen) return false;
  }
  return true;
}

// The scores of a block, (queries, kKeys), with bound and mask; `slopes`, if given, gets the bound's slope.
inline void score(const Problem& problem, const Block& block, float* scores, float* slopes) {
  multiply(block.queries, block.keys, problem.size, problem.scale,
           Matrix(problem.queries(block.text, block.head, block.query), problem.size),
           Matrix(problem.keys_of(block.text, block.head, block.key), problem.size, true), 0.0f, scores, kKeys);
  const bool open = problem.mask.open(block.text, block.query, block.queries, block.key, block.keys);
  float* room = scratch(6, kKeys);
  for (int64_t i = 0; i < block.queries; ++i) {
    float* row = scores + i * kKeys;
    if (problem.cap > 0.0f) {
      float* slope = slopes == nullptr ? row : slopes + i * kKeys;
#pragma omp simd
      for (int64_t j = 0; j < block.keys; ++j) {
        const float bent = hyperbolic_tangent(row[j] / problem.cap);
        slope[j] = 1.0f - bent * bent;
        row[j] = problem.cap * bent;
      }
    }
    if (!open) {
      const float* mask = problem.mask.row(block.text, block.head, block.query + i, block.key, block.keys, room);
      for (int64_t j = 0; j < block.keys; ++j) row[j] += mask[j];
    }
  }
}

// Dropout of a block's weights.
inline void drop(const Problem& problem, const Block& block, float* weights) {
  if (!problem.noise.any()) return;
  for (int64_t i = 0; i < block.queries; ++i) {
    const uint32_t mine = problem.noise_row(block.text, block.head, block.query + i);
    float* row = weights + i * kKeys;
#pragma omp simd
    for (int64_t j = 0; j < block.keys; ++j) row[j] *= problem.noise.factor(mine, block.key + j);
  }
}

}  // namespace mindpeft
