// softmax(scale q k^T + mask) v, some queries and keys at a time, so that the scores are never all in memory
// (Dao et al., 2022). Several heads of queries may share one of keys and values.
//
// q (batch, heads, length, size); k, v (batch, key heads, keys, size or value size); mask (1 or batch, 1 or
// heads, 1 or length, keys), added to the scores; settings (2): scale, and the scores' bound or 0; noise (4) for
// dropout of the weights. What comes out is (batch, length, heads * value size).
//
// A mask hides a key by a number so low that a score added to it makes no difference. A row all of whose keys
// are hidden then weighs those alike that are hidden least, as the composition of plain operators does; where
// all are hidden by -infinity, all keys. Where a whole block is hidden for a few queries, nothing is computed for it.
#include <algorithm>
#include <cmath>

#include "arguments.h"
#include "gemm.h"
#include "noise.h"
#include "threads.h"
#include "vector_math.h"

namespace {

using mindpeft::Matrix;
using mindpeft::multiply;

constexpr int64_t kQueries = 64, kKeys = 256;
constexpr float kHidden = -1e30f;  // masks below it hide

struct Mask {
  const float* data = nullptr;
  int64_t batch_step = 0, head_step = 0, row_step = 0;

  Mask() = default;
  Mask(const mindpeft::Arguments& arguments, int tensor) : data(arguments.at(tensor)) {
    const int64_t keys = arguments.axis(tensor, 3), rows = arguments.axis(tensor, 2), heads = arguments.axis(tensor, 1);
    row_step = rows == 1 ? 0 : keys;
    head_step = heads == 1 ? 0 : rows * keys;
    batch_step = arguments.axis(tensor, 0) == 1 ? 0 : heads * rows * keys;
  }

  const float* row(int64_t text, int64_t head, int64_t query, int64_t key) const {
    return data + text * batch_step + head * head_step + query * row_step + key;
  }
};

// The sizes of a call, and where a head's rows begin.
struct Problem {
  int64_t batch, heads, key_heads, length, keys, size, value_size;
  const float *q, *k, *v;
  Mask mask;
  float scale, cap;
  mindpeft::Noise noise;

  // The noise stands behind the settings.
  Problem(const mindpeft::Arguments& arguments, int settings, int mask_tensor)
      : batch(arguments.axis(0, 0)), heads(arguments.axis(0, 1)), key_heads(arguments.axis(1, 1)),
        length(arguments.axis(0, 2)), keys(arguments.axis(1, 2)), size(arguments.axis(0, 3)),
        value_size(arguments.axis(2, 3)), q(arguments.at(0)), k(arguments.at(1)), v(arguments.at(2)),
        mask(mask_tensor < 0 ? Mask() : Mask(arguments, mask_tensor)), scale(arguments.at(settings)[0]),
        cap(arguments.at(settings)[1]), noise(arguments.at(settings + 1)) {}

  // The same queries on the keys and values that a cache (batch, key heads, keys, size) holds.
  Problem on(const float* cached_keys, const float* cached_values, int64_t room) const {
    Problem other = *this;
    other.k = cached_keys;
    other.v = cached_values;
    other.keys = room;
    return other;
  }

