// Memory from the system by whole pages: zero, 64-byte aligned, and real only once touched.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace quire {

// The product of sizes that make up so many bytes. std::bad_alloc where one is negative, or no memory is that large.
inline size_t checked_bytes(std::initializer_list<int64_t> sizes) {
    int64_t bytes = 1;
    for (const int64_t size : sizes) {
        if (size < 0 || __builtin_mul_overflow(bytes, size, &bytes)) throw std::bad_alloc();
    }
    return static_cast<size_t>(bytes);
}

// For AddressSanitizer, which does not see where one object of ours ends inside a larger piece of memory: the first
// `bytes` of `all` may be used, the others not.
inline void mark_usable(const void* data, size_t bytes, size_t all) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(data, bytes);
    ASAN_POISON_MEMORY_REGION(static_cast<const char*>(data) + bytes, all - bytes);
#else
    (void)data, (void)bytes, (void)all;
#endif
}

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
        mark_usable(end(), 0, rest());
    }
    ~Pages() {
        mark_usable(end(), rest(), rest());  // its addresses may be another's next
        munmap(data_, bytes_);
    }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;

    void* data() const { return data_; }
    size_t bytes() const { return bytes_; }

    // The whole pages within bytes [begin, end) lose their memory and read as zero, until they are written again.
    void release(size_t begin, size_t end) const {
        begin = (begin + kPage - 1) / kPage * kPage;
        end = end / kPage * kPage;
        if (begin < end) madvise(static_cast<char*>(data_) + begin, end - begin, MADV_DONTNEED);
    }

private:
    const char* end() const { return static_cast<const char*>(data_) + bytes_; }
    size_t rest() const { return (kPage - bytes_ % kPage) % kPage; }  // of the last page

    static constexpr size_t kPage = 4096;

    size_t bytes_;
    void* data_;
};

// Memory for weights, zero and 64-byte aligned. Small ones lie side by side: each for itself would have no large pages.
class Arena {
public:
    struct Piece {
        std::shared_ptr<const void> owner;  // of the memory: pages, or what lends it
        void* data = nullptr;
        size_t bytes = 0;
    };

    Piece take(size_t bytes) {
        const size_t lines = (bytes + 63) / 64 * 64;
        if (lines > kSmall) {
            const auto own = std::make_shared<const Pages>(bytes, true);
            return {own, own->data(), bytes};
        }
        if (pages_ == nullptr || used_ + lines + kGap > pages_->bytes()) {
            pages_ = std::shared_ptr<const Pages>(new Pages(kShared, true), [](const Pages* pages) {
                mark_usable(pages->data(), pages->bytes(), pages->bytes());
                delete pages;
            });
            mark_usable(pages_->data(), 0, pages_->bytes());
            used_ = 0;
        }
        char* const data = static_cast<char*>(pages_->data()) + used_;
        used_ += lines + kGap;
        mark_usable(data, bytes, lines + kGap);
        return {pages_, data, bytes};
    }

private:
    static constexpr size_t kSmall = size_t{8} << 20, kShared = size_t{64} << 20;
#if defined(__SANITIZE_ADDRESS__)
    static constexpr size_t kGap = 64;  // so that what runs past the end of a piece is not in the next
#else
    static constexpr size_t kGap = 0;
#endif

    std::shared_ptr<const Pages> pages_;
    size_t used_ = 0;
};

}  // namespace quire
