// Threads of our own. One job at a time; its items are taken one by one from a shared counter, so a thread that
// is late or descheduled costs at most the item it holds.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace quire {

// Computes one item. Must write only what belongs to that item: results may not depend on the thread.
using Work = void (*)(void* context, int64_t item, int worker);

class ThreadPool {
public:
    // `threads` includes the caller of `run`.
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int threads() const { return threads_; }

    // One operation at a time: whoever calls `run` or asks for scratch memory holds this lock meanwhile.
    std::unique_lock<std::mutex> exclusive() { return std::unique_lock<std::mutex>(callers_); }

    // Calls work(context, item, worker) once for each item in [0, items) and returns when all have returned.
    void run(int64_t items, Work work, void* context);

    // At least `bytes` of 64-byte aligned memory of the worker's own, valid until its next call.
    void* scratch(int worker, size_t bytes);
    // The same for the caller of `run`, shared by the items of one operation.
    void* shared_scratch(size_t bytes) { return scratch(threads_, bytes); }

private:
    struct Buffer {
        void* data = nullptr;
        size_t bytes = 0;
    };

    void serve(int worker);
    void take_items(uint32_t generation, int worker);
    void wait_for_job(uint32_t seen);

    const int threads_;
    const int owner_process_;
    std::mutex callers_;
    // The ticket holds the job's generation (high half) and its next item (low half) in one word: a worker that
    // wakes late cannot take an item of a job whose description it has not read.
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<uint32_t> items_{0};
    std::atomic<Work> work_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::mutex sleep_mutex_;
    std::condition_variable wake_;
    std::vector<Buffer> buffers_;
    std::vector<std::thread> workers_;
};

}  // namespace quire
