// quire.ops._native: checks what Python passes, lets go of the interpreter, calls the kernels.
//
// Every size and every index that a kernel will use is checked here; kernels trust their arguments.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "binding/checks.h"
#include "runtime/isa.h"
#include "binding/pack_arguments.h"
#include "packing/packed.h"
#include "program/program.h"

namespace quire {

namespace {

struct BestRows {
    const Best* best;  // [rows, panels]
    int64_t panels;
    int32_t* tokens;  // [rows]; 0 where not finite
    bool* finite;     // [rows]
};

// Panels are in the order of their outputs: of equals the first is the lowest.
void choose_best(void* context, int64_t row, int) {
    const BestRows& job = *static_cast<const BestRows*>(context);
    const Best* const panels = job.best + row * job.panels;
    Best best = panels[0];
    for (int64_t panel = 1; panel < job.panels; ++panel) {
        if (panels[panel].value > best.value) best = panels[panel];
    }
    job.finite[row] = __builtin_isfinite(best.value);
    job.tokens[row] = job.finite[row] ? best.output : 0;
}

// The threads and the kernels of one provider.
class Runtime {
public:
    Runtime(int threads, const std::string& isa, const Affinity& affinity) : pool_(threads, affinity) {
        for (const IsaChoice& choice : instruction_sets()) {
            if (choice.kernels->name != isa) continue;
            require(choice.runs_here, choice.reason.c_str());
            kernels_ = choice.kernels;
        }
        require(kernels_ != nullptr, "no such instruction set is compiled in");
    }

    int threads() const { return pool_.threads(); }

    // `weight` [out, in] is an array, or (in, rows of files); `rounding` makes integers of it.
    PackedLinear* pack(nb::handle weight, nb::handle bias, const std::string& storage_name, bool gated,
                       std::optional<IntegersTuple> rounding) {
        const Storage storage = storage_or_raise(storage_name);
        if (nb::isinstance<nb::tuple>(weight)) return pack_rows(file_rows(weight, storage), bias, gated, rounding);
        if (storage == Storage::float32) return pack_array<float>(weight, bias, storage, gated, rounding);
        return pack_array<uint16_t>(weight, bias, storage, gated, rounding);
    }

    // What was done: bytes of `data` read, or multiplications and additions; 0 where the instructions are missing.
    int64_t probe(const std::string& kind, nb::handle data_) {
        Array<uint8_t, 1> data(data_, "data");
        const char* const names[] = {"read", "float32", "bfloat16", "int8", "bfloat16_four_tiles", "int8_four_tiles"};
        for (int i = 0; i < 6; ++i) {
            if (kind != names[i]) continue;
            nb::gil_scoped_release unlocked;
            const auto lock = pool_.exclusive();
            return kernels_->probe(ProbeArgs{static_cast<Probe>(i), data.data(), data.size(0)}, pool_);
        }
        throw nb::value_error("probe: no such kind");
    }

    // The integers and scales of a weight; false where a weight is not finite.
    bool quantize(nb::handle weight_, const std::string& storage_name, const std::string& rounding_name,
                  int64_t group_size, nb::handle values_, nb::handle scales_) {
        const QuantizeArgs args{0, storage_or_raise(storage_name), group_size, rounding_or_raise(rounding_name)};
        if (args.storage == Storage::float32) return quantize_items<float>(weight_, args, values_, scales_);
        return quantize_items<uint16_t>(weight_, args, values_, scales_);
    }

