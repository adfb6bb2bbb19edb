// Packing of sequences into batches of at most max_tokens tokens, one per rank of a training run: the core of
// TokenBudgetPacker.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <queue>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace cat_fast {

// Streaming best fit within a window, for all ranks at once.
//
// A step selects, in arrival order, as many of the oldest pending sequences as `ranks` budgets could hold. It places
// the oldest first, then the others from the longest to the shortest (oldest first among equals). Each goes to the
// rank with the smallest sum of squared lengths (then the fewest tokens, then the lowest number) that has room for
// it. The remaining room is filled by best fit: the rank with the smallest sum of squares takes the longest pending
// sequence that fits, repeatedly, until no sequence fits any rank.
//
// Only the first `window` pending sequences are considered, so a step does not depend on later arrivals. Every step
// takes the oldest, so no sequence waits longer than `window` steps.
class BestFitPacker {
 public:
  using Pending = std::vector<std::pair<int64_t, int64_t>>;  // (id, length), oldest first
  using Batches = std::vector<std::vector<int64_t>>;         // ids per rank

  BestFitPacker(int64_t max_tokens, int64_t max_sequences, int64_t window, int64_t ranks)
      : max_tokens_(at_least_one("max_tokens", max_tokens)),
        max_sequences_(at_least_one("max_sequences", max_sequences)),
        window_(at_least_one("window", window)),
        ranks_(at_least_one("ranks", ranks)) {}
  BestFitPacker(BestFitPacker&&) = default;
  BestFitPacker& operator=(BestFitPacker&&) = default;

  // Appends sequences; the id of each is the number of sequences added before it. Appends none if a length is invalid.
  void extend(const int64_t* lengths, int64_t count) {
    std::for_each(lengths, lengths + count, [this](int64_t length) { check_length(length); });
    for (int64_t i = 0; i < count; ++i) arrivals_.push_back({next_id_++, lengths[i], false});
    pending_count_ += count;
  }

  // Returns the ids of one batch per rank; batches may be empty if few sequences are pending. Returns nothing if none
  // is pending, or if fewer than `window` are and `flush` is false, because later arrivals could still change the
  // step. A batch lists the selected sequences in arrival order, then those that best fit added.
  std::optional<Batches> next(bool flush) {
    if (pending_count_ == 0 || (pending_count_ < window_ && !flush)) return std::nullopt;
    fill_window();
    std::vector<Load> loads(ranks_);
    place_oldest(loads);
    Batches batches(ranks_);
    for (int64_t rank = 0; rank < ranks_; ++rank) {
      batches[rank] = std::move(loads[rank].ids);
      loads[rank].ids.clear();
      std::sort(batches[rank].begin(), batches[rank].end());
    }
    fill_room(loads);
    for (int64_t rank = 0; rank < ranks_; ++rank) {
      batches[rank].insert(batches[rank].end(), loads[rank].ids.begin(), loads[rank].ids.end());
    }
    drop_taken_front();
    return batches;
  }

  int64_t pending_count() const { return pending_count_; }
  int64_t next_id() const { return next_id_; }

  Pending pending() const {
    Pending result;
    result.reserve(pending_count_);
    for (const Arrival& arrival : arrivals_) {
      if (!arrival.taken) result.emplace_back(arrival.id, arrival.length);
    }
    return result;
  }

  // Restores the state returned by next_id() and pending(), in this or another process.
  void restore(int64_t next_id, const Pending& pending) {
    int64_t expected = 0;
    for (const auto& [id, length] : pending) {
      check_length(length);
      if (id < expected || id >= next_id) {
        throw std::invalid_argument("packer state: id " + std::to_string(id) +
                                    " is out of order: ids rise, from 0 to below " + std::to_string(next_id));
      }
      expected = id + 1;
    }
    *this = BestFitPacker(max_tokens_, max_sequences_, window_, ranks_);
    for (const auto& [id, length] : pending) arrivals_.push_back({id, length, false});
    next_id_ = next_id;
    pending_count_ = static_cast<int64_t>(pending.size());
  }

  // Computes the batches of all `lengths`: add each, take steps as soon as they are ready, flush at the end. `ids`
  // holds batch after batch, `ranks` batches per step, and `offsets` the start of each batch plus the end.
  void plan(const int64_t* lengths, int64_t count, std::vector<int64_t>& ids,
            std::vector<int64_t>& offsets) const {
    BestFitPacker packer(max_tokens_, max_sequences_, window_, ranks_);
    ids.reserve(count);
    offsets.assign(1, 0);
    const auto drain = [&](bool flush) {
      while (auto batches = packer.next(flush)) {
        for (const auto& batch : *batches) {
          ids.insert(ids.end(), batch.begin(), batch.end());
          offsets.push_back(static_cast<int64_t>(ids.size()));
        }
      }
    };
    for (int64_t i = 0; i < count; ++i) {
      packer.extend(lengths + i, 1);
      drain(false);
    }
    drain(true);
  }

 private:
  struct Arrival {
    int64_t id;
    int64_t length;
    bool taken;
  };