  int64_t group() const { return heads / key_heads; }
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
};

bool hidden(const Problem& problem, const Block& block) {
  if (problem.mask.data == nullptr) return false;
  const int64_t rows = problem.mask.row_step == 0 ? 1 : block.queries;
  for (int64_t i = 0; i < rows; ++i) {
    const float* mask = problem.mask.row(block.text, block.head, block.query + i, block.key);
    int seen = 0;
#pragma omp simd reduction(| : seen)
    for (int64_t j = 0; j < block.keys; ++j) seen |= !(mask[j] < kHidden);  // what is not a number is seen
    if (seen) return false;
  }
  return true;
}

// The scores of a block, (queries, kKeys), with bound and mask; `slopes`, if given, gets the bound's slope.
void score(const Problem& problem, const Block& block, float* scores, float* slopes) {
  multiply(block.queries, block.keys, problem.size, problem.scale,
           Matrix(problem.queries(block.text, block.head, block.query), problem.size),
           Matrix(problem.keys_of(block.text, block.head, block.key), problem.size, true), 0.0f, scores, kKeys);
  for (int64_t i = 0; i < block.queries; ++i) {
    float* row = scores + i * kKeys;
    if (problem.cap > 0.0f) {
      float* slope = slopes == nullptr ? row : slopes + i * kKeys;
#pragma omp simd
      for (int64_t j = 0; j < block.keys; ++j) {
        const float bent = mindpeft::hyperbolic_tangent(row[j] / problem.cap);
        slope[j] = 1.0f - bent * bent;
        row[j] = problem.cap * bent;
      }
    }
    if (problem.mask.data != nullptr) {
      const float* mask = problem.mask.row(block.text, block.head, block.query + i, block.key);
      for (int64_t j = 0; j < block.keys; ++j) row[j] += mask[j];
    }
  }
}

// Takes a row's scores into its running maximum and sum; they become weights. Returns what all that came
// before is to be multiplied by.
float take_in(float* row, int64_t count, float& most, float& sum) {
  float higher = most, mine = 0;
#pragma omp simd reduction(max : higher)
  for (int64_t j = 0; j < count; ++j) higher = row[j] > higher ? row[j] : higher;
#pragma omp simd reduction(+ : mine)
  for (int64_t j = 0; j < count; ++j) {
    // Equal infinities would give NaN; a score that is NaN itself must.
    row[j] = row[j] == higher ? 1.0f : mindpeft::exponential(row[j] - higher);
    mine += row[j];
  }
  if (higher == INFINITY) mine = NAN;  // as if infinity had been subtracted from itself
  const float kept = most == higher ? 1.0f : mindpeft::exponential(most - higher);
  most = higher;
  sum = sum * kept + mine;
  return kept;
}

// Dropout of a block's weights.
void drop(const Problem& problem, const Block& block, float* weights) {
  if (!problem.noise.any()) return;
  for (int64_t i = 0; i < block.queries; ++i) {
    const uint32_t mine = problem.noise_row(block.text, block.head, block.query + i);
    float* row = weights + i * kKeys;
#pragma omp simd
    for (int64_t j = 0; j < block.keys; ++j) row[j] *= problem.noise.factor(mine, block.key + j);
  }
}

// The logarithm of a row's sum of exponentials; -infinity for one that saw no key.
float log_of_sum(float most, float sum) {
  return most < kHidden && sum == sum ? -INFINITY : most + std::log(sum);
}

void scale_row(float* row, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) row[i] *= factor;
}

// The blocks of keys that some queries see; all of them if every block is hidden from one of the queries.
template <typename Visit>
void seen_blocks(const Problem& problem, Block block, bool skip, const Visit& visit) {
  for (block.key = 0; block.key < problem.keys; block.key += kKeys) {
    block.keys = std::min(kKeys, problem.keys - block.key);
    if (!skip || !hidden(problem, block)) visit(block);
  }
}

// One block of queries; `out` and `logs` are those of its first. Returns whether a query saw no key.
bool attend(const Problem& problem, Block block, bool skip, float* out, int64_t out_step, float* logs) {
  float* scores = mindpeft::scratch(0, kQueries * kKeys);
  float* mixed = mindpeft::scratch(1, kQueries * problem.value_size);
  float most[kQueries], sums[kQueries];
  std::fill(most, most + block.queries, -INFINITY);
  std::fill(sums, sums + block.queries, 0.0f);
  std::fill(mixed, mixed + block.queries * problem.value_size, 0.0f);
  seen_blocks(problem, block, skip, [&](const Block& some) {
    score(problem, some, scores, nullptr);
    for (int64_t i = 0; i < some.queries; ++i) {
      const float kept = take_in(scores + i * kKeys, some.keys, most[i], sums[i]);
      if (kept != 1.0f) scale_row(mixed + i * problem.value_size, problem.value_size, kept);
    }
    drop(problem, some, scores);
    multiply(some.queries, problem.value_size, some.keys, 1.0f, Matrix(scores, kKeys),
             Matrix(problem.values_of(some.text, some.head, some.key), problem.value_size), 1.0f, mixed,
             problem.value_size);
  });
  bool blind = false;
  for (int64_t i = 0; i < block.queries; ++i) {
    for (int64_t j = 0; j < problem.value_size; ++j) {
      out[i * out_step + j] = mixed[i * problem.value_size + j] / sums[i];
    }
    logs[i] = log_of_sum(most[i], sums[i]);
    blind |= logs[i] == -INFINITY;
  }
  return blind;
}