    // `values` [out, in] int8, `scales` and `minima` (or None) [out, ceil(in / group)].
    PackedLinear* pack_integers(nb::handle values_, nb::handle scales_, nb::handle minima_, nb::handle bias_,
                                const IntegersTuple& stated, bool gated) {
        Array<int8_t, 2> values(values_, "values");
        const int64_t out = values.size(0), in = values.size(1);
        const Integers integers = checked_integers(stated, in);
        require(!gated || out % 2 == 0, "pack_gated: the outputs of gate and up differ in number");
        require(integers.minima != minima_.is_none(), "pack: minima are there, or stated, alone");
        const int64_t groups = in == 0 ? 0 : (in + integers.group - 1) / integers.group;
        const Scales scales(scales_, "scales", out, groups, integers.half_scales);
        std::optional<Scales> minima;
        if (integers.minima) minima.emplace(minima_, "minima", out, groups, integers.half_scales);
        const Bias bias(bias_, out);
        if (integers.bits == 4) require_four_bits(values, integers.minima ? 0 : 8);
        if (integers.qmax == 0) require_no_nan(values);
        const IntegerWeight weight{values.data(), values.stride(), scales.data, scales.stride,
                                   minima ? minima->data : nullptr, minima ? minima->stride : 0};
        nb::gil_scoped_release unlocked;
        const auto lock = pool_.exclusive();
        return new PackedLinear(weight, out, in, bias.data(), integers, gated, pool_, arena_);
    }

    // What `pack` made elsewhere with the same arguments, over the bytes that it had; `integers` as its `rounding`.
    PackedLinear* map_packed(nb::handle weights_, nb::handle bias_, int64_t out, int64_t in, const std::string& storage_name,
                             const std::string& layout_name, bool gated,
                             std::optional<IntegersTuple> integers_) {
        require(out >= 0 && out < INT32_MAX && in >= 0 && in < INT32_MAX, 
                "packed weight: out_features or in_features is out of range");
        require(!gated || out % 2 == 0, "packed weight: gated is true, and out_features is odd");
        Integers integers;
        if (integers_) integers = checked_integers(*integers_, in);
        const Storage storage = integers_ ? integers.storage() : storage_or_raise(storage_name);
        const Layout layout = integers_ ? integers.layout() : layout_of(storage);
        require_field(layout_name == name_of(layout), "layout", layout_name,
                      std::string(name_of(layout)) + ", which " + kernels_->name + " reads");
        const Panels shape = PackedLinear(out, in, storage, layout, integers, gated, {}, {}).panels();
        const Arena::Piece weights = borrowed(weights_, "weights");
        const Arena::Piece bias = bias_.is_none() ? Arena::Piece{} : borrowed(bias_, "bias");
        try {
            require_piece(weights, "weights", PackedLinear::weight_bytes(shape));
            if (bias.owner != nullptr) require_piece(bias, "bias", PackedLinear::bias_bytes(shape));
        } catch (const std::bad_alloc&) {
            throw nb::value_error("packed weight: out_features and in_features are of more bytes than there can be");
        }
        return new PackedLinear(out, in, storage, layout, integers, gated, weights, bias);
    }

    void linear(nb::handle x, const PackedLinear& packed, nb::handle y, float scale, float softcap, bool add) {
        require(!packed.gated, "linear: the weight is packed for gated_linear");
        LinearArgs args{};
        args.scale = scale;
        args.softcap = softcap;
        args.add = add;
        run_linear(args, x, packed, y);
    }

    // The results of `linear` are never written: each panel leaves its best.
    void greedy(nb::handle x_, const PackedLinear& packed, float scale, float softcap, nb::handle tokens_,
                nb::handle finite_) {
        Floats2 x(x_, "x");
        Ints1 tokens(tokens_, "tokens", true);
        Array<bool, 1> finite(finite_, "finite", true);
        require_packed_here(packed);
        require(!packed.gated, "greedy: the weight is packed for gated_linear");
        require(x.size(1) == packed.in, "greedy: the width of x is not the weight's");
        require(packed.out > 0, "greedy: the vocabulary is empty");
        require(tokens.size(0) == x.size(0) && finite.size(0) == x.size(0), "greedy: one result for each row is needed");
        LinearArgs args{};
        args.x = x.data();
        args.x_stride = x.stride();
        args.rows = x.size(0);
        args.weight = packed.panels();
        args.scale = scale;
        args.softcap = softcap;
        nb::gil_scoped_release unlocked;
        const auto lock = pool_.exclusive();
        auto begun = Profile::Clock::now();
        best_.resize(args.rows * args.weight.panels());
        args.best = best_.data();
        kernels_->linear(args, pool_);
        BestRows job{best_.data(), args.weight.panels(), tokens.data(), finite.data()};
        pool_.run(args.rows, choose_best, &job);
        times_of("greedy", packed).add(args.rows, begun);
    }

