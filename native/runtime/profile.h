// How long operations took, by operation and by number of rows: what `quire bench throughput --profile` shows.
//
// One reading of the clock lies between one operation and the next, some 25 ns; so it is always on.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

namespace quire {

class Profile {
public:
    using Clock = std::chrono::steady_clock;
    static constexpr std::array<int64_t, 5> kRows = {1, 8, 32, 128, 512};  // the last of each class but one

    // Of one operation with one number of rows.
    struct Cell {
        int64_t calls = 0, rows = 0, nanoseconds = 0;
    };
    static int64_t nanoseconds_between(Clock::time_point begun, Clock::time_point ended) {
        return std::chrono::duration_cast<std::chrono::nanoseconds>(ended - begun).count();
    }
    struct Entry {
        int64_t bytes = 0;     // of its weight
        int64_t num_operations = 0;  // multiplications and additions for each row
        std::array<Cell, kRows.size() + 1> cells;

        // The operation ended now and began at `begun`, where the next one begins.
        void add(int64_t rows, Clock::time_point& begun) {
            const Clock::time_point then = begun;
            begun = Clock::now();
            add(rows, 1, nanoseconds_between(then, begun));
        }
        // So many calls, with so many rows in all.
        void add(int64_t rows, int64_t calls, int64_t nanoseconds) {
            size_t index = 0;
            while (index < kRows.size() && rows > kRows[index]) ++index;
            Cell& cell = cells[index];
            cell.calls += calls;
            cell.rows += rows;
            cell.nanoseconds += nanoseconds;
        }
    };

    // The one of that name, or a new one; it stays where it is.
    Entry& entry(const std::string& name, int64_t bytes = 0, int64_t num_operations = 0) {
        Entry& found = entries_[name];
        found.bytes = bytes;
        found.num_operations = num_operations;
        return found;
    }

    // (name, the most rows of the class or 0 for no bound, calls, rows, nanoseconds, bytes, operations) of what was called.
    std::vector<std::tuple<std::string, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>> read() const {
        std::vector<std::tuple<std::string, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>> all;
        for (const auto& [name, entry] : entries_) {
            for (size_t i = 0; i <= kRows.size(); ++i) {
                const Cell& cell = entry.cells[i];
                const int64_t bound = i < kRows.size() ? kRows[i] : 0;
                if (cell.calls == 0) continue;
                all.emplace_back(name, bound, cell.calls, cell.rows, cell.nanoseconds, entry.bytes, entry.num_operations);
            }
        }
        return all;
    }

private:
    std::map<std::string, Entry> entries_;  // whose addresses do not change
};

}  // namespace quire