// A single query, as when a text is written: products of one row, of the keys alone that it sees.
void attend_with_one(const Problem& problem, int64_t text, int64_t head, float* out, float* logs) {
  float* scores = mindpeft::scratch(0, problem.keys);
  const float *query = problem.queries(text, head, 0), *keys = problem.keys_of(text, head, 0);
  const float* values = problem.values_of(text, head, 0);
  const float* mask = problem.mask.data == nullptr ? nullptr : problem.mask.row(text, head, 0, 0);
  for (int64_t j = 0; j < problem.keys; ++j) {
    if (mask != nullptr && mask[j] < kHidden) {  // most of a cache is empty
      scores[j] = mask[j];
      continue;
    }
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < problem.size; ++i) sum += query[i] * keys[j * problem.size + i];
    scores[j] = sum * problem.scale;
    if (problem.cap > 0.0f) scores[j] = problem.cap * mindpeft::hyperbolic_tangent(scores[j] / problem.cap);
    if (mask != nullptr) scores[j] += mask[j];
  }
  float most = -INFINITY, sum = 0;
  take_in(scores, problem.keys, most, sum);
  std::fill(out, out + problem.value_size, 0.0f);
  const uint32_t mine = problem.noise_row(text, head, 0);
  for (int64_t j = 0; j < problem.keys; ++j) {
    const float share = scores[j] / sum * (problem.noise.any() ? problem.noise.factor(mine, j) : 1.0f);
    if (share == 0.0f) continue;
    for (int64_t i = 0; i < problem.value_size; ++i) out[i] += share * values[j * problem.value_size + i];
  }
  *logs = log_of_sum(most, sum);
}

void attend_all(const Problem& problem, float* out, float* logs) {
  const int64_t blocks = (problem.length + kQueries - 1) / kQueries, row = problem.heads * problem.value_size;
  mindpeft::run_tasks(problem.batch * problem.heads * blocks, [&](int64_t task) {
    const int64_t query = task % blocks * kQueries, head = task / blocks % problem.heads;
    const int64_t text = task / blocks / problem.heads;
    float* to = out + (text * problem.length + query) * row + head * problem.value_size;
    float* log = logs + (text * problem.heads + head) * problem.length + query;
    if (problem.length == 1) return attend_with_one(problem, text, head, to, log);
    const Block block{text, head, query, std::min(kQueries, problem.length - query), 0, 0};
    if (attend(problem, block, true, to, row, log)) attend(problem, block, false, to, row, log);
  });
}

void forward(const mindpeft::Arguments& arguments, int settings, int mask) {
  const int outputs = settings + 2;
  attend_all(Problem(arguments, settings, mask), arguments.at(outputs), arguments.at(outputs + 1));
}

// Puts new rows of each head, (batch * heads, count, size), into a cache, (batch * heads, room, size).
void put(const float* fresh, int64_t heads, int64_t count, int64_t size, float* cache, int64_t room, int64_t place) {
  const int64_t fitting = std::clamp<int64_t>(room - place, 0, count);
  for (int64_t head = 0; head < heads; ++head) {
    std::copy_n(fresh + head * count * size, fitting * size, cache + (head * room + place) * size);
  }
}

// q, k, v, mask, settings, noise, key cache, value cache, and place or none: the caches hold (batch * key heads
// * room, size). What is written to them MindSpore does not know of; nobody else may, in the same graph.
void forward_with_cache(const mindpeft::Arguments& arguments, bool first, int out) {
  const Problem problem(arguments, 4, 3);
  const int64_t heads = problem.batch * problem.key_heads, room = arguments.rows(6) / std::max<int64_t>(heads, 1);
  const int64_t place = first ? 0 : *arguments.at<int32_t>(8);
  put(problem.k, heads, problem.keys, problem.size, arguments.at(6), room, place);
  put(problem.v, heads, problem.keys, problem.value_size, arguments.at(7), room, place);
  const mindpeft::Shared logs(problem.batch * problem.heads * problem.length);
  attend_all(first ? problem : problem.on(arguments.at(6), arguments.at(7), room), arguments.at(out), logs.data());
}