    void gated_linear(nb::handle x, const PackedLinear& packed, int kind, nb::handle y) {
        require(packed.gated, "gated_linear: the weight is not packed for it");
        LinearArgs args{};
        args.scale = 1.0f;
        args.activation = activation_numbered(kind);
        run_linear(args, x, packed, y);
    }

    void embed(nb::handle ids_, const PackedLinear& packed, float scale, nb::handle y_) {
        Ints1 ids(ids_, "token_ids");
        Floats2 y(y_, "y", true);
        require_packed_here(packed);
        require(!packed.gated, "embed: the weight is packed for gated_linear");
        require(y.size(0) == ids.size(0) && y.size(1) == packed.in, "embed: y has the wrong shape");
        require_contiguous(y, "embed: y is not contiguous");
        require_ids(ids, packed.out, "embed: a token id is outside the table");
        call("embed", ids.size(0), kernels_->embed, EmbedArgs{ids.data(), ids.size(0), packed.panels(), scale, y.data()});
    }

    void norm(nb::handle x_, nb::handle residual_, nb::handle weight_, nb::handle bias_, float eps, bool centre,
              nb::handle y_) {
        Floats2 x(x_, "x");
        Floats2 y(y_, "y", true);
        Floats1 weight(weight_, "weight");
        require(weight.size(0) == x.size(1), "norm: the width of x is not the weight's");
        require(y.size(0) == x.size(0) && y.size(1) == x.size(1), "norm: y has the wrong shape");
        require_contiguous(y, "y is not contiguous");
        NormArgs args{x.data(),      x.stride(), x.size(0), x.size(1), nullptr,  0,
                      weight.data(), nullptr,    eps,       centre,    y.data(), {},        1};
        std::optional<Floats2> residual;
        if (!residual_.is_none()) {
            residual.emplace(residual_, "residual", true);
            require(residual->size(0) == x.size(0) && residual->size(1) == x.size(1),
                    "norm: residual has the wrong shape");
            args.residual = residual->data();
            args.residual_stride = residual->stride();
        }
        std::optional<Floats1> bias;
        if (!bias_.is_none()) {
            bias.emplace(bias_, "bias");
            require(bias->size(0) == x.size(1), "norm: bias has the wrong shape");
            args.bias = bias->data();
        }
        call("norm", x.size(0), kernels_->norm, args);
    }

    void activation(nb::handle x_, int kind, bool multiply, nb::handle y_) {
        Floats2 x(x_, "x");
        Floats2 y(y_, "y", true);
        require(y.size(0) == x.size(0) && x.size(1) == y.size(1) * (multiply ? 2 : 1),
                "activation: y has the wrong shape");
        require_contiguous(y, "y is not contiguous");
        call("activation", x.size(0), kernels_->activation, ActivationArgs{x.data(), x.stride(), x.size(0), y.size(1),
                                                  activation_numbered(kind), multiply, y.data(), {}});
    }

