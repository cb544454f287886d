// The gradients of attention (see attention.cpp): each block's weights are worked out again from the logarithms of
// their sums.
#include "attention.h"

#include <cmath>

#include "buffers.h"
#include "elementwise.h"
#include "lanes.h"

namespace {

using mindpeft::Block;
using mindpeft::dot;
using mindpeft::kKeys;
using mindpeft::kQueries;
using mindpeft::Matrix;
using mindpeft::multiply;
using mindpeft::Problem;

constexpr float kNothing = 3e-7f;  // of a sum of weights, which is 1

// Backward for one head of keys and some of its keys. dq is added to. What a query's weights share in their gradients
// is the sum of the weights times their gradients, too. Where one block holds all keys that weigh anything it is taken
// from there: no output has to be kept, and of a query that sees few keys nothing is left where all cancels.
class Backward {
 public:
  Backward(const Problem& problem, const float* logs, const float* dout, const float* shared)
      : problem_(problem), logs_(logs), dout_(dout), shared_(shared) {}

  void run(int64_t text, int64_t key_head, int64_t first_key, int64_t end_key, float* dq, float* dk, float* dv) {
    for (int64_t key = first_key; key < end_key; key += kKeys) {
      for (int64_t head = key_head * problem_.group(); head < (key_head + 1) * problem_.group(); ++head) {
        for (int64_t query = 0; query < problem_.length; query += kQueries) {
          step({text, head, query, std::min(kQueries, problem_.length - query), key, std::min(kKeys, end_key - key)},
               dq, dk, dv);
        }
      }
    }
  }

 private:
  void step(Block block, float* dq, float* dk, float* dv) {
    const float* most = logs_ + (block.text * problem_.heads + block.head) * problem_.length + block.query;
    const float* logs = most + problem_.all_queries();
    // Queries that saw no key, or that are not numbers, change hidden keys too.
    bool all = false;
    for (int64_t i = 0; i < block.queries; ++i) all |= most[i] == -INFINITY || logs[i] != logs[i];
    if (!all) {
      block = block.near(problem_);
      if (hidden(problem_, block)) return;
    }
    const int64_t size = problem_.size, value_size = problem_.value_size, row = problem_.heads * value_size;
    float* weights = mindpeft::scratch(2, kQueries * kKeys);
    float* slopes = mindpeft::scratch(3, kQueries * kKeys);
    float* dscores = mindpeft::scratch(4, kQueries * kKeys);
    score(problem_, block, weights, slopes);
    const float* dout = dout_ + (block.text * problem_.length + block.query) * row + block.head * value_size;
    const int64_t key_row = (block.text * problem_.key_heads + block.head / problem_.group()) * problem_.keys + block.key;
    const int64_t query_row = (block.text * problem_.heads + block.head) * problem_.length + block.query;
    for (int64_t i = 0; i < block.queries; ++i) {
      if (most[i] == -INFINITY) {
        even_weights(block, block.query + i, weights + i * kKeys);
      } else {
        to_weights(weights + i * kKeys, block.keys, most[i], logs[i]);
      }
    }
    const float* mixing = weights;
    if (problem_.noise.any()) {
      float* dropped = mindpeft::scratch(5, kQueries * kKeys);
      std::copy_n(weights, block.queries * kKeys, dropped);
      drop(problem_, block, dropped);
      mixing = dropped;
    }
    multiply(block.keys, value_size, block.queries, 1.0f, Matrix(mixing, kKeys, true), Matrix(dout, row), 1.0f,
             dv + key_row * value_size, value_size);
    multiply(block.queries, block.keys, value_size, 1.0f, Matrix(dout, row),
             Matrix(problem_.values_of(block.text, block.head, block.key), value_size, true), 0.0f, dscores, kKeys);
    drop(problem_, block, dscores);
    for (int64_t i = 0; i < block.queries; ++i) {
      float *d = dscores + i * kKeys, *weight = weights + i * kKeys, *slope = slopes + i * kKeys;
      const float total = mindpeft::sum(weight, block.keys);
      const bool here = shared_ == nullptr || std::fabs(total - 1.0f) < kNothing;
      const float shared = here ? dot(d, weight, block.keys) / total : shared_[query_row + i];
      for (int64_t j = 0; j < block.keys; ++j) d[j] = weight[j] * (d[j] - shared);
      if (problem_.cap > 0.0f) {
        for (int64_t j = 0; j < block.keys; ++j) d[j] *= slope[j];
      }
    }
    multiply(block.queries, size, block.keys, problem_.scale, Matrix(dscores, kKeys),
             Matrix(problem_.keys_of(block.text, block.head, block.key), size), 1.0f, dq + query_row * size, size);
    multiply(block.keys, size, block.queries, problem_.scale, Matrix(dscores, kKeys, true),
             Matrix(problem_.queries(block.text, block.head, block.query), size), 1.0f, dk + key_row * size, size);
  }

