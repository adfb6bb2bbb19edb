// Packing sequences of given lengths into batches of at most max_tokens: the core of TokenBudgetPacker.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace cat_fast {

// Streaming best fit within a window.
//
// A batch begins with the oldest pending sequence and takes pending sequences in arrival order while they
// fit. Once the next does not, the rest of the budget is filled by best fit: the largest length that still
// fits, the oldest among equals. Only the first `window` pending sequences are ever looked at, so a batch
// depends on nothing that arrives later, and no sequence waits longer than `window` batches.
class BestFitPacker {
 public:
  using Pending = std::vector<std::pair<int64_t, int64_t>>;  // (id, length), oldest first

  BestFitPacker(int64_t max_tokens, int64_t max_sequences, int64_t window)
      : max_tokens_(at_least_one("max_tokens", max_tokens)),
        max_sequences_(at_least_one("max_sequences", max_sequences)),
        window_(at_least_one("window", window)) {}

  // Appends a sequence, whose id is the number of sequences added before it.
  void add(int64_t length) {
    check_length(length);
    arrivals_.push_back({next_id_++, length, false});
    ++pending_count_;
  }

  // The ids of one batch in order of placement; nothing when none is pending, or when fewer than `window`
  // are and `flush` is false (what is yet to arrive could still change the batch).
  std::optional<std::vector<int64_t>> next(bool flush) {
    if (pending_count_ == 0 || (pending_count_ < window_ && !flush)) return std::nullopt;
    fill_window();
    std::vector<int64_t> batch;
    int64_t room = max_tokens_;
    for (int64_t i = 0; i < window_end_ && has_place(batch); ++i) {
      if (arrivals_[i].taken) continue;
      if (arrivals_[i].length > room) break;
      room -= take(arrivals_[i], batch);
    }
    while (has_place(batch)) {
      auto longer = by_length_.upper_bound(room);
      if (longer == by_length_.begin()) break;
      room -= take(find(std::prev(longer)->second.front()), batch);
    }
    drop_taken_front();
    return batch;
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

  // Goes on from what next_id() and pending() gave, here or in another process.
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
    *this = BestFitPacker(max_tokens_, max_sequences_, window_);
    for (const auto& [id, length] : pending) arrivals_.push_back({id, length, false});
    next_id_ = next_id;
    pending_count_ = static_cast<int64_t>(pending.size());
  }

  // The batches of all of `lengths` (add each, take batches as soon as they are ready, flush at the end):
  // ids batch after batch, and where each batch begins, one entry more than there are batches.
  void plan(const int64_t* lengths, int64_t count, std::vector<int64_t>& ids,
            std::vector<int64_t>& offsets) const {
    BestFitPacker packer(max_tokens_, max_sequences_, window_);
    ids.reserve(count);
    offsets.assign(1, 0);
    const auto drain = [&](bool flush) {
      while (auto batch = packer.next(flush)) {
        ids.insert(ids.end(), batch->begin(), batch->end());
        offsets.push_back(static_cast<int64_t>(ids.size()));
      }
    };
    for (int64_t i = 0; i < count; ++i) {
      packer.add(lengths[i]);
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

  bool has_place(const std::vector<int64_t>& batch) const {
    return static_cast<int64_t>(batch.size()) < max_sequences_;
  }

  // Ids rise along arrivals_.
  Arrival& find(int64_t id) {
    return *std::lower_bound(arrivals_.begin(), arrivals_.end(), id,
                             [](const Arrival& arrival, int64_t wanted) { return arrival.id < wanted; });
  }

  // Admits arrivals to by_length_ until `window` untaken ones are in it.
  void fill_window() {
    for (; window_count_ < window_ && window_end_ < static_cast<int64_t>(arrivals_.size()); ++window_end_) {
      const Arrival& arrival = arrivals_[window_end_];
      if (arrival.taken) continue;
      by_length_[arrival.length].push_back(arrival.id);
      ++window_count_;
    }
  }

  // Both phases of next() take the oldest sequence of its length: the front of its queue.
  int64_t take(Arrival& arrival, std::vector<int64_t>& batch) {
    auto queue = by_length_.find(arrival.length);
    queue->second.pop_front();
    if (queue->second.empty()) by_length_.erase(queue);
    arrival.taken = true;
    batch.push_back(arrival.id);
    --window_count_;
    --pending_count_;
    return arrival.length;
  }

  void drop_taken_front() {
    while (!arrivals_.empty() && arrivals_.front().taken) {
      arrivals_.pop_front();
      if (window_end_ > 0) --window_end_;
    }
  }

  int64_t max_tokens_, max_sequences_, window_;
  int64_t next_id_ = 0;
  int64_t pending_count_ = 0;
  std::deque<Arrival> arrivals_;  // from the oldest pending on, the taken among them kept
  int64_t window_end_ = 0;  // arrivals_[0 .. window_end_) have been admitted to the window
  int64_t window_count_ = 0;  // those of them not yet taken
  std::map<int64_t, std::deque<int64_t>> by_length_;  // the window: length -> ids, oldest first
};

}  // namespace cat_fast