    void attention(nb::handle q_, nb::handle k_, nb::handle v_, const Cache& cache, int64_t layer,
                   nb::handle query_starts_, nb::handle starts_, nb::handle tables_, float scale, int64_t window,
                   float softcap, nb::handle sinks_, nb::handle cos_, nb::handle sin_, nb::handle out_) {
        Floats3 q(q_, "q"), k(k_, "k"), v(v_, "v");
        Ints1 query_starts(query_starts_, "query_starts"), starts(starts_, "starts");
        Ints2 tables(tables_, "block_tables");
        Floats2 out(out_, "out", true);
        const CacheLayout& layout = cache.layout();
        require(layer >= 0 && layer < layout.layers, "attention: no such layer");
        require(q.size(2) == layout.head_dim && k.size(2) == layout.head_dim && v.size(2) == layout.head_dim,
                "attention: head_dim is not the cache's");
        require(k.size(1) == layout.kv_heads && v.size(1) == layout.kv_heads && q.size(1) > 0 &&
                    q.size(1) % layout.kv_heads == 0,
                "attention: heads do not fit the cache's kv_heads");
        require(k.size(0) == q.size(0) && v.size(0) == q.size(0), "attention: q, k and v differ in tokens");
        require(out.size(0) == q.size(0) && out.size(1) == q.size(1) * q.size(2),
                "attention: out has the wrong shape");
        require_contiguous(out, "attention: out is not contiguous");
        require(window > 0, "attention: a window is at least 1");
        require_rows(q.size(0), layout, query_starts, starts, tables);
        AttentionArgs args{q.data(),        k.data(),     v.data(),        q.stride(), k.stride(),
                           v.stride(),      q.size(1),    layout,          layer,      starts.size(0),
                           query_starts.data(), starts.data(), tables.data(), tables.stride(),
                           writes_are_private(layout, query_starts, starts, tables), scale,
                           window,          softcap,      nullptr,         {},         out.data()};
        std::optional<Floats1> sinks;
        if (!sinks_.is_none()) {
            sinks.emplace(sinks_, "sinks");
            require(sinks->size(0) == q.size(1), "attention: one sink for each head is needed");
            args.sinks = sinks->data();
        }
        std::optional<Floats2> cos, sin;
        if (!cos_.is_none()) {
            cos.emplace(cos_, "cos");
            sin.emplace(sin_, "sin");
            require_rope_tables(*cos, *sin, layout.head_dim);
            require_rope_covers(cos->size(0), query_starts, starts);
            args.rope = {cos->data(), sin->data(), cos->size(1)};
        }
        call("attention", q.size(0), kernels_->attention, args);
    }

    void sample(nb::handle logits_, nb::handle temperature_, nb::handle top_k_, nb::handle top_p_,
                nb::handle min_p_, nb::handle seeds_, nb::handle positions_, nb::handle tokens_) {
        Floats2 logits(logits_, "logits");
        Floats1 temperature(temperature_, "temperature"), top_p(top_p_, "top_p"), min_p(min_p_, "min_p");
        Ints1 top_k(top_k_, "top_k"), tokens(tokens_, "tokens", true);
        Array<uint64_t, 1> seeds(seeds_, "seeds");
        Array<int64_t, 1> positions(positions_, "positions");
        const int64_t rows = logits.size(0);
        require(rows == 0 || logits.size(1) > 0, "sample: the vocabulary is empty");
        require(temperature.size(0) == rows && top_p.size(0) == rows && min_p.size(0) == rows &&
                    top_k.size(0) == rows && tokens.size(0) == rows && seeds.size(0) == rows &&
                    positions.size(0) == rows,
                "sample: one number for each row is needed");
        call("sample", rows, kernels_->sample,
             SampleArgs{logits.data(), logits.stride(), rows, logits.size(1), temperature.data(), top_k.data(),
                        top_p.data(), min_p.data(), seeds.data(), positions.data(), tokens.data()});
    }

