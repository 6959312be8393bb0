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

// Where a buffer begins, in floats for each token; its width; whether it holds TileRows; whether it is local: nothing reads
// it beyond one segment, which is what lies between two attentions.
using ProgramBuffer = std::tuple<int64_t, int64_t, bool, bool>;

class Program {
public:
    // (buffer, offset, groups, width): of each row of a buffer, `groups * width` floats that begin at `offset`.
    using ViewNumbers = std::tuple<int64_t, int64_t, int64_t, int64_t>;

    // The arena has `persistent` floats for each token, and `local` for each that is in work. The buffer `result` is the
    // caller's array instead.
    Program(const Kernels& kernels, ThreadPool& pool, std::vector<ProgramBuffer> buffers, int64_t persistent, int64_t local,
            int64_t result);

    // Gives the class its operations, each of which appends an instruction (`operations.cpp`). Views that GEMMs read and
    // what comes out of linear, norm and activation may be TileRows.
    static void bind(nb::class_<Program>& program);

    // Runs all of it; `out` [outputs, width of the result]. `outputs` are tokens, of each row its last ones, or null: all.
    // From an attention with buffers `selected` on, only they are computed: their rows of those buffers move up.
    void run(nb::handle token_ids, nb::handle positions, nb::handle query_starts, nb::handle starts,
             nb::handle block_tables, nb::handle outputs, const Cache& cache, nb::handle out);

private:
    struct Operations;
    struct View {
        int64_t buffer, offset, groups, width;
        int64_t size() const { return groups * width; }
    };

    // What is known of one step only. A copy of it allocates nothing: workers make their own.
    struct Frame {
        const Program* program;
        ThreadPool* pool;         // that computes
        int64_t room, local_room;   // tokens for which there is memory: of persistent and of local buffers
        int64_t first, tokens;    // those that are computed
        float *persistent, *local;
        float* result;
        const int32_t *token_ids, *positions;
        int64_t rows;
        const int32_t *query_starts, *starts, *tables;
        int64_t table_stride;
        bool private_writes;  // as in AttentionArgs
        const CacheLayout* cache;
        const int32_t* outputs;
        int64_t num_outputs;
        std::vector<int32_t>* selected_rows;  // memory for `select_output_tokens`

        void select_output_tokens(const std::vector<int64_t>& buffers);
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
    void run_segment(Frame& frame, size_t begin, size_t end, Clock::time_point& begun) const;
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
    // Tokens that one thread takes through a segment, and the bytes of a segment's weights up to which they are taken so: each
    // token tile reads them again, from a cache that all processors share if they are few.
    static constexpr int64_t kMinTokenTile = 128, kMaxTokenTile = 256, kTokenTileWeights = int64_t{32} << 20;

    static int64_t padded(int64_t tokens) { return (tokens + 15) / 16 * 16; }

    const Kernels& kernels_;
    ThreadPool& pool_;
    const std::vector<ProgramBuffer> buffers_;
    const int64_t persistent_floats_, local_floats_, result_;
    std::vector<Instruction> instructions_;
    std::vector<nb::object> kept_;
    std::vector<std::unique_ptr<Floats1>> vectors_;
    std::vector<std::unique_ptr<Floats2>> tables_;
    int64_t token_limit_ = INT64_MAX, position_limit_ = INT64_MAX, rope_limit_ = INT64_MAX;
    bool selects_ = false;
    int64_t segment_bytes_ = 0, largest_segment_ = 0;  // of weights between two attentions
    int64_t layers_ = 0, kv_heads_ = 0, head_dim_ = 0;  // that the cache must have; 0 without attention
    std::unique_ptr<Pages> arena_;  // of the largest step so far
};

}  // namespace quire
