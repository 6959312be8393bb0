// Memory from the system by whole pages: zero, 64-byte aligned, and real only once touched.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>

namespace quire {

class Pages {
public:
    // `dense`: all of it will be used and read in order; large pages spare the processor's address lookups.
    Pages(size_t bytes, bool dense) : bytes_(bytes == 0 ? 1 : bytes) {
        data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (data_ == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        if (dense) madvise(data_, bytes_, MADV_HUGEPAGE);
#else
        (void)dense;
#endif
    }
    ~Pages() { munmap(data_, bytes_); }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;

    void* data() const { return data_; }
    size_t bytes() const { return bytes_; }

private:
    size_t bytes_;
    void* data_;
};

}  // namespace quire