    void logprobs(nb::handle logits_, nb::handle ids_, nb::handle chosen_, nb::handle rank_, nb::handle top_ids_,
                  nb::handle top_logprobs_) {
        Floats2 logits(logits_, "logits"), top_logprobs(top_logprobs_, "top_logprobs", true);
        Ints1 ids(ids_, "token_ids"), rank(rank_, "rank", true);
        Floats1 chosen(chosen_, "chosen", true);
        Ints2 top_ids(top_ids_, "top_ids", true);
        const int64_t rows = logits.size(0), num_top = top_ids.size(1);
        require(ids.size(0) == rows && chosen.size(0) == rows && rank.size(0) == rows && top_ids.size(0) == rows &&
                    top_logprobs.size(0) == rows && top_logprobs.size(1) == num_top,
                "logprobs: shapes differ in rows");
        require_contiguous(top_ids, "logprobs: top_ids is not contiguous");
        require_contiguous(top_logprobs, "logprobs: top_logprobs is not contiguous");
        require(num_top <= logits.size(1), "logprobs: num_top is larger than the vocabulary");
        require_ids(ids, logits.size(1), "logprobs: a token id is outside the vocabulary");
        call("logprobs", rows, kernels_->logprobs,
             LogprobsArgs{logits.data(), logits.stride(), rows, logits.size(1), num_top, ids.data(), chosen.data(),
                          rank.data(), top_ids.data(), top_logprobs.data()});
    }

    void rows_finite(nb::handle logits_, nb::handle finite_) {
        Floats2 logits(logits_, "logits");
        Array<bool, 1> finite(finite_, "finite", true);
        require(finite.size(0) == logits.size(0), "rows_finite: one result for each row is needed");
        call("rows_finite", logits.size(0), kernels_->rows_finite,
             FiniteArgs{logits.data(), logits.stride(), logits.size(0), logits.size(1), finite.data()});
    }

    Program* program(std::vector<ProgramBuffer> buffers, int64_t persistent, int64_t local,
                     int64_t result) {
        return new Program(*kernels_, pool_, std::move(buffers), persistent, local, result);
    }

private:
    template <class Args>
    void call(const char* name, int64_t rows, void (*kernel)(const Args&, ThreadPool&), const Args& args) {
        nb::gil_scoped_release unlocked;
        const auto lock = pool_.exclusive();
        auto begun = Profile::Clock::now();
        kernel(args, pool_);
        pool_.profile().entry(name).add(rows, begun);
    }

    Profile::Entry& times_of(const std::string& operation, const PackedLinear& packed) {
        return pool_.profile().entry(operation + " " + packed.text(), packed.bytes(), packed.num_operations());
    }

    // The pointers of `args` come from the arrays x and y.
    void run_linear(LinearArgs& args, nb::handle x_, const PackedLinear& packed, nb::handle y_) {
        Floats2 x(x_, "x"), y(y_, "y", true);
        require_packed_here(packed);
        require(x.size(1) == packed.in, "linear: the width of x is not the weight's");
        require(y.size(0) == x.size(0) && y.size(1) == packed.out_width(), "linear: y has the wrong shape");
        require_contiguous(y, "y is not contiguous");
        args.x = x.data();
        args.x_stride = x.stride();
        args.rows = x.size(0);
        args.weight = packed.panels();
        args.y = y.data();
        nb::gil_scoped_release unlocked;
        const auto lock = pool_.exclusive();
        auto begun = Profile::Clock::now();
        kernels_->linear(args, pool_);
        times_of(packed.gated ? "gated_linear" : "linear", packed).add(args.rows, begun);
    }

    template <class Item>
    PackedLinear* pack_array(nb::handle weight_, nb::handle bias, Storage storage, bool gated,
                             const std::optional<IntegersTuple>& rounding) {
        Array<Item, 2> weight(weight_, "weight");
        return pack_rows({weight.size(0), weight.size(1), storage, reinterpret_cast<const char*>(weight.data()),
                          weight.stride() * int64_t{sizeof(Item)}, {}}, bias, gated, rounding);
    }

    PackedLinear* pack_rows(const WeightRows& weight, nb::handle bias_, bool gated,
                            const std::optional<IntegersTuple>& rounding) {
        require(!gated || weight.out % 2 == 0, "pack_gated: the outputs of gate and up differ in number");
        const Bias bias(bias_, weight.out);
        std::optional<Integers> integers;
        if (rounding) integers = checked_rounding(*rounding, weight.in);
        nb::gil_scoped_release unlocked;
        const auto lock = pool_.exclusive();
        if (integers) return new PackedLinear(weight, bias.data(), *integers, gated, *kernels_, pool_, arena_);
        return new PackedLinear(weight, bias.data(), layout_of(weight.storage), gated, *kernels_, pool_, arena_);
    }

