// Memory from the system by whole pages: zero, 64-byte aligned, and real only once touched.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <memory>
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

// Memory for weights, zero and 64-byte aligned. Small ones lie side by side: each for itself would have no large pages.
class Arena {
public:
    struct Piece {
        std::shared_ptr<const Pages> pages;
        void* data = nullptr;
        size_t bytes = 0;
    };

    Piece take(size_t bytes) {
        const size_t lines = (bytes + 63) / 64 * 64;
        if (lines > kSmall) {
            const auto own = std::make_shared<const Pages>(bytes, true);
            return {own, own->data(), bytes};
        }
        if (pages_ == nullptr || used_ + lines > pages_->bytes()) {
            pages_ = std::make_shared<const Pages>(kShared, true);
            used_ = 0;
        }
        void* const data = static_cast<char*>(pages_->data()) + used_;
        used_ += lines;
        return {pages_, data, bytes};
    }

private:
    static constexpr size_t kSmall = size_t{8} << 20, kShared = size_t{64} << 20;

    std::shared_ptr<const Pages> pages_;
    size_t used_ = 0;
};

}  // namespace quire
