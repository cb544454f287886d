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
std::unordered_set<uintptr_t> asked;

void ask(uintptr_t first, uintptr_t end) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  void* begin = reinterpret_cast<void*>(first * kPage);
  const auto bytes = static_cast<size_t>((end - first) * kPage);
  // Either may be refused, which costs nothing but speed.
  if (madvise(begin, bytes, MADV_HUGEPAGE) == 0) madvise(begin, bytes, kCollapse);
#else
  (void)first;
  (void)end;
#endif
}

}  // namespace

void use_large_pages(const void* data, int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (address + kPage - 1) / kPage, end = (address + bytes) / kPage;
  if (first >= end) return;
  std::lock_guard<std::mutex> lock(mutex);
  for (uintptr_t page = first; page < end; ++page) {
    if (!asked.insert(page).second) continue;
    uintptr_t behind = page + 1;
    while (behind < end && asked.insert(behind).second) ++behind;
    ask(page, behind);
    page = behind;
  }
}

}  // namespace mindpeft
