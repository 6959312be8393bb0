#include "program/program.h"

#include <cstring>
#include <numeric>

namespace quire {

namespace {

constexpr int64_t kTokenTileStep = 32;

void require_outputs(const Ints1& outputs, const Ints1& query_starts, bool selects) {
    require(selects, "program: this one gives all of its tokens");
    int64_t next = 0;
    for (int64_t row = 0; row + 1 < query_starts.size(0); ++row) {
        const int64_t end = query_starts.data()[row + 1];
        const int64_t first = next < outputs.size(0) ? std::max(outputs.data()[next], query_starts.data()[row]) : end;
        for (int64_t token = first; token < end; ++token, ++next) {
            require(next < outputs.size(0) && outputs.data()[next] == token, "program: outputs are not a row's last tokens");
        }
    }
    require(next == outputs.size(0), "program: outputs are not a row's last tokens");
}

}  // namespace

Program::Program(const Kernels& kernels, ThreadPool& pool, std::vector<ProgramBuffer> buffers, int64_t persistent,
                 int64_t local, int64_t result)
    : kernels_(kernels), pool_(pool), buffers_(std::move(buffers)), persistent_floats_(persistent), local_floats_(local),
      result_(result) {
    const int64_t count = static_cast<int64_t>(buffers_.size());
    require(persistent >= 0 && local >= 0, "program: the arena has no size");
    require(result >= 0 && result < count && !std::get<2>(buffers_[result]), "program: no such result");
    for (int64_t buffer = 0; buffer < count; ++buffer) {
        const auto [offset, width, tiles, is_local] = buffers_[buffer];
        const int64_t floats = is_local ? local : persistent;
        require(is_local || !tiles, "program: tiles do not outlive a segment");
        require(width >= 0 && width < INT32_MAX && offset >= 0, "program: a buffer has no size");
        const int64_t size = tiles ? (width + kTileDepth - 1) / kTileDepth * kTileDepth / 2 : width;
        const bool fits = offset <= floats && size <= floats - offset;
        require(buffer == result || fits, "program: a buffer is outside the arena");
    }
}

float* Program::Frame::base(const View& view) const {
    if (view.buffer == program->result_) return result + first * program->width_of(view);
    const auto [offset, width, tiles, is_local] = program->buffers_[view.buffer];
    return is_local ? local + offset * padded(local_room) : persistent + offset * padded(room) + first * width;
}

void Program::Frame::select_output_tokens(const std::vector<int64_t>& buffers) {
    for (const int64_t buffer : buffers) {
        const View all{buffer, 0, 1, std::get<1>(program->buffers_[buffer])};
        for (int64_t i = 0; i < num_outputs; ++i) {
            std::memmove(base(all) + i * all.width, base(all) + outputs[i] * all.width, all.width * sizeof(float));
        }
    }
    int32_t* const selected_starts = selected_rows->data();
    int32_t* const selected_query_starts = selected_starts + rows;
    selected_query_starts[0] = 0;
    for (int64_t row = 0, next = 0; row < rows; ++row) {
        const int64_t end = query_starts[row + 1];
        while (next < num_outputs && outputs[next] < end) ++next;
        const int64_t count = next - selected_query_starts[row];
        selected_starts[row] = static_cast<int32_t>(starts[row] + end - query_starts[row] - count);
        selected_query_starts[row + 1] = static_cast<int32_t>(next);
    }
    tokens = num_outputs;
    query_starts = selected_query_starts;
    starts = selected_starts;
}

float* Program::Frame::at(const View& view) const {
    return program->is_tiles(view) ? nullptr : base(view) + view.offset;
}

TileRows Program::Frame::tiles(const View& view) const {
    if (!program->is_tiles(view)) return {};
    return {reinterpret_cast<uint16_t*>(base(view)), tokens, view.width};
}

Program::View Program::view_any(const ViewNumbers& numbers) const {
    const auto [buffer, offset, groups, width] = numbers;
    require(buffer >= 0 && buffer < static_cast<int64_t>(buffers_.size()), "program: no such buffer");
    const int64_t whole = std::get<1>(buffers_[buffer]);
    const bool tiles = std::get<2>(buffers_[buffer]);
    require(offset >= 0 && groups > 0 && width > 0 && offset <= whole && width <= whole &&
                groups <= (whole - offset) / width,
            "program: a view is outside its buffer");
    require(!tiles || (groups == 1 && width == whole), "program: a view of tiles is all of them");
    return {buffer, offset, groups, width};
}

Program::View Program::view(const ViewNumbers& numbers) const {
    const View result = view_any(numbers);
    require(!is_tiles(result), "program: a view of tiles where float32 is needed");
    return result;
}

Program::View Program::output(const ViewNumbers& numbers, int64_t size, const char* message) const {
    const View result = view_any(numbers);
    require(result.size() == size && width_of(result) == size, message);
    return result;
}

void Program::append(const std::string& name, std::function<void(Frame&)> run, int64_t bytes, int64_t num_operations,
                     bool by_row) {
    const nb::gil_scoped_release unlocked;
    const Exclusive lock = pool_.exclusive();
    instructions_.push_back({std::move(run), &pool_.profile().entry(name, bytes, num_operations), by_row});
}

const PackedLinear& Program::keep_packed(nb::handle object) {
    const PackedLinear& packed = nb::cast<const PackedLinear&>(object);
    require_packed_here(kernels_, packed);
    kept_.push_back(nb::borrow(object));
    return packed;
}

const float* Program::keep_floats(nb::handle object, int64_t size, const char* name) {
    if (object.is_none()) return nullptr;
    vectors_.push_back(std::make_unique<Floats1>(object, name));
    require(vectors_.back()->size(0) == size, "program: a vector has the wrong length");
    return vectors_.back()->data();
}

RopeTables Program::keep_tables(nb::handle cos_, nb::handle sin_, int64_t head_dim) {
    if (cos_.is_none()) return {};
    tables_.push_back(std::make_unique<Floats2>(cos_, "cos"));
    const Floats2& cos = *tables_.back();
    tables_.push_back(std::make_unique<Floats2>(sin_, "sin"));
    const Floats2& sin = *tables_.back();
    require_rope_tables(cos, sin, head_dim);
    rope_limit_ = std::min(rope_limit_, cos.size(0));
    return {cos.data(), sin.data(), cos.size(1)};
}

void Program::run(nb::handle token_ids_, nb::handle positions_, nb::handle query_starts_, nb::handle starts_,
                  nb::handle tables_, nb::handle outputs_, const Cache& cache, nb::handle out_) {
    Ints1 token_ids(token_ids_, "token_ids"), positions(positions_, "positions");
    Ints1 query_starts(query_starts_, "query_starts"), starts(starts_, "starts");
    Ints2 tables(tables_, "block_tables");
    Floats2 out(out_, "out", true);
    const int64_t tokens = token_ids.size(0);
    require(positions.size(0) == tokens, "program: one position for each token is needed");
    require_ids(token_ids, token_limit_, "embed: a token id is outside the table");
    require_ids(positions, position_limit_, "embed: a position is outside the table");
    std::optional<Ints1> outputs;
    if (!outputs_.is_none()) outputs.emplace(outputs_, "outputs");
    const int64_t num_outputs = outputs.has_value() ? outputs->size(0) : tokens;
    require(out.size(0) == num_outputs && out.size(1) == std::get<1>(buffers_[result_]),
            "program: out has the wrong shape");
    require_contiguous(out, "program: out is not contiguous");
    const CacheLayout& layout = cache.layout();
    require(layers_ <= layout.layers, "attention: no such layer");
    require(layers_ == 0 || head_dim_ == layout.head_dim, "attention: head_dim is not the cache's");
    require(layers_ == 0 || kv_heads_ == layout.kv_heads, "attention: heads do not fit the cache's kv_heads");
    require_rows(tokens, layout, query_starts, starts, tables);
    require_rope_covers(rope_limit_, query_starts, starts);
    if (outputs.has_value()) require_outputs(*outputs, query_starts, selects_);
    const int64_t in_work = token_tile_size(tokens) < tokens ? pool_.threads() * kMaxTokenTile : tokens;
    std::vector<int32_t> selected_rows(num_outputs < tokens ? 2 * starts.size(0) + 1 : 0);
    Frame frame{this, &pool_, tokens, in_work, 0, tokens, nullptr, nullptr, out.data(), token_ids.data(),
                positions.data(), starts.size(0), query_starts.data(), starts.data(), tables.data(), tables.stride(),
                writes_are_private(layout, query_starts, starts, tables), &layout,
                outputs.has_value() ? outputs->data() : nullptr, num_outputs, &selected_rows};
    const size_t persistent_bytes = checked_bytes({persistent_floats_, padded(tokens), sizeof(float)});
    const size_t bytes = persistent_bytes + checked_bytes({local_floats_, padded(in_work), sizeof(float)});
    nb::gil_scoped_release unlocked;
    const auto lock = pool_.exclusive();
    if (arena_ == nullptr || arena_->bytes() < bytes) {
        arena_.reset();
        arena_ = std::make_unique<Pages>(bytes, true);
    }
    const ThreadPool::SpinScope spin(pool_);
    frame.persistent = static_cast<float*>(arena_->data());
    frame.local = frame.persistent + persistent_bytes / sizeof(float);
    auto begun = Clock::now();
    for (size_t at = 0; at < instructions_.size() && frame.tokens > 0;) {  // else no output needs what would follow
        size_t end = at;
        while (end < instructions_.size() && instructions_[end].by_row) ++end;
        if (end > at && token_tile_size(frame.tokens) < frame.tokens) {
            run_segment(frame, at, end, begun);
            at = end;
        } else {
            instructions_[at].run(frame);
            instructions_[at++].times->add(frame.tokens, begun);
        }
    }
}

// Many tokens are divided so that what an operation hands on stays in a thread's own cache; few are computed by all threads
// together, so that each weight is read once.
int64_t Program::token_tile_size(int64_t tokens) const {
    const int64_t threads = pool_.threads();
    if (tokens < threads * kMinTokenTile || largest_segment_ > kTokenTileWeights) return tokens;
    const int64_t tiles = (tokens + threads * kMaxTokenTile - 1) / (threads * kMaxTokenTile) * threads;
    return (tokens + tiles * kTokenTileStep - 1) / (tiles * kTokenTileStep) * kTokenTileStep;
}

// The operations between two attentions, on tiles of tokens. What an operation took is its share of the whole.
void Program::run_segment(Frame& frame, size_t begin, size_t end, Clock::time_point& begun) const {
    const int64_t tile_tokens = token_tile_size(frame.tokens), tiles = (frame.tokens + tile_tokens - 1) / tile_tokens;
    const size_t count = end - begin;
    std::vector<int64_t> nanoseconds(tiles * count);
    TokenTileArgs job{this, &frame, begin, end, tile_tokens, nanoseconds.data()};
    pool_.run(tiles, run_token_tile, &job);
    if (pool_.sub_pool_was_out_of_memory()) throw std::bad_alloc();
    const Clock::time_point then = begun;
    begun = Clock::now();
    const double all = std::max<int64_t>(1, std::accumulate(nanoseconds.begin(), nanoseconds.end(), int64_t{0}));
    const double share = Profile::nanoseconds_between(then, begun) / all;
    for (size_t i = 0; i < count; ++i) {
        int64_t sum = 0;
        for (size_t at = i; at < nanoseconds.size(); at += count) sum += nanoseconds[at];
        instructions_[begin + i].times->add(frame.tokens, tiles, static_cast<int64_t>(sum * share));
    }
}

void Program::run_token_tile(void* context, int64_t item, int worker) {
    const TokenTileArgs& job = *static_cast<const TokenTileArgs*>(context);
    const Program& program = *job.program;
    ThreadPool sub_pool = program.pool_.sub_pool(worker);
    Frame frame = *job.frame;
    frame.pool = &sub_pool;
    frame.first = item * job.tile_tokens;
    frame.tokens = std::min(job.tile_tokens, job.frame->tokens - frame.first);
    frame.local_room = job.tile_tokens;
    frame.local += worker * program.local_floats_ * padded(job.tile_tokens);
    int64_t* const nanoseconds = job.nanoseconds + item * static_cast<int64_t>(job.end - job.begin);
    auto begun = Clock::now();
    for (size_t i = job.begin; i < job.end; ++i) {
        program.instructions_[i].run(frame);
        const Clock::time_point then = begun;
        begun = Clock::now();
        nanoseconds[i - job.begin] = Profile::nanoseconds_between(then, begun);
    }
}

}  // namespace quire
