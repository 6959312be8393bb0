// `linear` and `embed`: which kernel a weight takes, by its layout.
#include "gemm/integers.h"
#include "gemm/linear.h"

namespace quire::QUIRE_ISA {

namespace {

template <class T>
void embed_panels(void* context, int64_t item, int) {
    const EmbedArgs& args = *static_cast<const EmbedArgs*>(context);
    const int64_t in = args.table.in, id = args.ids[item];
    const T* row = static_cast<const T*>(args.table.data) + id / kPanel * in * kPanel + id % kPanel;
    for (int64_t i = 0; i < in; ++i) args.y[item * in + i] = to_float(row[i * kPanel]) * args.scale;
}

void embed_e4m3(void* context, int64_t item, int) {
    const EmbedArgs& args = *static_cast<const EmbedArgs*>(context);
    const Panels& table = args.table;
    const int64_t id = args.ids[item], column = id % kPanel;
    const uint8_t* at = static_cast<const uint8_t*>(table.data) + id / kPanel * table.bytes_each();
    for (int64_t first = 0; first < table.in; first += table.group) {
        const float scale = reinterpret_cast<const float*>(at)[column];
        at += kPanel * sizeof(float);
        for (int64_t i = first; i < smaller(first + table.group, table.in); ++i, at += kPanel) {
            args.y[item * table.in + i] = to_float(E4M3{at[column]}) * scale * args.scale;
        }
    }
}

void embed_tiles(void* context, int64_t item, int) {
    const EmbedArgs& args = *static_cast<const EmbedArgs*>(context);
    constexpr int64_t tile_items = kTileSide * kTileDepth, chunk_items = kTilePanel * kTileDepth;
    const int64_t in = args.table.in, id = args.ids[item];
    const int64_t chunks = (in + kTileDepth - 1) / kTileDepth;
    const uint16_t* const column = static_cast<const uint16_t*>(args.table.data) + id / kTilePanel * chunks * chunk_items +
                                   id % kTilePanel / kTileSide * tile_items + id % kTileSide * 2;
    for (int64_t i = 0; i < in; ++i) {
        const uint16_t bits = column[i / kTileDepth * chunk_items + i % kTileDepth / 2 * kTileDepth + i % 2];
        args.y[item * in + i] = to_float(BFloat16{bits}) * args.scale;
    }
}

float scale_at(const Panels& table, const uint8_t* head, int64_t index) {
    return table.half_scales ? to_float(reinterpret_cast<const Float16*>(head)[index])
                             : reinterpret_cast<const float*>(head)[index];
}

void embed_integers(void* context, int64_t item, int) {
    const EmbedArgs& args = *static_cast<const EmbedArgs*>(context);
    const Panels& table = args.table;
    const int64_t id = args.ids[item], column = id % kTilePanel;
    const uint8_t* const panel = static_cast<const uint8_t*>(table.data) + id / kTilePanel * table.panel_bytes();
    for (int64_t i = 0; i < table.in; ++i) {
        const uint8_t* const group = panel + i / table.group * table.group_bytes();
        const int64_t input = i % table.group;
        const uint8_t byte = group[table.head_bytes() + integer_byte(table.bits, input, column)];
        const int value = table.bits == 8 ? static_cast<int8_t>(byte) : (byte >> (input & 4) & 15) - table.zero();
        float y = static_cast<float>(value) * scale_at(table, group, column);
        if (table.minima) y = y + scale_at(table, group, kTilePanel + column);
        args.y[item * table.in + i] = y * args.scale;
    }
}

Work embed_of(const Panels& table) {
    if (table.layout == Layout::integers) return embed_integers;
    if (table.layout == Layout::tiles) return embed_tiles;
    if (table.storage == Storage::e4m3) return embed_e4m3;
    return table.storage == Storage::bfloat16  ? embed_panels<BFloat16>
           : table.storage == Storage::float16 ? embed_panels<Float16>
                                               : embed_panels<float>;
}

}  // namespace

void linear(const LinearArgs& args, ThreadPool& pool) {
    if (args.rows == 0) return;
#if QUIRE_TILES
    if (args.weight.layout == Layout::tiles) return linear_bfloat16(args, pool);
#endif
    if (args.weight.layout != Layout::integers) return linear_float32(args, pool);
#if QUIRE_AMX
    // Bytes go from memory into tiles as they are; few rows by 4-bit weights, which must be widened, are faster by vectors.
    const int64_t by_vectors = args.weight.bits == 8 ? 0 : vnni_rows(args.weight);
    if (args.rows > by_vectors && args.weight.in > 0 && args.weight.fits_amx()) return linear_int8_amx(args, pool);
#endif
#if defined(__AVX512VNNI__)
    linear_int8_vnni(args, pool);
#else
    linear_int16(args, pool);
#endif
}

void embed(const EmbedArgs& args, ThreadPool& pool) {
    pool.run(args.tokens, embed_of(args.table), const_cast<EmbedArgs*>(&args));
}

}  // namespace quire::QUIRE_ISA
