// The order in which an item of attention on matrix units goes through its work (see attention_matrix.h).
#pragma once

#include "attention_matrix_keys.h"

namespace quire::QUIRE_ISA {

constexpr int64_t kGroupTiles = 3;  // tiles of queries whose state stays in the L1 cache while keys pass by
constexpr int64_t kSplitChunks = kSplit / kMatrixChunk;

// The positions of a tile's first and last query and the first that they see.
struct MatrixTile {
    int64_t first_position, last_position, first_seen, last_seen;
};

// A tile of queries and a chunk of positions of which it sees something.
struct Step {
    int64_t tile, base;
    const MatrixChunk* chunk;
};

// The steps of one item over one split: groups of tiles, whose state stays in the L1 cache, one after the other; within
// a group the tiles take turns at each chunk.
class Steps {
public:
    Steps(const MatrixKeys& keys, const MatrixTile* tiles, int64_t count, int64_t start, int64_t stop, int64_t end)
        : keys_(keys), tiles_(tiles), count_(count), start_(start), stop_(stop), end_(end), found_(start),
          base_(stop) {
        keys_.prefetch(start, stop);
        keys_.prefetch(start + kMatrixChunk, stop);
    }

    bool next(Step& step) {
        while (tile_ == last_) {
            base_ += kMatrixChunk;
            if (base_ >= stop_ && !next_group()) return false;
            select_tiles();
        }
        step = {tile_++, base_, &chunk_at(base_)};
        return true;
    }

private:
    bool next_group() {
        if (group_stop_ == count_) return false;
        group_ = group_stop_;
        group_stop_ = smaller(group_ + kGroupTiles, count_);
        base_ = start_;
        return true;
    }

    // The tiles that see something of the chunk at `base_` are consecutive, as positions grow.
    void select_tiles() {
        tile_ = group_;
        last_ = group_stop_;
        while (tile_ < last_ && tiles_[tile_].last_position < base_) ++tile_;
        while (tile_ < last_ && tiles_[last_ - 1].first_seen >= base_ + kMatrixChunk) --last_;
    }

    const MatrixChunk& chunk_at(int64_t base) {
        for (; found_ <= base; found_ += kMatrixChunk) {
            keys_.prefetch(found_ + 2 * kMatrixChunk, stop_);
            const int64_t place = (found_ - start_) / kMatrixChunk;
            chunks_[place] = keys_.find(found_, end_, place);
        }
        return chunks_[(base - start_) / kMatrixChunk];
    }

    const MatrixKeys& keys_;
    const MatrixTile* const tiles_;
    const int64_t count_, start_, stop_, end_;
    int64_t found_;  // chunks before this position have been looked up
    int64_t base_;
    int64_t group_ = 0, group_stop_ = 0, tile_ = 0, last_ = 0;
    MatrixChunk chunks_[kSplitChunks];
};

}  // namespace quire::QUIRE_ISA
