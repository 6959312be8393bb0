// Epilogues that are interleaved with the GEMM: results of a block of rows by one panel of tiles, a row at a time, are
// written between the tile instructions of the next block.
//
// Written so that a compiler keeps where they go in registers: a row finished by a call, which computes its address anew,
// made the GEMM of 256 rows take 1.13 to 1.2 times as long (docs/design/amx.md).
#pragma once

#include "gemm/epilogue.h"

namespace quire::QUIRE_ISA {

// Any form of results.
class AnyResults {
public:
    explicit AnyResults(const LinearArgs& args) : args_(&args) {}

    // The rows [row, end), from sums [end - row][32].
    void begin(int64_t panel, int64_t row, int64_t end, const float* sums) {
        panel_ = panel;
        row_ = row;
        end_ = end;
        sums_ = sums;
    }
    void step() {
        for (const int64_t last = smaller(row_ + kRows, end_); row_ < last; ++row_, sums_ += kTilePanel) {
            finish_row<kTilePanel>(*args_, panel_, row_, sums_);
        }
    }
    void finish() {
        while (row_ < end_) step();
    }

private:
    static constexpr int64_t kRows = 4;  // at once: one by one, calls cost more

    const LinearArgs* args_;
    int64_t panel_ = 0, row_ = 0, end_ = 0;
    const float* sums_ = nullptr;
};

// Floats, written or added to what is there.
template <bool Add>
class PlainResults {
public:
    explicit PlainResults(const LinearArgs& args)
        : y_(args.y), all_bias_(args.weight.bias), stride_(args.weight.out_width()),
          far_(args.rows * stride_ * int64_t{sizeof(float)} > kStaysBytes) {}

    void begin(int64_t panel, int64_t row, int64_t end, const float* sums) {
        to_ = y_ + row * stride_ + panel * kTilePanel;
        bias_ = all_bias_ == nullptr ? nullptr : all_bias_ + panel * kTilePanel;
        left_ = end - row;
        sums_ = sums;
    }
    inline void step() {
        if (left_ <= 0) return;
        for (int64_t i = 0; i < kTilePanel; i += kLanes) {
            Floats y = load(sums_ + i);
            if (bias_ != nullptr) y = y + load(bias_ + i);
            store(to_ + i, Add ? load(to_ + i) + y : y);
        }
        if (far_) {
            __builtin_prefetch(to_ + kTileSide * stride_, 0, 2);
            __builtin_prefetch(to_ + kTileSide * stride_ + kLanes, 0, 2);
        }
        to_ += stride_;
        sums_ += kTilePanel;
        --left_;
    }
    inline void finish() {
        while (left_ > 0) step();
    }

private:
    static constexpr int64_t kStaysBytes = 1 << 21;  // of y: up to here it is in the L2, or may be

    float* y_;
    const float* all_bias_;
    int64_t stride_, left_ = 0;
    bool far_;  // the rows of the next block are prefetched
    float* to_ = nullptr;
    const float *bias_ = nullptr, *sums_ = nullptr;
};

// Gate and up to rows of bfloat16.
template <Activation Kind>
class GatedResults {
public:
    explicit GatedResults(const LinearArgs& args) : y_(args.y_tiles) {}

    void begin(int64_t panel, int64_t row, int64_t end, const float* sums) {
        panel_ = panel;
        row_ = row;
        end_ = end;
        sums_ = sums;
        to_ = place();
    }
    inline void step() {
        if (row_ >= end_) return;
        float values[kHalf];
        for (int64_t i = 0; i < kHalf; i += kLanes) {
            store(values + i, activate(Kind, load(sums_ + i)) * load(sums_ + kHalf + i));
        }
        round_half(values, to_);
        sums_ += kTilePanel;
        ++row_;
        to_ = row_ % kTileSide == 0 ? place() : to_ + kTileDepth;
    }
    inline void finish() {
        while (row_ < end_) step();
    }

private:
    static constexpr int64_t kHalf = kTilePanel / 2;

    uint16_t* place() const { return y_.at(row_, panel_ / 2) + panel_ % 2 * kHalf; }

    TileRows y_;
    int64_t panel_ = 0, row_ = 0, end_ = 0;
    uint16_t* to_ = nullptr;
    const float* sums_ = nullptr;
};

// Calls `use` with the class that writes the results of `args`.
template <class Use>
static inline void with_results(const LinearArgs& args, Use use) {
#if QUIRE_AMX
    const bool whole = args.weight.out_width() % kTilePanel == 0;  // no panel is partly padding, nor a row's last chunk
    if (whole && args.best == nullptr && args.scale == 1.0f && args.softcap == 0.0f) {
        if (!args.weight.gated && args.y != nullptr) {
            return args.add ? use(PlainResults<true>(args)) : use(PlainResults<false>(args));
        }
        const bool rounded = args.weight.gated && args.y == nullptr && args.weight.bias == nullptr;
        if (rounded && args.activation == Activation::silu) return use(GatedResults<Activation::silu>(args));
        if (rounded && args.activation == Activation::gelu_tanh) return use(GatedResults<Activation::gelu_tanh>(args));
    }
#endif
    use(AnyResults(args));
}

}  // namespace quire::QUIRE_ISA
