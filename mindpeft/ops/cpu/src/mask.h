// Which keys a query of attention sees: a tensor of numbers for every pair, or a description of a few rules.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "arguments.h"

namespace mindpeft {

constexpr float kHidden = -1e30f;          // masks below it hide
constexpr float kLowest = -3.3895314e38f;  // what a description hides with

// A tensor of four axes, (1 or batch, 1 or heads, 1 or length, keys), is added to the scores.
//
// One of two axes, (1 or batch, 5 + keys or 5), describes: whether a query sees no key behind it; the place of
// the first query among the keys; how many keys one sees, itself included, or 0 for all; whether a key's place
// counts (ALiBi); how many keys stand before all others, seen by every query. Then, for each other key, 0 where
// it is hidden, and the number of its sample; nothing where all are seen. Where no query sees what is behind it,
// it sees its own sample alone, and one without a sample every one.
class Mask {
 public:
  Mask() = default;

  Mask(const Arguments& arguments, int tensor, int64_t batch, int64_t heads, int64_t keys)
      : data_(arguments.at(tensor)), heads_(heads) {
    if (arguments.size(tensor) == 0) return;  // of no text
    if (arguments.rank(tensor) == 2) {
      describe(arguments.axis(tensor, 0), arguments.axis(tensor, 1), batch, keys);
      return;
    }
    const int64_t width = arguments.axis(tensor, 3), rows = arguments.axis(tensor, 2);
    const int64_t planes = arguments.axis(tensor, 1);
    row_step_ = rows == 1 ? 0 : width;
    head_step_ = planes == 1 ? 0 : rows * width;
    batch_step_ = arguments.axis(tensor, 0) == 1 ? 0 : planes * rows * width;
  }

  bool any() const { return data_ != nullptr; }

  // Whether the rows of all queries are one and the same.
  bool same_for_all_queries() const { return described_ ? !causal_ : row_step_ == 0; }

  // How many keys of a block are left without those behind all of its queries; none if all are before every
  // window.
  int64_t near(int64_t query, int64_t queries, int64_t key, int64_t keys) const {
    if (!causal_) return keys;
    const int64_t first = first_ + query, last = first + queries - 1, own = key - past_;
    if (window_ > 0 && own >= 0 && own + keys - 1 <= first - window_) return 0;
    return std::clamp<int64_t>(last + 1 - own, 0, keys);
  }

  // Whether nothing is added to any score of a block.
  bool open(int64_t text, int64_t query, int64_t queries, int64_t key, int64_t keys) const {
    if (!any()) return true;
    if (!described_ || alibi_ || !uniform_[text]) return false;
    if (!causal_) return true;
    const int64_t first = first_ + query, last = first + queries - 1, own = std::max<int64_t>(key - past_, 0);
    return key + keys - 1 - past_ <= first && (window_ == 0 || last - own < window_);
  }

  // What is added to a query's scores of some keys; `room` has space for them.
  const float* row(int64_t text, int64_t head, int64_t query, int64_t key, int64_t count, float* room) const {
    if (!described_) return data_ + text * batch_step_ + head * head_step_ + query * row_step_ + key;
    const int64_t before = std::clamp<int64_t>(past_ - key, 0, count);
    std::fill(room, room + before, 0.0f);
    const int64_t place = first_ + query, own = key + before - past_;
    float* rest = room + before;
    count -= before;
    const int64_t end = causal_ ? std::clamp<int64_t>(place + 1 - own, 0, count) : count;
    const int64_t begin = causal_ && window_ > 0 ? std::clamp<int64_t>(place - window_ + 1 - own, 0, end) : 0;
    std::fill(rest, rest + begin, kLowest);
    std::fill(rest + begin, rest + end, 0.0f);
    std::fill(rest + end, rest + count, kLowest);
    if (samples_ != nullptr) hide_samples(text, place, own, count, rest);
    if (alibi_) add_places(text, head, own, count, rest);
    return room;
  }

 private:
  static constexpr int64_t kRules = 5;

  void describe(int64_t rows, int64_t width, int64_t batch, int64_t keys) {
    described_ = true;
    causal_ = data_[0] != 0.0f;
    first_ = static_cast<int64_t>(data_[1]);
    window_ = static_cast<int64_t>(data_[2]);
    alibi_ = data_[3] != 0.0f;
    past_ = static_cast<int64_t>(data_[4]);
    batch_step_ = rows == 1 ? 0 : width;
    samples_ = width == kRules ? nullptr : data_ + kRules;
    keys_ = samples_ == nullptr ? keys - past_ : width - kRules;  // a cache has more than the call's keys
    uniform_.assign(batch, 1);
    for (int64_t text = 0; samples_ != nullptr && text < batch; ++text) {
      const float* mine = samples_ + text * batch_step_;
      uniform_[text] = std::all_of(mine, mine + keys_, [=](float one) { return one != 0.0f && one == mine[0]; });
    }
    if (alibi_) count_places(batch);
  }

  void hide_samples(int64_t text, int64_t place, int64_t key, int64_t count, float* room) const {
    const float *samples = samples_ + text * batch_step_, mine = causal_ && place < keys_ ? samples[place] : 0.0f;
    for (int64_t j = 0; j < count; ++j) {
      const float other = samples[key + j];
      const bool seen = other != 0.0f && (mine == 0.0f || mine == other);
      room[j] = seen ? room[j] : kLowest;
    }
  }

  // Places are counted over the keys that are not hidden.
  void count_places(int64_t batch) {
    places_.assign(batch * keys_, 0.0f);
    for (int64_t text = 0; text < batch; ++text) {
      float next = 0.0f;
      for (int64_t key = 0; key < keys_; ++key) {
        if (samples_ == nullptr || samples_[text * batch_step_ + key] != 0.0f) places_[text * keys_ + key] = next++;
      }
    }
  }

  void add_places(int64_t text, int64_t head, int64_t key, int64_t count, float* room) const {
    const float *places = places_.data() + text * keys_ + key, slope = slope_of(head);
    for (int64_t j = 0; j < count; ++j) room[j] += slope * places[j];
  }

  // A geometric series for a power of two heads; for other numbers, those of the next, every second one.
  float slope_of(int64_t head) const {
    int64_t power = 1;
    while (2 * power <= heads_) power *= 2;
    if (head < power) return std::exp2(-8.0 * (head + 1) / power);
    return std::exp2(-4.0 * (2 * (head - power) + 1) / power);
  }

  const float* data_ = nullptr;
  const float* samples_ = nullptr;
  int64_t batch_step_ = 0, head_step_ = 0, row_step_ = 0;
  int64_t heads_ = 1, keys_ = 0, first_ = 0, window_ = 0, past_ = 0;
  bool described_ = false, causal_ = false, alibi_ = false;
  std::vector<char> uniform_;  // for each text, whether all keys are of one sample
  std::vector<float> places_;
};

}  // namespace mindpeft
