// Threads of our own. One job at a time; its items are taken one by one from a shared counter, so a thread that
// is late or descheduled costs at most the item it holds.
//
// A process has one process-wide pool of workers, however many `ThreadPool`s: their jobs run one after another on the same
// threads, so two engines never occupy more processors than one. After a fork the child has none of the threads: what it
// inherits computes on the caller's thread alone, and what it makes has a process-wide pool of its own.
//
// No item throws: it would leave a job in the middle, and kernels are compiled without exceptions. Memory for items is
// therefore reserved before the job.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "runtime/float_mode.h"
#include "runtime/profile.h"

namespace quire {

// Computes one item. Must write only what belongs to that item: results may not depend on the thread. Never throws.
using Work = void (*)(void* context, int64_t item, int worker);
// For each worker, the caller first, the processors that it keeps to.
using Affinity = std::vector<std::vector<int>>;

// What an operation holds while it runs: the lock of the process-wide pool, and the calling thread's floating-point state. The
// interpreter's lock is not awaited while this one is held, nor this one while the interpreter's is held.
class Exclusive {
public:
    explicit Exclusive(std::mutex& mutex) : lock_(mutex) {}

private:
    const std::lock_guard<std::mutex> lock_;
    const FloatMode mode_;
};

// The process-wide pool of workers. A caller of anything but `exclusive` holds that lock meanwhile.
class ProcessPool {
public:
    // The one there is, or the first.
    static std::shared_ptr<ProcessPool> of_this_process();
    ProcessPool();
    ~ProcessPool();
    ProcessPool(const ProcessPool&) = delete;
    ProcessPool& operator=(const ProcessPool&) = delete;

    Exclusive exclusive() { return Exclusive(callers_); }
    // To `threads`, the caller included; those that are there already stay where they are.
    void grow(int threads, const Affinity& affinity);
    void run(int64_t items, Work work, void* context, int threads);
    // False, and null, where there is no such memory.
    bool reserve(int worker, size_t bytes) { return at_least(scratch_[worker], bytes) != nullptr; }
    void* scratch(int worker, size_t bytes);
    void* shared_scratch(int sub_pool, size_t bytes) { return at_least(shared_scratch_[sub_pool], bytes); }
    // That some sub-pool had no memory; whether one had none since the last call.
    void note_out_of_memory() { out_of_memory_.store(true, std::memory_order_relaxed); }
    bool take_out_of_memory() { return out_of_memory_.exchange(false, std::memory_order_relaxed); }
    // Workers below `threads` do not sleep between jobs.
    void set_spinning(int threads) { spinning_threads_.store(threads, std::memory_order_release); }
    // What was done on these threads; read and written under the lock.
    Profile& profile() { return profile_; }
    // The processors for a caller that runs on a worker's; empty where it runs anywhere else.
    std::vector<int> place_for_caller(int threads) const;

private:
    struct Buffer {
        void* data = nullptr;
        size_t bytes = 0;
    };
    // A thread, which knows its own place: the list of workers grows while they wait.
    struct Worker {
        std::atomic<bool> asleep{false};
        std::mutex mutex;
        std::condition_variable wake;
        std::thread thread;
    };

    struct Register;  // of all pools

    static void* at_least(Buffer& buffer, size_t bytes);
    // Around a fork: no operation runs meanwhile, so the child finds each lock free and each buffer whole.
    static void before_fork();
    static void after_fork(bool in_child);

    void serve(Worker& self, int worker, const std::vector<int>& processors);
    bool is_called(uint32_t seen, int worker) const;
    static void wake(Worker& worker);
    void take_items(uint32_t generation, int worker);
    void wait_for_job(uint32_t seen, Worker& self, int worker);

    bool orphaned_ = false;  // in a child: the workers did not follow
    std::mutex callers_;
    // The ticket holds the job's generation (high half) and its next item (low half) in one word: a worker that
    // wakes late cannot take an item of a job whose description it has not read.
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<uint32_t> items_{0};
    std::atomic<int> threads_{0};  // workers from here on leave the job alone
    std::atomic<Work> work_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<int> spinning_threads_{0};
    std::atomic<bool> stop_{false}, out_of_memory_{false};
    // Worker 0 is the caller of `run`. Resized under the lock, so never while items are computed.
    std::vector<Buffer> scratch_, shared_scratch_;
    Profile profile_;
    Affinity affinity_;  // of those whose places are known
    std::vector<std::unique_ptr<Worker>> workers_;  // from worker 1 on
};

class ThreadPool {
public:
    // `threads` includes the caller of `run`.
    explicit ThreadPool(int threads, const Affinity& affinity = {});

    int threads() const { return threads_; }

    // One operation at a time: a caller of `run` or of scratch memory holds this lock meanwhile.
    Exclusive exclusive() { return process_pool_->exclusive(); }

    Profile& profile() { return process_pool_->profile(); }

    // Calls work(context, item, worker) once for each item in [0, items) and returns when all have returned.
    void run(int64_t items, Work work, void* context) { process_pool_->run(items, work, context, threads_); }

    // Before a job whose items take scratch memory: `bytes` of it for each thread. Where there is no such memory
    // std::bad_alloc; in a sub-pool, which is in the middle of a job, false (see `sub_pool_was_out_of_memory`).
    bool reserve(size_t bytes);
    // At least `bytes` of 64-byte aligned memory of the worker's own, valid until its next call. It has been reserved.
    void* scratch(int worker, size_t bytes) { return process_pool_->scratch(first_worker_ + worker, bytes); }
    // The same for the caller of `run`, shared by the items of one operation. Where there is none std::bad_alloc; in a
    // sub-pool null.
    void* shared_scratch(size_t bytes);

    // A pool of that worker alone, with scratch memory of its own: what an item of a job of this pool may compute with.
    ThreadPool sub_pool(int worker) const { return ThreadPool(process_pool_, worker); }
    // After a job whose items computed in sub-pools: whether one had no memory, so that its results are void.
    bool sub_pool_was_out_of_memory() { return process_pool_->take_out_of_memory(); }

    // While this lives one job follows another: the workers wait for the next one awake, and a caller that runs where a
    // worker belongs is moved to its own processors.
    class SpinScope {
    public:
        explicit SpinScope(ThreadPool& pool);
        ~SpinScope();
        SpinScope(const SpinScope&) = delete;
        SpinScope& operator=(const SpinScope&) = delete;

    private:
        ProcessPool& process_pool_;
        std::vector<int> came_from_;  // where the caller may run; empty: it was not moved
    };

private:
    ThreadPool(std::shared_ptr<ProcessPool> process_pool, int worker)
        : threads_(1), first_worker_(worker), sub_pool_(worker + 1), process_pool_(std::move(process_pool)) {}

    bool out_of_memory();

    const int threads_, first_worker_ = 0, sub_pool_ = 0;  // 0: none
    const std::shared_ptr<ProcessPool> process_pool_;
};

}  // namespace quire
