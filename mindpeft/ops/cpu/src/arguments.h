// What MindSpore hands to an operator of type "aot", and what every kernel is declared with.
#pragma once

#include <cstdint>
#include <cstring>

#include "memory.h"

namespace mindpeft {

using bfloat16 = uint16_t;  // the upper half of a float

// Tensors of one call, inputs first, then outputs.
class Arguments {
 public:
  // `table`: the number of one of which little is touched; -1 if there is none.
  Arguments(int count, void** data, const int* ranks, int64_t** shapes, const char** types, int table)
      : count_(count), data_(data), ranks_(ranks), shapes_(shapes), types_(types) {
    for (int tensor = 0; tensor < count; ++tensor) {
      // A table may be a file's pages: with large ones the system would read 2 MB of it for a row.
      if (tensor == table) continue;
      use_large_pages(data[tensor], size(tensor) * bytes_of(types[tensor]));
    }
  }

  // How many tensors there are.
  int count() const { return count_; }

  template <typename T = float>
  T* at(int tensor) const {
    return static_cast<T*>(data_[tensor]);
  }

  int rank(int tensor) const { return ranks_[tensor]; }

  // The size of an axis; negative ones count from the last.
  int64_t axis(int tensor, int number) const {
    return shapes_[tensor][number < 0 ? ranks_[tensor] + number : number];
  }

  int64_t size(int tensor) const {
    int64_t product = 1;
    for (int i = 0; i < ranks_[tensor]; ++i) product *= shapes_[tensor][i];
    return product;
  }

  // The last axis, and how many of its kind there are.
  int64_t width(int tensor) const { return ranks_[tensor] == 0 ? 1 : axis(tensor, -1); }
  int64_t rows(int tensor) const { return width(tensor) == 0 ? 0 : size(tensor) / width(tensor); }

  // Calls use(numbers) with a tensor's floats or bfloat16s.
  template <typename Use>
  void read(int tensor, const Use& use) const {
    if (is_bfloat16(tensor)) {
      use(static_cast<const bfloat16*>(data_[tensor]));
    } else {
      use(static_cast<const float*>(data_[tensor]));
    }
  }

  bool is_bfloat16(int tensor) const { return std::strcmp(types_[tensor], "bfloat16") == 0; }

 private:
  // Of one number of a type.
  static int bytes_of(const char* type) {
    if (std::strcmp(type, "int8") == 0) return 1;
    return std::strcmp(type, "bfloat16") == 0 ? 2 : 4;
  }

  int count_;
  void** data_;
  const int* ranks_;
  int64_t** shapes_;
  const char** types_;
};

}  // namespace mindpeft

// Begins the definition of the operator `name`; its body sees `arguments` and returns nothing.
#define MINDPEFT_KERNEL(name) MINDPEFT_LOOKUP_KERNEL(name, -1)

// The same for an operator that touches little of its tensor `table`.
#define MINDPEFT_LOOKUP_KERNEL(name, table)                                                        \
  static void name##_body(const mindpeft::Arguments& arguments);                                   \
  extern "C" __attribute__((visibility("default"))) int name(int count, void** data, int* ranks,   \
                                                             int64_t** shapes, const char** types, \
                                                             void*, void*) {                       \
    name##_body(mindpeft::Arguments(count, data, ranks, shapes, types, table));                    \
    return 0;                                                                                      \
  }                                                                                                \
  static void name##_body(const mindpeft::Arguments& arguments)
