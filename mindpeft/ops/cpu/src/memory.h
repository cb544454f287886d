// Large pages for large tensors: reading weights through pages of 4 KB takes several times as long.
#pragma once

#include <cstdint>

namespace mindpeft {

// Asks for large pages under these bytes, once for each page; what stands there stays.
void use_large_pages(const void* data, int64_t bytes);

}  // namespace mindpeft