    template <class Item>
    bool quantize_items(nb::handle weight_, QuantizeArgs args, nb::handle values_, nb::handle scales_) {
        Array<Item, 2> weight(weight_, "weight");
        Array<int8_t, 2> values(values_, "values", true);
        Floats2 scales(scales_, "scales", true);
        const int64_t out = weight.size(0), in = args.in = weight.size(1), size = args.group_size;
        require(size == 32 || size == 64 || size == 128 || (args.rounding != Rounding::int4 && (size == 16 || (size == in && !args.has_minima()))),
                "quantize: group_size is not one of 32, 64, 128, but for int4 16, and of 8 bits all inputs");
        require(values.size(0) == out && values.size(1) == in, "quantize: values has the wrong shape");
        require(scales.size(0) == out && scales.size(1) == args.scales(), "quantize: scales has the wrong shape");
        QuantizeJob job{args, kernels_, &pool_, out, weight.data(), weight.stride() * int64_t{sizeof(Item)},
                        values.data(), values.stride(), scales.data(), scales.stride(), {true}};
        nb::gil_scoped_release unlocked;
        const auto lock = pool_.exclusive();
        if (out > 0) pool_.reserve(args.scratch_bytes());
        pool_.run((out + QuantizeJob::kRows - 1) / QuantizeJob::kRows, &QuantizeJob::work, &job);
        return job.finite;
    }

    Layout layout_of(Storage storage) const { return quire::layout_of(*kernels_, storage); }

    void require_packed_here(const PackedLinear& packed) const { quire::require_packed_here(*kernels_, packed); }

