// The memory of a relaxation: made once per signature, when first asked for; captured launches hold its addresses.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <utility>

#include "../common/relaxation.h"
#include "layout.h"

namespace ep::cuda {

// Words: a *slot* is one of a node's two state buffers (only deferred steps use the second); a tensor is *given* when
// it came with the relaxation (its own number of samples), not from a launch (`batch` samples).
class Buffers {
 public:
  // r: a relaxation of the signature, which lives until every buffer has been made.
  explicit Buffers(const Relaxation& r);

  // ---- copied from every relaxation's tensors, in float32 but for winners and the connections' matrices -------------
  const Buffer& bias(int64_t node);  // [1, 1, 1, C]
  const Buffer& free(int64_t node);
  const Buffer& preactivation(int64_t node);
  const Buffer& extra(int64_t node);
  const Buffer& given_drive(int64_t c);
  const Buffer& given_winners(int64_t c);
  const Buffer& drive_matrix(int64_t c);
  const Buffer& feedback_matrix(int64_t c);
  const Buffer& head_map(int64_t h, const Extent& feature);      // as a drive matrix
  const Buffer& head_adjoint(int64_t h, const Extent& feature);  // as a feedback matrix
  const Buffer& head_bias(int64_t h);
  const Buffer& target(int64_t h);

  // ---- written by launches ------------------------------------------------------------------------------------------
  const Buffer& state(int64_t node, int slot);    // slot 0 of a given state: copied
  const Buffer& operand(int64_t node, int slot);  // as products read it: the state itself if it has their type
  const Buffer& unpooled(int64_t c);  // P^-1 of the destination's state; an odd last row or column stays zero
  const Buffer& drive(int64_t c);
  const Buffer& winners(int64_t c);
  const Buffer& first_winners(int64_t c);  // zeros, of one sample: before there are any
  const Buffer& pre(int64_t node);
  const Buffer& nudge(int64_t node);
  const Buffer& node_map(const char* name, int64_t id, int64_t node);  // [batch, H, W, C] of a node
  const Buffer& scratch(const char* name, int64_t id, const Ints& size);
  const Buffer& residual() const { return residual_; }
  Control* control() const { return static_cast<Control*>(control_.data); }

  // The copies of a relaxation's tensors, before a run.
  std::vector<Copy> load(const Relaxation& r) const;
  // Copies within the buffers at a run's beginning: no sweep done, no residual known, given states as operands.
  const std::vector<Copy>& start() const { return start_; }
  void add_start(const Copy& copy) { start_.push_back(copy); }

  Type storage() const { return storage_; }
  Type operand_type() const { return operand_; }
  const Extent& extent(int64_t node) const { return extents_[node]; }

 private:
  using Loader = std::function<Copy(const Relaxation&)>;

  template <typename Make>
  const Buffer& made(const char* name, int64_t id, const Make& make);
  template <typename Make, typename Fill>
  const Buffer& loaded(const char* name, int64_t id, const Make& make, const Fill& fill);
  const Buffer& given(const char* name, int64_t id, Type type, std::function<const Tensor&(const Relaxation&)> of);

  const Relaxation* r_;  // gone once the buffers have been made
  int64_t batch_;
  Type storage_, operand_;
  std::vector<Extent> extents_, map_extents_;
  Tensor like_;
  Buffer control_, minus_one_, residual_;
  std::map<std::pair<std::string, int64_t>, Buffer> buffers_;
  std::vector<Loader> loaders_;
  std::vector<Copy> start_;
};

}  // namespace ep::cuda
