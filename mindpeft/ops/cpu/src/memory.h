// Large pages for large tensors: reading weights through pages of 4 KB takes several times as long.
#pragma once

#include <cstdint>

namespace mindpeft {

// Asks for large pages under these bytes, once for each page; what stands there stays. Pages that are in use already
// change as the system finds time.
void use_large_pages(const void* data, int64_t bytes);

// The same, but now: it takes a second for 2 GB, which pays where memory is read again and again at its full speed.
void move_to_large_pages(const void* data, int64_t bytes);

}  // namespace mindpeft