  struct Load {  // a rank's share of this step
    int64_t tokens = 0;
    int64_t squares = 0;
    int64_t sequences = 0;
    std::vector<int64_t> ids;
  };

  using ByLoad = std::tuple<int64_t, int64_t, int64_t>;  // sum of squares, tokens, rank
  using LeastLoaded = std::priority_queue<ByLoad, std::vector<ByLoad>, std::greater<>>;
  using MostRoom = std::priority_queue<std::pair<int64_t, int64_t>>;  // room, rank

  static int64_t at_least_one(const char* name, int64_t value) {
    if (value >= 1) return value;
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ": at least 1 is needed");
  }

  void check_length(int64_t length) const {
    if (length >= 1 && length <= max_tokens_) return;
    throw std::invalid_argument("a sequence of " + std::to_string(length) +
                                " tokens does not fit a batch: lengths are 1 to " +
                                std::to_string(max_tokens_) + " (max_tokens)");
  }

  int64_t room(const Load& load) const {
    return load.sequences < max_sequences_ ? max_tokens_ - load.tokens : 0;
  }

  static ByLoad by_load(const std::vector<Load>& loads, int64_t rank) {
    return {loads[rank].squares, loads[rank].tokens, rank};
  }

  // Returns, per length, the number of sequences that the budgets of all ranks can hold in arrival order.
  std::map<int64_t, int64_t, std::greater<>> oldest_by_length() const {
    std::map<int64_t, int64_t, std::greater<>> counts;
    int64_t tokens = max_tokens_ * ranks_, sequences = max_sequences_ * ranks_;
    for (int64_t i = 0; i < window_end_ && sequences > 0; ++i) {
      if (arrivals_[i].taken) continue;
      if (arrivals_[i].length > tokens) break;
      tokens -= arrivals_[i].length;
      --sequences;
      ++counts[arrivals_[i].length];
    }
    return counts;
  }

  void place_oldest(std::vector<Load>& loads) {
    auto counts = oldest_by_length();
    const int64_t first = arrivals_.front().length;
    take(first, loads[0]);
    --counts[first];

    LeastLoaded open;  // every rank is in one of the two queues
    MostRoom parked;   // ranks without room for the current length
    for (int64_t rank = 0; rank < ranks_; ++rank) open.push(by_load(loads, rank));
    for (const auto& [length, count] : counts) {
      for (; !parked.empty() && parked.top().first >= length; parked.pop()) {
        open.push(by_load(loads, parked.top().second));
      }
      for (int64_t left = count; left > 0 && !open.empty();) {
        const int64_t rank = std::get<2>(open.top());
        open.pop();
        if (room(loads[rank]) < length) {
          parked.push({room(loads[rank]), rank});
          continue;
        }
        take(length, loads[rank]);
        --left;
        open.push(by_load(loads, rank));
      }
    }
  }

  void fill_room(std::vector<Load>& loads) {
    LeastLoaded open;
    for (int64_t rank = 0; rank < ranks_; ++rank) open.push(by_load(loads, rank));
    while (!open.empty()) {
      const int64_t rank = std::get<2>(open.top());
      open.pop();
      const auto longer = by_length_.upper_bound(room(loads[rank]));
      if (longer == by_length_.begin()) continue;
      take(std::prev(longer)->first, loads[rank]);
      open.push(by_load(loads, rank));
    }
  }

  // Adds arrivals to by_length_ until it contains `window` sequences that are not taken.
  void fill_window() {
    for (; window_count_ < window_ && window_end_ < static_cast<int64_t>(arrivals_.size()); ++window_end_) {
      Arrival& arrival = arrivals_[window_end_];
      if (arrival.taken) continue;
      by_length_[arrival.length].push_back(&arrival);
      ++window_count_;
    }
  }

  // Assigns to a rank the oldest sequence of the given length, which must be in the window.
  void take(int64_t length, Load& load) {
    const auto queue = by_length_.find(length);
    Arrival& arrival = *queue->second.front();
    queue->second.pop_front();
    if (queue->second.empty()) by_length_.erase(queue);
    arrival.taken = true;
    load.tokens += length;
    load.squares += length * length;
    ++load.sequences;
    load.ids.push_back(arrival.id);
    --window_count_;
    --pending_count_;
  }

  void drop_taken_front() {
    while (!arrivals_.empty() && arrivals_.front().taken) {
      arrivals_.pop_front();
      if (window_end_ > 0) --window_end_;
    }
  }

  int64_t max_tokens_, max_sequences_, window_, ranks_;
  int64_t next_id_ = 0;
  int64_t pending_count_ = 0;
  std::deque<Arrival> arrivals_;  // starts with the oldest pending sequence; taken ones after it are kept
  int64_t window_end_ = 0;  // arrivals_[0 .. window_end_) have been added to the window
  int64_t window_count_ = 0;  // those of them that are not taken
  // The window: length -> its arrivals, oldest first. Pointers stay valid as a deque changes only at its ends.
  std::map<int64_t, std::deque<Arrival*>> by_length_;
};

}  // namespace cat_fast