  // Of a query that saw no key: equal ones for the keys that the mask hides least.
  void even_weights(const Block& block, int64_t query, float* row) const {
    if (!problem_.mask.any()) {
      std::fill(row, row + block.keys, 1.0f / problem_.keys);
      return;
    }
    float* room = mindpeft::scratch(6, problem_.keys);
    const float* mask = problem_.mask.row(block.text, block.head, query, 0, problem_.keys, room);
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < problem_.keys; ++j) most = mask[j] > most ? mask[j] : most;
    const float share = 1.0f / std::count(mask, mask + problem_.keys, most);
    for (int64_t j = 0; j < block.keys; ++j) row[j] = mask[block.key + j] == most ? share : 0.0f;
  }

  void to_weights(float* row, int64_t count, float most, float log) const {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) row[j] = mindpeft::exponential(row[j] - most - log);
  }

  const Problem& problem_;
  const float *logs_, *dout_, *shared_;
};

// What a query's weights share in their gradients: the sum of out dout, for each head.
void share_of_rows(const Problem& problem, const float* out, const float* dout, float* shared) {
  const int64_t row = problem.heads * problem.value_size;
  mindpeft::in_parallel(problem.batch * problem.length, 8192 / (row + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) {
      const int64_t text = place / problem.length, query = place % problem.length;
      for (int64_t head = 0; head < problem.heads; ++head) {
        const int64_t at = place * row + head * problem.value_size;
        shared[(text * problem.heads + head) * problem.length + query] = dot(out + at, dout + at, problem.value_size);
      }
    }
  });
}

void backward(const mindpeft::Arguments& arguments, const Problem& problem, int inputs, const float* out) {
  const float *logs = arguments.at(inputs + 1), *dout = arguments.at(inputs + 2);
  float *dq = arguments.at(inputs + 3), *dk = arguments.at(inputs + 4), *dv = arguments.at(inputs + 5);
  const int64_t query_numbers = problem.batch * problem.heads * problem.length * problem.size;
  const int64_t heads = problem.batch * problem.key_heads, blocks = (problem.keys + kKeys - 1) / kKeys;
  // Where there are fewer heads than threads, several take the keys of one; each adds to a dq of its own.
  const int64_t pieces = std::clamp<int64_t>((mindpeft::thread_count() + heads - 1) / std::max<int64_t>(heads, 1), 1, std::max<int64_t>(blocks, 1));
  const mindpeft::Shared memory(problem.all_queries()), more((pieces - 1) * query_numbers);
  float* shared = out == nullptr ? nullptr : memory.data();
  if (out != nullptr) share_of_rows(problem, out, dout, shared);
  std::fill(dq, dq + query_numbers, 0.0f);
  std::fill(more.data(), more.data() + (pieces - 1) * query_numbers, 0.0f);
  std::fill(dk, dk + heads * problem.keys * problem.size, 0.0f);
  std::fill(dv, dv + heads * problem.keys * problem.value_size, 0.0f);
  mindpeft::run_tasks(heads * pieces, [&](int64_t task) {
    const int64_t piece = task % pieces, head = task / pieces;
    float* mine = piece == 0 ? dq : more.data() + (piece - 1) * query_numbers;
    Backward(problem, logs, dout, shared)
        .run(head / problem.key_heads, head % problem.key_heads, blocks * piece / pieces * kKeys,
             std::min(problem.keys, blocks * (piece + 1) / pieces * kKeys), mine, dk, dv);
  });
  for (int64_t piece = 1; piece < pieces; ++piece) {
    const float* other = more.data() + (piece - 1) * query_numbers;
    mindpeft::in_parallel(query_numbers, 16384, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) dq[i] += other[i];
    });
  }
}

// A tensor that was kept in bfloat16s.
class Restored : public mindpeft::Shared {
 public:
  Restored(const mindpeft::Arguments& arguments, int tensor) : Shared(arguments.size(tensor)) {
    mindpeft::restore(arguments.size(tensor), arguments.at<mindpeft::bfloat16>(tensor), data());
  }
};

void backward(const mindpeft::Arguments& arguments, int settings, int mask) {
  const Problem problem(arguments, settings, mask);
  const int inputs = settings + 2;  // of out, logs, dout; then come dq, dk, dv
  const bool has_out = problem.keys > kKeys;
  if (!arguments.is_bfloat16(0)) return backward(arguments, problem, inputs, has_out ? arguments.at(inputs) : nullptr);
  const Restored q(arguments, 0), k(arguments, 1), v(arguments, 2);
  const auto restored = problem.of(q.data(), k.data(), v.data());
  if (!has_out) return backward(arguments, restored, inputs, nullptr);
  backward(arguments, restored, inputs, Restored(arguments, inputs).data());
}

}  // namespace

// q, k, v, settings, noise, out, logs, dout -> dq, dk, dv; q, k, v and out in floats or bfloat16s. Up to kKeys keys, out
// is not read, and anything may stand for it.
MINDPEFT_KERNEL(attention_grad) { backward(arguments, 3, -1); }
// q, k, v, mask, settings, noise, out, logs, dout -> dq, dk, dv
MINDPEFT_KERNEL(masked_attention_grad) { backward(arguments, 4, 3); }
