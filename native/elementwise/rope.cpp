// Rotary position embedding by halves, in place.
#include "elementwise/rotate.h"

namespace quire::QUIRE_ISA {

namespace {

void work(void* context, int64_t item, int) {
    const RopeArgs& args = *static_cast<const RopeArgs*>(context);
    const int64_t step = rows_per_item(args.tokens, args.heads * args.half * 2);
    const int64_t end = smaller(args.tokens, (item + 1) * step);
    for (int64_t token = item * step; token < end; ++token) {
        const int64_t row = args.positions[token] * args.half;
        for (int64_t head = 0; head < args.heads; ++head) {
            float* x = args.x + token * args.x_stride + head * args.head_dim;
            rotate_head(x, x, args.cos + row, args.sin + row, args.half);
        }
    }
}

}  // namespace

void rope(const RopeArgs& args, ThreadPool& pool) {
    const int64_t step = rows_per_item(args.tokens, args.heads * args.half * 2);
    pool.run((args.tokens + step - 1) / step, work, const_cast<RopeArgs*>(&args));
}

}  // namespace quire::QUIRE_ISA
