#include "program/program.h"

#include <cstring>
#include <numeric>

namespace quire {

namespace {

constexpr int64_t kAddedRows = 16;  // in an item
// Tokens that one thread takes through a stage, and the bytes of a stage's weights up to which they are taken so: each token
// tile reads them again, from a cache that all processors share if they are few.
constexpr int64_t kMinTokenTile = 128, kMaxTokenTile = 256, kTokenTileStep = 32;
constexpr int64_t kTokenTileWeights = int64_t{32} << 20;

struct AddJob {
    const float* x;
    int64_t x_stride;
    float* y;
    int64_t y_stride, rows, size;
};

void add_rows(void* context, int64_t item, int) {
    const AddJob& job = *static_cast<const AddJob*>(context);
    const int64_t last = std::min(job.rows, (item + 1) * kAddedRows);
    for (int64_t row = item * kAddedRows; row < last; ++row) {
        const float* const x = job.x + row * job.x_stride;
        float* const y = job.y + row * job.y_stride;
        for (int64_t i = 0; i < job.size; ++i) y[i] += x[i];
    }
}

void require_outputs(const Ints1& outputs, const Ints1& query_starts, bool narrows) {
    require(narrows, "program: this one gives all of its tokens");
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

Program::Program(const Kernels& kernels, ThreadPool& pool, std::vector<ProgramBuffer> buffers, int64_t kept,
                 int64_t passing, int64_t result)
    : kernels_(kernels), pool_(pool), buffers_(std::move(buffers)), kept_floats_(kept), passing_floats_(passing),
      result_(result) {
    const int64_t count = static_cast<int64_t>(buffers_.size());
    require(kept >= 0 && passing >= 0, "program: the arena has no size");
    require(result >= 0 && result < count && !std::get<2>(buffers_[result]), "program: no such result");
    for (int64_t buffer = 0; buffer < count; ++buffer) {
        const auto [offset, width, tiles, passes] = buffers_[buffer];
        const int64_t floats = passes ? passing : kept;
        require(passes || !tiles, "program: tiles do not outlive a stage");
        require(width >= 0 && width < INT32_MAX && offset >= 0, "program: a buffer has no size");
        const int64_t size = tiles ? (width + kTileDepth - 1) / kTileDepth * kTileDepth / 2 : width;
        const bool fits = offset <= floats && size <= floats - offset;
        require(buffer == result || fits, "program: a buffer is outside the arena");
    }
}

float* Program::Frame::base(const View& view) const {
    if (view.buffer == program->result_) return result + first * program->width_of(view);
    const auto [offset, width, tiles, passes] = program->buffers_[view.buffer];
    return passes ? own + offset * padded(own_room) : kept + offset * padded(room) + first * width;
}

void Program::Frame::narrow(const std::vector<int64_t>& buffers) {
    for (const int64_t buffer : buffers) {
        const View all{buffer, 0, 1, std::get<1>(program->buffers_[buffer])};
        for (int64_t i = 0; i < num_outputs; ++i) {
            std::memmove(base(all) + i * all.width, base(all) + outputs[i] * all.width, all.width * sizeof(float));
        }
    }
    int32_t* const narrow_starts = narrowed->data();
    int32_t* const narrow_query_starts = narrow_starts + rows;
    narrow_query_starts[0] = 0;
    for (int64_t row = 0, next = 0; row < rows; ++row) {
        const int64_t end = query_starts[row + 1];
        while (next < num_outputs && outputs[next] < end) ++next;
        const int64_t kept = next - narrow_query_starts[row];
        narrow_starts[row] = static_cast<int32_t>(starts[row] + end - query_starts[row] - kept);
        narrow_query_starts[row + 1] = static_cast<int32_t>(next);
    }
    tokens = num_outputs;
    query_starts = narrow_query_starts;
    starts = narrow_starts;
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

void Program::embed(bool positions, nb::handle table_, float scale, ViewNumbers y_) {
    const PackedLinear& table = keep_packed(table_);
    const View y = output(y_, table.in, "embed: y has the wrong shape");
    require(!is_tiles(y) && !table.gated, "embed: a table of another kind");
    int64_t& limit = positions ? position_limit_ : token_limit_;
    limit = std::min(limit, table.out);
    append("embed", [=, &table](const Frame& frame) {
        const int32_t* const ids = (positions ? frame.positions : frame.token_ids) + frame.first;
        kernels_.embed(EmbedArgs{ids, frame.tokens, table.panels(), scale, frame.at(y)}, *frame.pool);
    });
}

void Program::linear(ViewNumbers x_, nb::handle weight_, bool adds, int kind, ViewNumbers y_) {
    const PackedLinear& weight = keep_packed(weight_);
    const View x = view_any(x_), y = output(y_, weight.out_width(), "linear: y has the wrong shape");
    const Activation activation = activation_numbered(kind);
    require(x.size() == weight.in, "linear: the width of x is not the weight's");
    require(!is_tiles(x) || weight.reads_tiles(), "linear: the weight does not read tiles");
    require(!adds || !is_tiles(y), "linear: tiles of bfloat16 are not added to");
    const auto compute = [=, &weight](const Frame& frame) {
        LinearArgs args{};
        args.x = frame.at(x);
        args.x_stride = frame.stride(x);
        args.rows = frame.tokens;
        args.x_tiles = frame.tiles(x);
        args.weight = weight.panels();
        args.y = frame.at(y);
        args.add = adds;
        args.y_tiles = frame.tiles(y);
        args.activation = activation;
        args.scale = 1.0f;
        kernels_.linear(args, *frame.pool);
    };
    const std::string name = weight.gated ? "gated_linear" : adds ? "linear, added" : "linear";
    append(name + " " + weight.text(), compute, weight.bytes(), weight.num_operations());
    stage_bytes_ += weight.bytes();
    heaviest_stage_ = std::max(heaviest_stage_, stage_bytes_);
}

void Program::norm(ViewNumbers x_, std::optional<ViewNumbers> residual_, nb::handle weight_, nb::handle bias_,
                   float eps, bool centre, ViewNumbers y_) {
    const View x = view(x_), y = output(y_, x.size(), "norm: y has the wrong shape");
    const View residual = residual_.has_value() ? view(*residual_) : View{};
    const bool adds = residual_.has_value();
    const float* const weight = keep_floats(weight_, x.width, "weight");
    const float* const bias = keep_floats(bias_, x.width, "bias");
    require(weight != nullptr, "norm: there is no weight");
    require(!is_tiles(y) || x.groups == 1, "norm: y has the wrong shape");
    require(!adds || (residual.size() == x.size() && x.groups == 1), "norm: residual has the wrong shape");
    append("norm", [=](const Frame& frame) {
        NormArgs args{};
        args.x = frame.at(x);
        args.x_stride = frame.stride(x);
        args.groups = x.groups;
        args.rows = frame.tokens * x.groups;
        args.size = x.width;
        if (adds) {
            args.residual = frame.at(residual);
            args.residual_stride = frame.stride(residual);
        }
        args.weight = weight;
        args.bias = bias;
        args.eps = eps;
        args.centre = centre;
        args.y = frame.at(y);
        args.y_tiles = frame.tiles(y);
        kernels_.norm(args, *frame.pool);
    });
}

void Program::add(ViewNumbers x_, ViewNumbers y_) {
    const View x = view(x_), y = view(y_);
    require(x.size() == y.size(), "add: x and y differ in shape");
    append("add", [=](const Frame& frame) {
        AddJob job{frame.at(x), frame.stride(x), frame.at(y), frame.stride(y), frame.tokens, x.size()};
        frame.pool->run((frame.tokens + kAddedRows - 1) / kAddedRows, add_rows, &job);
    });
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

void Program::attention(std::tuple<ViewNumbers, ViewNumbers, ViewNumbers> qkv, int64_t layer, float scale,
                        int64_t window, float softcap, nb::handle sinks_, nb::handle cos, nb::handle sin,
                        std::vector<int64_t> narrows, ViewNumbers y_) {
    const View q = view(std::get<0>(qkv)), k = view(std::get<1>(qkv)), v = view(std::get<2>(qkv));
    const View y = output(y_, q.size(), "attention: out has the wrong shape");
    require(layer >= 0, "attention: no such layer");
    require(k.groups == v.groups && q.groups % k.groups == 0, "attention: heads do not fit the cache's kv_heads");
    require(q.width == k.width && q.width == v.width, "attention: head_dim is not the cache's");
    require(!is_tiles(y), "attention: out has the wrong shape");
    require(window > 0, "attention: a window is at least 1");
    require(layers_ == 0 || (kv_heads_ == k.groups && head_dim_ == q.width), "attention: layers differ in shape");
    const float* const sinks = keep_floats(sinks_, q.groups, "sinks");
    const RopeTables tables = keep_tables(cos, sin, q.width);
    stage_bytes_ = 0;
    layers_ = std::max(layers_, layer + 1);
    kv_heads_ = k.groups;
    head_dim_ = q.width;
    for (const int64_t buffer : narrows) {
        const bool exists = buffer >= 0 && buffer < static_cast<int64_t>(buffers_.size());
        require(exists && !std::get<2>(buffers_[buffer]) && buffer != result_, "program: no such buffer to narrow");
    }
    require(narrows.empty() || !narrows_, "program: a step is narrowed once");
    narrows_ = narrows_ || !narrows.empty();
    append(window == INT64_MAX ? "attention" : "attention, window", [=](Frame& frame) {
        AttentionArgs args{frame.at(q), frame.at(k), frame.at(v), frame.stride(q), frame.stride(k),
                           frame.stride(v), q.groups, *frame.cache, layer, frame.rows,
                           frame.query_starts, frame.starts, frame.tables, frame.table_stride,
                           frame.private_writes, scale, window, softcap, sinks, tables, frame.at(y)};
        if (frame.num_outputs < frame.tokens && !narrows.empty()) {
            args.out = nullptr;
            kernels_.attention(args, pool_);
            frame.narrow(narrows);
            args.k = args.v = nullptr;
            args.query_starts = frame.query_starts;
            args.starts = frame.starts;
            args.out = frame.at(y);
        }
        if (frame.tokens > 0) kernels_.attention(args, pool_);
    }, 0, 0, false);
}

void Program::activation(ViewNumbers x_, int kind_, bool multiply, ViewNumbers y_) {
    const View x = view(x_);
    const int64_t size = multiply ? x.size() / 2 : x.size();
    const View y = output(y_, size, "activation: y has the wrong shape");
    const Activation kind = activation_numbered(kind_);
    require(!multiply || x.size() == 2 * size, "activation: y has the wrong shape");
    append("activation", [=](const Frame& frame) {
        kernels_.activation(ActivationArgs{frame.at(x), frame.stride(x), frame.tokens, size, kind, multiply,
                                           frame.at(y), frame.tiles(y)},
                            *frame.pool);
    });
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
    if (outputs.has_value()) require_outputs(*outputs, query_starts, narrows_);
    const int64_t in_work = token_tile_size(tokens) < tokens ? pool_.threads() * kMaxTokenTile : tokens;
    std::vector<int32_t> narrowed(num_outputs < tokens ? 2 * starts.size(0) + 1 : 0);
    Frame frame{this, &pool_, tokens, in_work, 0, tokens, nullptr, nullptr, out.data(), token_ids.data(),
                positions.data(), starts.size(0), query_starts.data(), starts.data(), tables.data(), tables.stride(),
                writes_are_private(layout, query_starts, starts, tables), &layout,
                outputs.has_value() ? outputs->data() : nullptr, num_outputs, &narrowed};
    const size_t kept_bytes = checked_bytes({kept_floats_, padded(tokens), sizeof(float)});
    const size_t bytes = kept_bytes + checked_bytes({passing_floats_, padded(in_work), sizeof(float)});
    nb::gil_scoped_release unlocked;
    const auto lock = pool_.exclusive();
    if (arena_ == nullptr || arena_->bytes() < bytes) {
        arena_.reset();
        arena_ = std::make_unique<Pages>(bytes, true);
    }
    const ThreadPool::SpinScope spin(pool_);
    frame.kept = static_cast<float*>(arena_->data());
    frame.own = frame.kept + kept_bytes / sizeof(float);
    auto begun = Clock::now();
    for (size_t at = 0; at < instructions_.size() && frame.tokens > 0;) {  // else no output needs what would follow
        size_t end = at;
        while (end < instructions_.size() && instructions_[end].by_row) ++end;
        if (end > at && token_tile_size(frame.tokens) < frame.tokens) {
            run_stage(frame, at, end, begun);
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
    if (tokens < threads * kMinTokenTile || heaviest_stage_ > kTokenTileWeights) return tokens;
    const int64_t tiles = (tokens + threads * kMaxTokenTile - 1) / (threads * kMaxTokenTile) * threads;
    return (tokens + tiles * kTokenTileStep - 1) / (tiles * kTokenTileStep) * kTokenTileStep;
}

// The operations between two attentions, on tiles of tokens. What an operation took is its share of the whole.
void Program::run_stage(Frame& frame, size_t begin, size_t end, Clock::time_point& begun) const {
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
    frame.own_room = job.tile_tokens;
    frame.own += worker * program.passing_floats_ * padded(job.tile_tokens);
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
