#include "thread_pool.h"

#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <new>

namespace quire {

namespace {

// A step of a model is hundreds of short jobs; waking a sleeping thread costs more than most of them. An idle
// worker therefore looks for the next job about this long before it sleeps.
constexpr auto kSpin = std::chrono::microseconds(80);
constexpr int kLooksPerClock = 64;

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline uint32_t generation_of(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }

}  // namespace

ThreadPool::ThreadPool(int threads)
    : threads_(threads < 1 ? 1 : threads), owner_process_(getpid()), buffers_(threads_ + 1) {
    for (int worker = 1; worker < threads_; ++worker) workers_.emplace_back([this, worker] { serve(worker); });
}

ThreadPool::~ThreadPool() {
    if (getpid() != owner_process_) {
        // After a fork the workers do not exist here; joining them would wait for ever.
        for (auto& worker : workers_) worker.detach();
    } else {
        {
            std::lock_guard<std::mutex> lock(sleep_mutex_);
            stop_.store(true);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }
    for (auto& buffer : buffers_) std::free(buffer.data);
}

void ThreadPool::run(int64_t items, Work work, void* context) {
    if (items <= 0) return;
    if (items == 1 || threads_ == 1 || getpid() != owner_process_) {
        for (int64_t item = 0; item < items; ++item) work(context, item, 0);
        return;
    }
    // Close the last job before its description changes: a late worker that reads any of the new one will also see
    // that its own job is over.
    const uint32_t closed = generation_of(ticket_.load(std::memory_order_relaxed)) + 1;
    const uint32_t generation = closed + 1;
    ticket_.store(static_cast<uint64_t>(closed) << 32 | UINT32_MAX);
    work_.store(work, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    items_.store(static_cast<uint32_t>(items), std::memory_order_release);
    done_.store(0, std::memory_order_release);
    ticket_.store(static_cast<uint64_t>(generation) << 32);
    if (sleepers_.load() > 0) {
        std::lock_guard<std::mutex> lock(sleep_mutex_);
        wake_.notify_all();
    }
    take_items(generation, 0);
    for (int looks = 0; done_.load(std::memory_order_acquire) < items; ++looks) {
        if (looks < 4096) {
            pause_briefly();
        } else {
            std::this_thread::yield();
        }
    }
}

void ThreadPool::take_items(uint32_t generation, int worker) {
    const Work work = work_.load(std::memory_order_acquire);
    void* const context = context_.load(std::memory_order_acquire);
    const uint32_t items = items_.load(std::memory_order_acquire);
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (generation_of(ticket) == generation && static_cast<uint32_t>(ticket) < items) {
        // Success proves that the job read above is still the running one: it cannot end before this item does.
        if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
            work(context, static_cast<uint32_t>(ticket), worker);
            done_.fetch_add(1, std::memory_order_release);
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }
}

void ThreadPool::wait_for_job(uint32_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int look = 0; look < kLooksPerClock; ++look) {
            if (generation_of(ticket_.load(std::memory_order_acquire)) != seen || stop_.load()) return;
            pause_briefly();
        }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return generation_of(ticket_.load()) != seen || stop_.load(); });
    sleepers_.fetch_sub(1);
}

void ThreadPool::serve(int worker) {
    uint32_t seen = 0;
    while (true) {
        wait_for_job(seen);
        if (stop_.load()) return;
        seen = generation_of(ticket_.load(std::memory_order_acquire));
        take_items(seen, worker);
    }
}

void* ThreadPool::scratch(int worker, size_t bytes) {
    Buffer& buffer = buffers_[worker];
    if (buffer.bytes < bytes) {
        std::free(buffer.data);
        buffer.bytes = (bytes + bytes / 2 + 63) / 64 * 64;
        buffer.data = std::aligned_alloc(64, buffer.bytes);
        if (buffer.data == nullptr) {
            buffer.bytes = 0;
            throw std::bad_alloc();
        }
    }
    return buffer.data;
}

}  // namespace quire
