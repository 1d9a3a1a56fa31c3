// What followed what: a trie of bounded depth over all stretches of a text, with counts of continuations
// (ops/suffix/reference.py is the formula). A token costs one look-up a depth.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

struct Node {
  std::int32_t count, followed, best, token;  // best: the most frequent child, the later one of equals, or -1
};

class Index {
 public:
  Index(int depth, std::int64_t max_nodes) : depth(depth), max_nodes_(max_nodes), keys_(1024, kFree), values_(1024) {
    nodes_.push_back({0, 0, -1, -1});
  }

  void push(std::int32_t* at, const std::int64_t* tokens, std::int64_t n, bool grows) {
    for (std::int64_t i = 0; i < n; ++i) {
      const auto token = static_cast<std::int32_t>(tokens[i]);
      // Each takes the place that the next shorter one has left. Short stretches come first into an index that fills up.
      std::int32_t left = 0;
      for (int length = 1; length <= depth; ++length) {
        const std::int32_t from = left;
        left = at[length - 1];
        at[length - 1] = step(from, token, grows);
      }
    }
  }

  std::int32_t draft(const std::int32_t* at, std::int32_t max_match, std::int32_t max_tokens, double floor,
                     std::int64_t* out, std::int32_t* match) const {
    for (int length = std::min(max_match, depth - 1); length >= 1; --length) {
      std::int32_t node = at[length - 1];
      if (node < 0 || nodes_[node].best < 0) continue;
      const int most = std::min(max_tokens, 2 * length + 1);
      double share = 1.0;
      int n = 0;
      while (n < most) {
        const std::int32_t child = nodes_[node].best;
        if (child < 0) break;
        share *= static_cast<double>(nodes_[child].count) / nodes_[node].followed;
        if (share < floor) break;
        out[n++] = nodes_[child].token;
        node = child;
      }
      if (n > 0) {
        *match = length;
        return n;
      }
    }
    *match = 0;
    return 0;
  }

  std::int64_t n_nodes() const { return static_cast<std::int64_t>(nodes_.size()); }

  const int depth;

 private:
  static constexpr std::uint64_t kFree = ~std::uint64_t{0};

  static std::uint64_t mix(std::uint64_t x) {  // splitmix64
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }

  std::size_t find(std::uint64_t key) const {
    const std::size_t mask = keys_.size() - 1;
    std::size_t slot = mix(key) & mask;
    while (keys_[slot] != kFree && keys_[slot] != key) slot = (slot + 1) & mask;
    return slot;
  }

  std::int32_t step(std::int32_t node, std::int32_t token, bool grows) {
    if (node < 0) return -1;
    const std::uint64_t key = static_cast<std::uint64_t>(node) << 32 | static_cast<std::uint32_t>(token);
    std::size_t slot = find(key);
    std::int32_t child = keys_[slot] == kFree ? -1 : values_[slot];
    if (!grows) return child;
    if (child < 0) {
      if (n_nodes() >= max_nodes_) return -1;
      if (2 * nodes_.size() > keys_.size()) {
        enlarge();
        slot = find(key);
      }
      child = static_cast<std::int32_t>(nodes_.size());
      nodes_.push_back({0, 0, -1, token});
      keys_[slot] = key;
      values_[slot] = child;
    }
    ++nodes_[child].count;
    Node& parent = nodes_[node];
    ++parent.followed;
    if (parent.best < 0 || nodes_[child].count >= nodes_[parent.best].count) parent.best = child;
    return child;
  }

  void enlarge() {
    std::vector<std::uint64_t> keys(2 * keys_.size(), kFree);
    std::vector<std::int32_t> values(2 * values_.size());
    keys.swap(keys_);
    values.swap(values_);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      if (keys[i] == kFree) continue;
      const std::size_t slot = find(keys[i]);
      keys_[slot] = keys[i];
      values_[slot] = values[i];
    }
  }

  std::int64_t max_nodes_;
  std::vector<Node> nodes_;
  std::vector<std::uint64_t> keys_;  // parent and token; open addressing, half of it free
  std::vector<std::int32_t> values_;
};

}  // namespace

extern "C" {

void* suffix_new(std::int32_t depth, std::int64_t max_nodes) { return new Index(depth, max_nodes); }

void suffix_free(void* index) { delete static_cast<Index*>(index); }

std::int64_t suffix_nodes(const void* index) { return static_cast<const Index*>(index)->n_nodes(); }

// at: [depth] nodes of the text's last 1, 2, ... tokens, moved on over tokens[n].
void suffix_push(void* index, std::int32_t* at, const std::int64_t* tokens, std::int64_t n, std::int32_t grows) {
  static_cast<Index*>(index)->push(at, tokens, n, grows != 0);
}

// out: [max_tokens]. Gives how many there are; match: the length of the stretch that they followed.
std::int32_t suffix_draft(const void* index, const std::int32_t* at, std::int32_t max_match, std::int32_t max_tokens,
                          double floor, std::int64_t* out, std::int32_t* match) {
  return static_cast<const Index*>(index)->draft(at, max_match, max_tokens, floor, out, match);
}
}
