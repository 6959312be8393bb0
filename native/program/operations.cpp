// The operations of a program, each registered once: what it checks while the program is built, what it runs, its name.
//
// The order of a function's arguments is that of the fields of the instruction in `ops/graph/operations.py`.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "program/program.h"

namespace quire {

namespace {

constexpr int64_t kAddedRows = 16;  // in an item

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

}  // namespace

struct Program::Operations {
    static void embed(Program& p, bool positions, nb::handle table_, float scale, ViewNumbers y_) {
        const PackedLinear& table = p.keep_packed(table_);
        const View y = p.output(y_, table.in, "embed: y has the wrong shape");
        require(!p.is_tiles(y) && !table.gated, "embed: a table of another kind");
        int64_t& limit = positions ? p.position_limit_ : p.token_limit_;
        limit = std::min(limit, table.out);
        p.append("embed", [=, &table, &kernels = p.kernels_](const Frame& frame) {
            const int32_t* const ids = (positions ? frame.positions : frame.token_ids) + frame.first;
            kernels.embed(EmbedArgs{ids, frame.tokens, table.panels(), scale, frame.at(y)}, *frame.pool);
        });
    }

    static void linear(Program& p, ViewNumbers x_, nb::handle weight_, int kind, ViewNumbers y_, bool adds) {
        const PackedLinear& weight = p.keep_packed(weight_);
        const View x = p.view_any(x_), y = p.output(y_, weight.out_width(), "linear: y has the wrong shape");
        const Activation activation = activation_numbered(kind);
        require(x.size() == weight.in, "linear: the width of x is not the weight's");
        require(!p.is_tiles(x) || weight.reads_amx_bf16(), "linear: the weight does not read amx_bf16");
        require(!adds || !p.is_tiles(y), "linear: tiles of bfloat16 are not added to");
        const auto compute = [=, &weight, &kernels = p.kernels_](const Frame& frame) {
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
            kernels.linear(args, *frame.pool);
        };
        const std::string name = weight.gated ? "gated_linear" : adds ? "linear, added" : "linear";
        p.append(name + " " + weight.text(), compute, weight.bytes(), weight.num_operations());
        p.segment_bytes_ += weight.bytes();
        p.largest_segment_ = std::max(p.largest_segment_, p.segment_bytes_);
    }

    static void norm(Program& p, ViewNumbers x_, std::optional<ViewNumbers> residual_, nb::handle weight_,
                     nb::handle bias_, float eps, bool centre, ViewNumbers y_) {
        const View x = p.view(x_), y = p.output(y_, x.size(), "norm: y has the wrong shape");
        const View residual = residual_.has_value() ? p.view(*residual_) : View{};
        const bool adds = residual_.has_value();
        const float* const weight = p.keep_floats(weight_, x.width, "weight");
        const float* const bias = p.keep_floats(bias_, x.width, "bias");
        require(weight != nullptr, "norm: there is no weight");
        require(!p.is_tiles(y) || x.groups == 1, "norm: y has the wrong shape");
        require(!adds || (residual.size() == x.size() && x.groups == 1), "norm: residual has the wrong shape");
        p.append("norm", [=, &kernels = p.kernels_](const Frame& frame) {
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
            kernels.norm(args, *frame.pool);
        });
    }

    static void add(Program& p, ViewNumbers x_, ViewNumbers y_) {
        const View x = p.view(x_), y = p.view(y_);
        require(x.size() == y.size(), "add: x and y differ in shape");
        p.append("add", [=](const Frame& frame) {
            AddJob job{frame.at(x), frame.stride(x), frame.at(y), frame.stride(y), frame.tokens, x.size()};
            frame.pool->run((frame.tokens + kAddedRows - 1) / kAddedRows, add_rows, &job);
        });
    }

    static void attention(Program& p, ViewNumbers q_, ViewNumbers k_, ViewNumbers v_, int64_t layer, float scale,
                          int64_t window, float softcap, nb::handle sinks_, nb::handle cos, nb::handle sin,
                          ViewNumbers y_, std::vector<int64_t> selected) {
        const View q = p.view(q_), k = p.view(k_), v = p.view(v_);
        const View y = p.output(y_, q.size(), "attention: out has the wrong shape");
        require(layer >= 0, "attention: no such layer");
        require(k.groups == v.groups && q.groups % k.groups == 0, "attention: heads do not fit the cache's kv_heads");
        require(q.width == k.width && q.width == v.width, "attention: head_dim is not the cache's");
        require(!p.is_tiles(y), "attention: out has the wrong shape");
        require(window > 0, "attention: a window is at least 1");
        require(p.layers_ == 0 || (p.kv_heads_ == k.groups && p.head_dim_ == q.width), "attention: layers differ in shape");
        const float* const sinks = p.keep_floats(sinks_, q.groups, "sinks");
        const RopeTables tables = p.keep_tables(cos, sin, q.width);
        p.segment_bytes_ = 0;
        p.layers_ = std::max(p.layers_, layer + 1);
        p.kv_heads_ = k.groups;
        p.head_dim_ = q.width;
        for (const int64_t buffer : selected) {
            const bool exists = buffer >= 0 && buffer < static_cast<int64_t>(p.buffers_.size());
            require(exists && !std::get<2>(p.buffers_[buffer]) && buffer != p.result_,
                    "program: no such buffer to select output tokens of");
        }
        require(selected.empty() || !p.selects_, "program: output tokens are selected once");
        p.selects_ = p.selects_ || !selected.empty();
        p.append(window == INT64_MAX ? "attention" : "attention, window", [=, &kernels = p.kernels_](Frame& frame) {
            AttentionArgs args{frame.at(q), frame.at(k), frame.at(v), frame.stride(q), frame.stride(k),
                               frame.stride(v), q.groups, *frame.cache, layer, frame.rows,
                               frame.query_starts, frame.starts, frame.tables, frame.table_stride,
                               frame.private_writes, scale, window, softcap, sinks, tables, frame.at(y)};
            if (frame.num_outputs < frame.tokens && !selected.empty()) {
                args.out = nullptr;
                kernels.attention(args, *frame.pool);
                frame.select_output_tokens(selected);
                args.k = args.v = nullptr;
                args.query_starts = frame.query_starts;
                args.starts = frame.starts;
                args.out = frame.at(y);
            }
            if (frame.tokens > 0) kernels.attention(args, *frame.pool);
        }, 0, 0, false);
    }

    static void activation(Program& p, ViewNumbers x_, int kind_, ViewNumbers y_) {
        const View x = p.view(x_), y = p.output(y_, x.size(), "activation: y has the wrong shape");
        const Activation kind = activation_numbered(kind_);
        p.append("activation", [=, &kernels = p.kernels_](const Frame& frame) {
            kernels.activation(ActivationArgs{frame.at(x), frame.stride(x), frame.tokens, x.size(), kind, false,
                                               frame.at(y), frame.tiles(y)},
                                *frame.pool);
        });
    }
};

void Program::bind(nb::class_<Program>& program) {
    const auto any = nb::arg();
    const auto none = nb::arg().none();
    program.attr("token_tile") = nb::make_tuple(Program::kMinTokenTile, Program::kMaxTokenTile, Program::kTokenTileWeights);
    program.def("embed", &Operations::embed)
        .def("linear", &Operations::linear)
        .def("norm", &Operations::norm, any, none, any, none, any, any, any)
        .def("add", &Operations::add)
        .def("attention", &Operations::attention, any, any, any, any, any, any, any, none, none, none, any, any)
        .def("activation", &Operations::activation);
}

}  // namespace quire