// Backward for one head of keys and some of its keys. dq is added to.
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
  void step(const Block& block, float* dq, float* dk, float* dv) {
    const float* logs = logs_ + (block.text * problem_.heads + block.head) * problem_.length + block.query;
    // Queries that saw no key, or that are not numbers, change hidden keys too.
    const bool all = std::any_of(logs, logs + block.queries, [](float log) { return !(log > -INFINITY); });
    if (!all && hidden(problem_, block)) return;
    const int64_t size = problem_.size, value_size = problem_.value_size, row = problem_.heads * value_size;
    float* weights = mindpeft::scratch(2, kQueries * kKeys);
    float* slopes = mindpeft::scratch(3, kQueries * kKeys);
    float* dscores = mindpeft::scratch(4, kQueries * kKeys);
    score(problem_, block, weights, slopes);
    const float* dout = dout_ + (block.text * problem_.length + block.query) * row + block.head * value_size;
    const int64_t key_row = (block.text * problem_.key_heads + block.head / problem_.group()) * problem_.keys + block.key;
    const int64_t query_row = (block.text * problem_.heads + block.head) * problem_.length + block.query;
    for (int64_t i = 0; i < block.queries; ++i) {
      if (logs[i] == -INFINITY) {
        even_weights(block, block.query + i, weights + i * kKeys);
      } else {
        to_weights(weights + i * kKeys, block.keys, logs[i]);
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
      const float shared = shared_[query_row + i];
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
    if (problem_.mask.data == nullptr) {
      std::fill(row, row + block.keys, 1.0f / problem_.keys);
      return;
    }
    const float* mask = problem_.mask.row(block.text, block.head, query, 0);
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < problem_.keys; ++j) most = mask[j] > most ? mask[j] : most;
    const float share = 1.0f / std::count(mask, mask + problem_.keys, most);
    for (int64_t j = 0; j < block.keys; ++j) row[j] = mask[block.key + j] == most ? share : 0.0f;
  }

  void to_weights(float* row, int64_t count, float log) const {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) row[j] = mindpeft::exponential(row[j] - log);
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
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < problem.value_size; ++i) sum += out[at + i] * dout[at + i];
        shared[(text * problem.heads + head) * problem.length + query] = sum;
      }
    }
  });
}

void backward(const mindpeft::Arguments& arguments, int settings, int mask) {
  const Problem problem(arguments, settings, mask);
  const int inputs = settings + 2;  // of out, logs, dout; then come dq, dk, dv
  const float *out = arguments.at(inputs), *logs = arguments.at(inputs + 1), *dout = arguments.at(inputs + 2);
  float *dq = arguments.at(inputs + 3), *dk = arguments.at(inputs + 4), *dv = arguments.at(inputs + 5);
  const int64_t query_numbers = problem.batch * problem.heads * problem.length * problem.size;
  const int64_t heads = problem.batch * problem.key_heads, blocks = (problem.keys + kKeys - 1) / kKeys;
  // Where there are fewer heads than threads, several take the keys of one; each adds to a dq of its own.
  const int64_t pieces = std::clamp<int64_t>((mindpeft::thread_count() + heads - 1) / std::max<int64_t>(heads, 1), 1, std::max<int64_t>(blocks, 1));
  const mindpeft::Shared shared(problem.batch * problem.heads * problem.length), more((pieces - 1) * query_numbers);
  share_of_rows(problem, out, dout, shared.data());
  std::fill(dq, dq + query_numbers, 0.0f);
  std::fill(more.data(), more.data() + (pieces - 1) * query_numbers, 0.0f);
  std::fill(dk, dk + heads * problem.keys * problem.size, 0.0f);
  std::fill(dv, dv + heads * problem.keys * problem.value_size, 0.0f);
  mindpeft::run_tasks(heads * pieces, [&](int64_t task) {
    const int64_t piece = task % pieces, head = task / pieces;
    float* mine = piece == 0 ? dq : more.data() + (piece - 1) * query_numbers;
    Backward(problem, logs, dout, shared.data())
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

}  // namespace

// q, k, v, settings, noise -> out, logs (batch, heads, length): of the sums of the scores' exponentials
MINDPEFT_KERNEL(attention) { forward(arguments, 3, -1); }
// q, k, v, mask, settings, noise -> out, logs
MINDPEFT_KERNEL(masked_attention) { forward(arguments, 4, 3); }
// q, k, v, settings, noise, out, logs, dout -> dq, dk, dv
MINDPEFT_KERNEL(attention_grad) { backward(arguments, 3, -1); }
// q, k, v, mask, settings, noise, out, logs, dout -> dq, dk, dv
MINDPEFT_KERNEL(masked_attention_grad) { backward(arguments, 4, 3); }

// The first tokens of a text, which see each other -> out
MINDPEFT_KERNEL(attention_beginning_cache) { forward_with_cache(arguments, true, 8); }
// Later ones, which see all that is in the cache, where they stand from `place` on -> out
MINDPEFT_KERNEL(attention_with_cache) { forward_with_cache(arguments, false, 9); }
