// The frame that the kernels of `linear` share: one launch prepares the activations in the order that the kernel reads,
// partitions the weight into runs of panels, and computes one work item for each run and group of rows. What a kernel does
// with an item is its own: `vector/`, `vnni/`, `amx/`.
#pragma once

#include "gemm/epilogue.h"

namespace quire::QUIRE_ISA {

constexpr int64_t kSerialInputs = 32768;  // activations that one thread prepares faster than it wakes others to help

// What the work items of a launch have in common; a kernel adds its own.
struct GemmLaunch {
    const LinearArgs* args;
    ThreadPool* pool;
    uint8_t* x;         // the activations as the kernel reads them
    float* x_scales;    // [rows], of quantized activations
    int32_t* borders;   // [runs + 1]: the panels of each run
    int64_t row_groups;  // work items of a run

    struct Item {
        int64_t first_panel, last_panel, row_group;
    };

    Item item(int64_t index) const {
        const int64_t run = index / row_groups;
        return {borders[run], borders[run + 1], index % row_groups};
    }
    const uint8_t* panel(int64_t index) const {
        return static_cast<const uint8_t*>(args->weight.data) + index * args->weight.bytes_each();
    }

    // Before anything else: `x_bytes` for the activations and `scratch_bytes` for each thread. False where a sub-pool has no
    // memory.
    bool reserve(const LinearArgs& linear, ThreadPool& threads, int64_t x_bytes, int64_t scratch_bytes) {
        args = &linear;
        pool = &threads;
        const int64_t scales_at = (x_bytes + 63) / 64 * 64, words = args->rows + args->weight.panels() + 1;
        x = static_cast<uint8_t*>(pool->shared_scratch(scales_at + words * 4));
        if (x == nullptr) return false;
        x_scales = reinterpret_cast<float*>(x + scales_at);
        borders = reinterpret_cast<int32_t*>(x_scales + args->rows);
        return pool->reserve(scratch_bytes);
    }
    uint8_t* scratch(int worker, int64_t bytes) const {
        return static_cast<uint8_t*>(pool->scratch(worker, bytes));
    }
};

// Calls work(&launch, item) for each of the rows, or blocks of rows, whose activations it prepares.
template <class Launch>
void prepare_activations(Launch& launch, int64_t items, Work work) {
    if (launch.args->rows * launch.args->weight.in >= kSerialInputs) return launch.pool->run(items, work, &launch);
    for (int64_t item = 0; item < items; ++item) work(&launch, item, 0);
}

// Runs of panels that shrink towards the end: long enough to stream, and no thread waits long for the last one. Items of
// other rows share a run: where they are many they even things out. One thread never waits.
template <class Launch>
void run_panels(Launch& launch, int64_t longest, int64_t row_groups, Work work) {
    const int64_t panels = launch.args->weight.panels(), threads = launch.pool->threads();
    int64_t runs = 0;
    launch.borders[0] = 0;
    for (int64_t first = 0; first < panels;) {
        const int64_t left = panels - first, share = threads == 1 ? left : left * row_groups / (2 * threads);
        first += larger(1, smaller(smaller(share, longest), left));
        launch.borders[++runs] = static_cast<int32_t>(first);
    }
    launch.row_groups = row_groups;
    launch.pool->run(runs * row_groups, work, &launch);
}

// Memory that is prefetched into the L2, some lines at a time, up to `end`: another thread reads on there. The L1 has too
// few requests on their way to keep memory busy.
struct Prefetcher {
    const char *at, *end;

    inline void step(int64_t lines) {
        if (at >= end) return;
        for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(at + line * 64, 0, 2);
        at += lines * 64;
    }
};

// The same into the L1: `bytes` from `at` on.
static inline void prefetch_lines(const void* at, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(at) + line);
}

// Calls use(first, count) for blocks of at most `most` rows. 8 rows are 4 + 4, not 6 + 2: even blocks keep more sums in
// flight.
template <class Use>
static inline void for_even_blocks(int64_t rows, int64_t most, Use&& use) {
    for (int64_t row = 0; row < rows;) {
        const int64_t blocks = (rows - row + most - 1) / most, now = (rows - row + blocks - 1) / blocks;
        use(row, now);
        row += now;
    }
}

template <int N>
struct Count {
    static constexpr int value = N;
};

// Calls use(Count<rows>{}) for `rows` in [1, Most]: sums of so many rows are held in registers. One row, a decode step, is
// found first.
template <int Most, int N = 1, class Use>
static inline void with_row_count(int64_t rows, Use&& use) {
    if constexpr (N < Most) {
        if (rows > N) return with_row_count<Most, N + 1>(rows, use);
    }
    use(Count<N>{});
}

}  // namespace quire::QUIRE_ISA
