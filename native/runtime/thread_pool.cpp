#include "runtime/thread_pool.h"

#if defined(__linux__)
#include <sched.h>
#endif
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "runtime/memory.h"

namespace quire {

namespace {

// A step of a model is hundreds of short jobs; waking a sleeping thread costs more than most of them. An idle
// worker therefore looks for the next job about this long before it sleeps; within a program it does not sleep.
constexpr auto kSpin = std::chrono::microseconds(80);
constexpr int kLooksPerClock = 64;
constexpr int kLooksBeforeYield = 4096;  // about as long: then other threads may have the processor
constexpr int64_t kMostItems = UINT32_MAX - 1;  // that the ticket counts

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

#if defined(__linux__)
std::vector<int> allowed_processors() {
    cpu_set_t set;
    std::vector<int> processors;
    if (sched_getaffinity(0, sizeof(set), &set) != 0) return processors;
    for (int processor = 0; processor < CPU_SETSIZE; ++processor) {
        if (CPU_ISSET(processor, &set)) processors.push_back(processor);
    }
    return processors;
}

// Of the calling thread. A processor may have gone meanwhile: then it stays where the system puts it.
void keep_to(const std::vector<int>& processors) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (const int processor : processors) {
        if (processor >= 0 && processor < CPU_SETSIZE) CPU_SET(processor, &set);
    }
    if (CPU_COUNT(&set) > 0) (void)sched_setaffinity(0, sizeof(set), &set);
}

int current_processor() { return sched_getcpu(); }
#else
std::vector<int> allowed_processors() { return {}; }
void keep_to(const std::vector<int>&) {}
int current_processor() { return 0; }
#endif

inline uint32_t generation_of(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }

}  // namespace

// Never destroyed: threads may fork while the process ends.
struct ProcessPool::Register {
    std::mutex mutex;  // taken before the lock of a pool
    std::vector<ProcessPool*> all;
    std::weak_ptr<ProcessPool> current;

    static Register& get() {
        static Register& only = *new Register;
        return only;
    }
};

std::shared_ptr<ProcessPool> ProcessPool::of_this_process() {
    static const int watched = pthread_atfork(before_fork, [] { after_fork(false); }, [] { after_fork(true); });
    if (watched != 0) throw std::bad_alloc();
    Register& pools = Register::get();
    std::shared_ptr<ProcessPool> found;  // may be the last one: its end takes the mutex, after this lock
    std::lock_guard<std::mutex> lock(pools.mutex);
    found = pools.current.lock();
    if (found != nullptr && !found->orphaned_) return found;
    std::shared_ptr<ProcessPool> process_pool = std::make_shared<ProcessPool>();
    pools.all.push_back(process_pool.get());
    pools.current = process_pool;
    return process_pool;
}

void ProcessPool::before_fork() {
    Register& pools = Register::get();
    pools.mutex.lock();
    for (ProcessPool* process_pool : pools.all) process_pool->callers_.lock();
}

void ProcessPool::after_fork(bool in_child) {
    Register& pools = Register::get();
    for (ProcessPool* process_pool : pools.all) {
        process_pool->orphaned_ = process_pool->orphaned_ || in_child;
        process_pool->callers_.unlock();
    }
    pools.mutex.unlock();
}

ProcessPool::ProcessPool() : scratch_(1), shared_scratch_(2) {}

ProcessPool::~ProcessPool() {
    Register& pools = Register::get();
    {
        std::lock_guard<std::mutex> lock(pools.mutex);
        pools.all.erase(std::remove(pools.all.begin(), pools.all.end(), this), pools.all.end());
    }
    if (orphaned_) {
        // The threads cannot be joined, and a condition variable waits for those that wait for it: both stay behind.
        for (auto& worker : workers_) (void)worker.release();
    }
    stop_.store(true);
    for (auto& worker : workers_) {
        if (worker != nullptr) wake(*worker);
    }
    for (auto& worker : workers_) {
        if (worker != nullptr) worker->thread.join();
    }
    for (auto& buffer : scratch_) std::free(buffer.data);
    for (auto& buffer : shared_scratch_) std::free(buffer.data);
}

void ProcessPool::grow(int threads, const Affinity& affinity) {
    if (static_cast<int>(scratch_.size()) < threads) {
        scratch_.resize(threads);
        shared_scratch_.resize(threads + 1);
    }
    if (affinity_.size() < affinity.size()) affinity_ = affinity;
    workers_.reserve(threads);
    for (int number = static_cast<int>(workers_.size()) + 1; number < threads; ++number) {
        std::vector<int> processors;
        if (number < static_cast<int>(affinity.size())) processors = affinity[number];
        auto worker = std::make_unique<Worker>();
        worker->thread = std::thread([this, self = worker.get(), number, processors] { serve(*self, number, processors); });
        workers_.push_back(std::move(worker));  // there is room: this does not throw
    }
}

