// Rotary position embedding by halves, in place.
#include "functions.h"

namespace quire::QUIRE_ISA {

namespace {

void rotate_head(float* a, float* b, const float* cos, const float* sin, int64_t half) {
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const Floats c = load(cos + i), s = load(sin + i);
        const Floats first = load(a + i), second = load(b + i);
        store(a + i, first * c - second * s);
        store(b + i, second * c + first * s);
    }
    for (; i < half; ++i) {
        const float first = a[i], second = b[i];
        a[i] = first * cos[i] - second * sin[i];
        b[i] = second * cos[i] + first * sin[i];
    }
}

void work(void* context, int64_t item, int) {
    const RopeArgs& args = *static_cast<const RopeArgs*>(context);
    const int64_t step = rows_per_item(args.tokens, args.heads * args.half * 2);
    const int64_t end = smaller(args.tokens, (item + 1) * step);
    for (int64_t token = item * step; token < end; ++token) {
        const int64_t row = args.positions[token] * args.half;
        for (int64_t head = 0; head < args.heads; ++head) {
            float* x = args.x + token * args.x_stride + head * args.head_dim;
            rotate_head(x, x + args.half, args.cos + row, args.sin + row, args.half);
        }
    }
}

}  // namespace

void rope(const RopeArgs& args, ThreadPool& pool) {
    const int64_t step = rows_per_item(args.tokens, args.heads * args.half * 2);
    pool.run((args.tokens + step - 1) / step, work, const_cast<RopeArgs*>(&args));
}

}  // namespace quire::QUIRE_ISA
