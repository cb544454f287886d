#include "memory.h"

#include <mutex>
#include <unordered_set>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mindpeft {
namespace {

constexpr uintptr_t kPage = uintptr_t{1} << 21;
constexpr int kCollapse = 25;  // MADV_COLLAPSE, of Linux 6.1: move what is there into large pages now

std::mutex mutex;

// Calls ask(begin, bytes) for those large pages under some bytes that are not among the known ones, which they join.
template <typename Ask>
void for_new_pages(std::unordered_set<uintptr_t>& known, const void* data, int64_t bytes, const Ask& ask) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (address + kPage - 1) / kPage, end = (address + bytes) / kPage;
  if (first >= end) return;
  std::lock_guard<std::mutex> lock(mutex);
  for (uintptr_t page = first; page < end; ++page) {
    if (!known.insert(page).second) continue;
    uintptr_t behind = page + 1;
    while (behind < end && known.insert(behind).second) ++behind;
    ask(reinterpret_cast<void*>(page * kPage), static_cast<size_t>((behind - page) * kPage));
    page = behind;
  }
}

// Either may be refused, which costs nothing but speed.
#if defined(__linux__) && defined(MADV_HUGEPAGE)
void want(void* begin, size_t bytes) { madvise(begin, bytes, MADV_HUGEPAGE); }
void move(void* begin, size_t bytes) { madvise(begin, bytes, kCollapse); }
#else
void want(void*, size_t) {}
void move(void*, size_t) {}
#endif

}  // namespace

void use_large_pages(const void* data, int64_t bytes) {
  static std::unordered_set<uintptr_t> wanted;
  for_new_pages(wanted, data, bytes, want);
}

void move_to_large_pages(const void* data, int64_t bytes) {
  static std::unordered_set<uintptr_t> moved;
  for_new_pages(moved, data, bytes, move);
}

}  // namespace mindpeft
