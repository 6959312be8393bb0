// A model's step in one call: instructions over buffers in one arena, run one after another without the interpreter.
//
// The sizes that do not depend on the step are checked while the program is built, everything else once before it
// runs. docs/design/program.md
#pragma once

#include <functional>
#include <memory>
#include <tuple>
#include <vector>

#include "binding/checks.h"

namespace quire {

// Where a buffer begins, in floats for each token; its width; whether it holds TileRows; whether it passes: nothing reads
// it beyond one stage.
using ProgramBuffer = std::tuple<int64_t, int64_t, bool, bool>;

class Program {
public:
    // (buffer, offset, groups, width): of each row of a buffer, `groups * width` floats that begin at `offset`.
    using ViewNumbers = std::tuple<int64_t, int64_t, int64_t, int64_t>;

    // The arena has `kept` floats for each token, and `passing` for each that is in work. The buffer `result` is the
    // caller's array instead.
    Program(const Kernels& kernels, ThreadPool& pool, std::vector<ProgramBuffer> buffers, int64_t kept, int64_t passing,
            int64_t result);

    // Each appends an instruction. Products and what comes out of linear, norm and activation may be TileRows.
    void embed(bool positions, nb::handle table, float scale, ViewNumbers y);
    void linear(ViewNumbers x, nb::handle weight, bool adds, int kind, ViewNumbers y);
    void norm(ViewNumbers x, std::optional<ViewNumbers> residual, nb::handle weight, nb::handle bias, float eps,
              bool centre, ViewNumbers y);
    void add(ViewNumbers x, ViewNumbers y);
    void attention(std::tuple<ViewNumbers, ViewNumbers, ViewNumbers> qkv, int64_t layer, float scale, int64_t window,
                   float softcap, nb::handle sinks, nb::handle cos, nb::handle sin, std::vector<int64_t> narrows,
                   ViewNumbers y);
    void activation(ViewNumbers x, int kind, bool multiply, ViewNumbers y);

    // Runs all of it; `out` [outputs, width of the result]. `outputs` are tokens, of each row its last ones, or null: all.
    // From an attention that `narrows` on, only they are computed: their rows of those buffers move up.
    void run(nb::handle token_ids, nb::handle positions, nb::handle query_starts, nb::handle starts,
             nb::handle block_tables, nb::handle outputs, const Cache& cache, nb::handle out);

private:
    struct View {
        int64_t buffer, offset, groups, width;
        int64_t size() const { return groups * width; }
    };

    // What is known of one step only. A copy of it allocates nothing: workers make their own.
    struct Frame {
        const Program* program;
        ThreadPool* pool;         // that computes
        int64_t room, own_room;   // tokens for which there is memory: of what is kept, of what passes
        int64_t first, tokens;    // those that are computed
        float *kept, *own;
        float* result;
        const int32_t *token_ids, *positions;
        int64_t rows;
        const int32_t *query_starts, *starts, *tables;
        int64_t table_stride;
        bool private_writes;  // as in AttentionArgs
        const CacheLayout* cache;
        const int32_t* outputs;
        int64_t num_outputs;
        std::vector<int32_t>* narrowed;  // memory for `narrow`

        void narrow(const std::vector<int64_t>& buffers);
        float* at(const View& view) const;        // null for tiles
        TileRows tiles(const View& view) const;  // null for float32
        int64_t stride(const View& view) const { return program->width_of(view); }

        float* base(const View& view) const;
    };
    struct Instruction {
        std::function<void(Frame&)> run;
        Profile::Entry* times;
        bool by_row;  // all but attention
    };
    struct TokenTileArgs {
        const Program* program;
        const Frame* frame;
        size_t begin, end;      // instructions
        int64_t tile_tokens;
        int64_t* nanoseconds;  // [tiles][instructions]
    };
    using Clock = Profile::Clock;

    int64_t token_tile_size(int64_t tokens) const;
    void run_stage(Frame& frame, size_t begin, size_t end, Clock::time_point& begun) const;
    static void run_token_tile(void* context, int64_t item, int worker);

    // The first is of float32, the second may be of tiles; an output covers its buffer.
    View view(const ViewNumbers& numbers) const;
    View view_any(const ViewNumbers& numbers) const;
    View output(const ViewNumbers& numbers, int64_t size, const char* message) const;
    int64_t width_of(const View& view) const { return std::get<1>(buffers_[view.buffer]); }
    bool is_tiles(const View& view) const { return std::get<2>(buffers_[view.buffer]); }
    void append(const std::string& name, std::function<void(Frame&)> run, int64_t bytes = 0, int64_t num_operations = 0,
                bool by_row = true);
    const PackedLinear& keep_packed(nb::handle object);
    const float* keep_floats(nb::handle object, int64_t size, const char* name);
    RopeTables keep_tables(nb::handle cos, nb::handle sin, int64_t head_dim);
    static int64_t padded(int64_t tokens) { return (tokens + 15) / 16 * 16; }

    const Kernels& kernels_;
    ThreadPool& pool_;
    const std::vector<ProgramBuffer> buffers_;
    const int64_t kept_floats_, passing_floats_, result_;
    std::vector<Instruction> instructions_;
    std::vector<nb::object> kept_;
    std::vector<std::unique_ptr<Floats1>> vectors_;
    std::vector<std::unique_ptr<Floats2>> tables_;
    int64_t token_limit_ = INT64_MAX, position_limit_ = INT64_MAX, rope_limit_ = INT64_MAX;
    bool narrows_ = false;
    int64_t stage_bytes_ = 0, heaviest_stage_ = 0;  // of weights between two attentions
    int64_t layers_ = 0, kv_heads_ = 0, head_dim_ = 0;  // that the cache must have; 0 without attention
    std::unique_ptr<Pages> arena_;  // of the largest step so far
};

}  // namespace quire
