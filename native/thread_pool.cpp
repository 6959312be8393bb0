#include "thread_pool.h"

#if defined(__linux__)
#include <sched.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <new>

namespace quire {

namespace {

// A step of a model is hundreds of short jobs; waking a sleeping thread costs more than most of them. An idle
// worker therefore looks for the next job about this long before it sleeps; within a program it does not sleep.
constexpr auto kSpin = std::chrono::microseconds(80);
constexpr int kLooksPerClock = 64;
constexpr int kLooksBeforeYield = 4096;  // about as long: then whoever else wants the processor may have it

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

std::shared_ptr<Crew> Crew::of_this_process() {
    static std::mutex mutex;
    static std::weak_ptr<Crew> current;
    std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Crew> crew = current.lock();
    if (crew == nullptr || crew->owner_process_ != getpid()) {  // the workers do not follow into a fork
        crew = std::make_shared<Crew>();
        current = crew;
    }
    return crew;
}

Crew::Crew() : owner_process_(getpid()), scratch_(1), shared_scratch_(2) {}

Crew::~Crew() {
    if (getpid() != owner_process_) {
        // After a fork the workers do not exist here; joining them would wait for ever.
        for (auto& worker : workers_) worker.detach();
    } else {
        stop_.store(true);
        for (int worker = 1; worker <= static_cast<int>(workers_.size()); ++worker) wake(worker);
        for (auto& worker : workers_) worker.join();
    }
    for (auto& buffer : scratch_) std::free(buffer.data);
    for (auto& buffer : shared_scratch_) std::free(buffer.data);
}

void Crew::grow(int threads, const Affinity& affinity) {
    if (static_cast<int>(scratch_.size()) < threads) {
        scratch_.resize(threads);
        shared_scratch_.resize(threads + 1);
    }
    if (affinity_.size() < affinity.size()) affinity_ = affinity;
    for (int worker = static_cast<int>(workers_.size()) + 1; worker < threads; ++worker) {
        std::vector<int> processors;
        if (worker < static_cast<int>(affinity.size())) processors = affinity[worker];
        sleepers_.push_back(std::make_unique<Sleeper>());
        workers_.emplace_back([this, worker, processors] { serve(worker, processors); });
    }
}

std::vector<int> Crew::place_for_caller(int threads) const {
    const int here = affinity_.empty() ? 0 : current_processor();
    for (size_t worker = 1; worker < affinity_.size() && static_cast<int>(worker) < threads; ++worker) {
        const auto& processors = affinity_[worker];
        if (std::find(processors.begin(), processors.end(), here) != processors.end()) return affinity_[0];
    }
    return {};
}

ThreadPool::Hot::Hot(ThreadPool& pool) : crew_(*pool.crew_) {
    crew_.set_hot(pool.threads_);
    const std::vector<int> place = crew_.place_for_caller(pool.threads_);
    if (place.empty()) return;
    came_from_ = allowed_processors();
    keep_to(place);
}

ThreadPool::Hot::~Hot() {
    crew_.set_hot(0);
    if (!came_from_.empty()) keep_to(came_from_);
}

ThreadPool::ThreadPool(int threads, const Affinity& affinity)
    : threads_(threads < 1 ? 1 : threads), crew_(Crew::of_this_process()) {
    const auto lock = exclusive();
    crew_->grow(threads_, affinity);
}

void Crew::run(int64_t items, Work work, void* context, int threads) {
    if (items <= 0) return;
    if (items == 1 || threads == 1 || getpid() != owner_process_) {
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
    for (int worker = 1; worker < threads; ++worker) wake(worker);
    take_items(generation, 0);
    for (int looks = 0; done_.load(std::memory_order_acquire) < items; ++looks) {
        if (looks < kLooksBeforeYield) {
            pause_briefly();
        } else {
            std::this_thread::yield();
        }
    }
}

void Crew::wake(int worker) {
    Sleeper& sleeper = *sleepers_[worker - 1];
    if (!sleeper.asleep.load()) return;
    std::lock_guard<std::mutex> lock(sleeper.mutex);
    sleeper.wake.notify_one();
}

// A job for fewer threads calls nobody beyond them: `threads_` is written before the ticket.
bool Crew::is_called(uint32_t seen, int worker) const {
    return (generation_of(ticket_.load()) != seen && worker < threads_.load()) || stop_.load();
}

void Crew::take_items(uint32_t generation, int worker) {
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

void Crew::wait_for_job(uint32_t seen, int worker) {
    auto until = std::chrono::steady_clock::now() + kSpin;
    for (int looks = 1; !is_called(seen, worker); ++looks) {
        pause_briefly();
        if (looks % kLooksPerClock != 0) continue;
        const auto now = std::chrono::steady_clock::now();
        if (worker < hot_threads_.load(std::memory_order_acquire)) {
            until = now + kSpin;
            if (looks > kLooksBeforeYield) std::this_thread::yield();
        } else if (now >= until) {
            break;
        }
    }
    Sleeper& sleeper = *sleepers_[worker - 1];
    std::unique_lock<std::mutex> lock(sleeper.mutex);
    sleeper.asleep.store(true);
    sleeper.wake.wait(lock, [&] { return is_called(seen, worker); });
    sleeper.asleep.store(false);
}

void Crew::serve(int worker, const std::vector<int>& processors) {
    keep_to(processors);
    uint32_t seen = 0;
    while (true) {
        wait_for_job(seen, worker);
        if (stop_.load()) return;
        seen = generation_of(ticket_.load(std::memory_order_acquire));
        take_items(seen, worker);
    }
}

void* Crew::scratch(int worker, size_t bytes) { return at_least(scratch_[worker], bytes); }

void* Crew::shared_scratch(int lane, size_t bytes) { return at_least(shared_scratch_[lane], bytes); }

void* Crew::at_least(Buffer& buffer, size_t bytes) {
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