std::vector<int> ProcessPool::place_for_caller(int threads) const {
    const int here = affinity_.empty() ? 0 : current_processor();
    for (size_t worker = 1; worker < affinity_.size() && static_cast<int>(worker) < threads; ++worker) {
        const auto& processors = affinity_[worker];
        if (std::find(processors.begin(), processors.end(), here) != processors.end()) return affinity_[0];
    }
    return {};
}

ThreadPool::SpinScope::SpinScope(ThreadPool& pool) : process_pool_(*pool.process_pool_) {
    process_pool_.set_spinning(pool.threads_);
    const std::vector<int> place = process_pool_.place_for_caller(pool.threads_);
    if (place.empty()) return;
    came_from_ = allowed_processors();
    keep_to(place);
}

ThreadPool::SpinScope::~SpinScope() {
    process_pool_.set_spinning(0);
    if (!came_from_.empty()) keep_to(came_from_);
}

ThreadPool::ThreadPool(int threads, const Affinity& affinity)
    : threads_(threads < 1 ? 1 : threads), process_pool_(ProcessPool::of_this_process()) {
    const Exclusive lock = exclusive();
    process_pool_->grow(threads_, affinity);
}

bool ThreadPool::reserve(size_t bytes) {
    for (int worker = 0; worker < threads_; ++worker) {
        if (!process_pool_->reserve(first_worker_ + worker, bytes)) return out_of_memory();
    }
    return true;
}

void* ThreadPool::shared_scratch(size_t bytes) {
    void* const data = process_pool_->shared_scratch(sub_pool_, bytes);
    if (data == nullptr) out_of_memory();
    return data;
}

bool ThreadPool::out_of_memory() {
    if (sub_pool_ == 0) throw std::bad_alloc();
    process_pool_->note_out_of_memory();
    return false;
}

void ProcessPool::run(int64_t items, Work work, void* context, int threads) {
    if (items <= 0) return;
    if (items == 1 || threads == 1 || items > kMostItems || orphaned_) {
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
    threads_.store(threads, std::memory_order_release);
    done_.store(0, std::memory_order_release);
    ticket_.store(static_cast<uint64_t>(generation) << 32);
    for (int worker = 1; worker < threads; ++worker) wake(*workers_[worker - 1]);
    take_items(generation, 0);
    for (int looks = 0; done_.load(std::memory_order_acquire) < items; ++looks) {
        if (looks < kLooksBeforeYield) {
            pause_briefly();
        } else {
            std::this_thread::yield();
        }
    }
}

void ProcessPool::wake(Worker& worker) {
    if (!worker.asleep.load()) return;
    std::lock_guard<std::mutex> lock(worker.mutex);
    worker.wake.notify_one();
}

// A job for fewer threads calls none beyond them: `threads_` is written before the ticket.
bool ProcessPool::is_called(uint32_t seen, int worker) const {
    return (generation_of(ticket_.load()) != seen && worker < threads_.load()) || stop_.load();
}

void ProcessPool::take_items(uint32_t generation, int worker) {
    if (worker >= threads_.load(std::memory_order_acquire)) return;
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

void ProcessPool::wait_for_job(uint32_t seen, Worker& self, int worker) {
    auto until = std::chrono::steady_clock::now() + kSpin;
    for (int looks = 1; !is_called(seen, worker); ++looks) {
        pause_briefly();
        if (looks % kLooksPerClock != 0) continue;
        const auto now = std::chrono::steady_clock::now();
        if (worker < spinning_threads_.load(std::memory_order_acquire)) {
            until = now + kSpin;
            if (looks > kLooksBeforeYield) std::this_thread::yield();
        } else if (now >= until) {
            break;
        }
    }
    std::unique_lock<std::mutex> lock(self.mutex);
    self.asleep.store(true);
    self.wake.wait(lock, [&] { return is_called(seen, worker); });
    self.asleep.store(false);
}

void ProcessPool::serve(Worker& self, int worker, const std::vector<int>& processors) {
    const FloatMode mode;  // not that of the thread that made this one
    keep_to(processors);
    uint32_t seen = 0;
    while (true) {
        wait_for_job(seen, self, worker);
        if (stop_.load()) return;
        seen = generation_of(ticket_.load(std::memory_order_acquire));
        take_items(seen, worker);
    }
}

void* ProcessPool::scratch(int worker, size_t bytes) {
    const Buffer& buffer = scratch_[worker];
    if (buffer.data == nullptr || buffer.bytes < bytes) std::abort();  // a kernel that did not reserve what it takes
    mark_usable(buffer.data, bytes, buffer.bytes);
    return buffer.data;
}

void* ProcessPool::at_least(Buffer& buffer, size_t bytes) {
    if (buffer.data == nullptr || buffer.bytes < bytes) {
        std::free(buffer.data);
        buffer = {};
        if (bytes > PTRDIFF_MAX / 2) return nullptr;
        const size_t more = (bytes + bytes / 2 + 64) / 64 * 64;
        buffer.data = std::aligned_alloc(64, more);
        if (buffer.data == nullptr) return nullptr;
        buffer.bytes = more;
    }
    mark_usable(buffer.data, bytes, buffer.bytes);
    return buffer.data;
}

}  // namespace quire