    ThreadPool pool_;
    Arena arena_;  // used by the holder of the pool's lock
    const Kernels* kernels_ = nullptr;
    std::vector<Best> best_;  // of `greedy`; used by the holder of the pool's lock
};

Cache* make_cache(int64_t layers, int64_t blocks, int64_t block_size, int64_t kv_heads, int64_t head_dim,
                  const std::string& storage) {
    for (const int64_t size : {layers, blocks, block_size, kv_heads, head_dim}) {
        require(size > 0 && size < INT32_MAX, "make_cache: a size is not positive");
    }
    const auto known = cache_storage_named(storage);
    require(known.has_value(), "make_cache: storage is not one of bfloat16, float16, float32, int8, fp8");
    return new Cache(layers, blocks, block_size, kv_heads, head_dim, *known);
}

nb::bytes block_bytes(const Cache& cache, int64_t block, int64_t layer) {
    const CacheLayout& layout = cache.layout();
    require(block >= 0 && block < layout.blocks, "block_bytes: the block is outside the cache");
    require(layer >= 0 && layer < layout.layers, "block_bytes: there is no such layer");
    return nb::bytes(layout.head_block(layer, block, 0), layout.block_bytes());
}

void release_blocks(const Cache& cache, int64_t first, int64_t number) {
    const int64_t blocks = cache.layout().blocks;
    require(first >= 0 && number >= 0 && number <= blocks && first <= blocks - number,
            "release_blocks: a block is outside the cache");
    cache.release_blocks(first, number);
}

std::vector<std::tuple<std::string, bool, std::string>> list_instruction_sets() {
    std::vector<std::tuple<std::string, bool, std::string>> result;
    for (const IsaChoice& choice : instruction_sets()) {
        result.emplace_back(choice.kernels->name, choice.runs_here, choice.reason);
    }
    return result;
}

}  // namespace

NB_MODULE(_native, module) {
    // A test that fails, or a person who interrupts, leaves frames alive that hold objects: no fault of theirs to print.
    nb::set_leak_warnings(false);
    module.def("instruction_sets", &list_instruction_sets, "(name, runs here, reason) of each, slowest first");
    module.def("make_cache", &make_cache, nb::rv_policy::take_ownership);
    nb::class_<PackedLinear>(module, "PackedLinear")
        .def_ro("out_features", &PackedLinear::out)
        .def_ro("in_features", &PackedLinear::in)
        .def_prop_ro("out_width", &PackedLinear::out_width, "the width of y")
        .def_prop_ro("reads_amx_bf16", &PackedLinear::reads_amx_bf16, "whether its inputs may have the layout amx_bf16")
        .def_prop_ro("bytes", &PackedLinear::bytes)
        .def_ro("gated", &PackedLinear::gated)
        .def_prop_ro("dtype", [](const PackedLinear& packed) {
            return name_of(packed.integers.bits == 0 ? packed.storage : Storage::float32);
        })
        .def_prop_ro("layout", [](const PackedLinear& packed) { return name_of(packed.layout); })
        .def_prop_ro("integers", [](const PackedLinear& packed) {
            const Integers& of = packed.integers;
            return IntegersTuple(of.bits, of.group, of.qmax, of.half_scales ? 2 : 4, of.minima);
        })
        .def_prop_ro("weights", [](const PackedLinear& packed) { return PackedBytes{packed.weights()}; })
        .def_prop_ro("bias", [](const PackedLinear& packed) -> std::optional<PackedBytes> {
            if (packed.bias().data == nullptr) return std::nullopt;
            return PackedBytes{packed.bias()};
        });
    static PyType_Slot packed_bytes_slots[] = {
        {Py_bf_getbuffer, reinterpret_cast<void*>(&PackedBytes::get_buffer)}, {0, nullptr}};
    nb::class_<PackedBytes>(module, "PackedBytes", nb::type_slots(packed_bytes_slots));
    module.def("operation_times", [] {
        const nb::gil_scoped_release unlocked;
        const auto process_pool = ProcessPool::of_this_process();
        const Exclusive lock = process_pool->exclusive();
        return process_pool->profile().read();
    });
    nb::class_<Cache>(module, "Cache")
        .def_prop_ro("bytes", &Cache::bytes)
        .def("block_bytes", &block_bytes)
        .def("release_blocks", &release_blocks);
    const auto none = nb::arg().none();
    nb::class_<Runtime>(module, "Runtime")
        .def(nb::init<int, const std::string&, const Affinity&>(), nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("threads", &Runtime::threads)
        .def("pack", &Runtime::pack, nb::rv_policy::take_ownership, nb::arg(), none, nb::arg(), nb::arg(), none)
        .def("map_packed", &Runtime::map_packed, nb::rv_policy::take_ownership, nb::arg(), none, nb::arg(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), none)
        .def("probe", &Runtime::probe)
        .def("quantize", &Runtime::quantize)
        .def("pack_integers", &Runtime::pack_integers, nb::rv_policy::take_ownership, nb::arg(), nb::arg(), none, none,
             nb::arg(), nb::arg())
        .def("linear", &Runtime::linear)
        .def("gated_linear", &Runtime::gated_linear)
        .def("greedy", &Runtime::greedy)
        .def("embed", &Runtime::embed)
        .def("norm", &Runtime::norm, nb::arg(), none, nb::arg(), none, nb::arg(), nb::arg(), nb::arg())
        .def("activation", &Runtime::activation)
        .def("attention", &Runtime::attention, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), none, none, none, nb::arg())
        .def("sample", &Runtime::sample)
        .def("logprobs", &Runtime::logprobs)
        .def("rows_finite", &Runtime::rows_finite)
        .def("program", &Runtime::program, nb::rv_policy::take_ownership, nb::keep_alive<0, 1>());
    nb::class_<Program> program(module, "Program");
    Program::bind(program);
    program.def("run", &Program::run, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), none, nb::arg(), nb::arg());
}

}  // namespace quire
