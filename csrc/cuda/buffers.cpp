#include "buffers.h"

namespace ep::cuda {
namespace {

constexpr const char* kStates[] = {"state 0", "state 1"};
constexpr const char* kOperands[] = {"operand 0", "operand 1"};

}  // namespace

Buffers::Buffers(const Relaxation& r)
    : r_(&r),
      batch_(r.batch),
      storage_(r.storage == 1 ? Type::kHalf : Type::kFloat),
      operand_(ep::cuda::operand_type(static_cast<Products>(r.operands))),
      like_(absent(r.like)),  // its device without the weight's memory
      control_(new_buffer({1, 1, 1, kPad}, Type::kFloat, like_)),
      minus_one_(new_buffer({1, 1, 1, 1}, Type::kFloat, like_)),
      residual_(new_buffer({r.steps, 1, 1, r.batch}, Type::kFloat, like_)) {
  static_assert(sizeof(Control) <= kPad * sizeof(float));
  torch::stable::fill_(minus_one_.tensor, -1.0);
  start_ = {zeros(control_), repeat(minus_one_, residual_)};
  for (const Node& node : r.nodes) extents_.push_back(extent_of(node.shape));
  for (const Connection& c : r.connections) {
    const Ints& source = r.nodes[c.src].shape;
    Extent map = extents_[c.dst];
    if (!c.geometry.linear) {
      const Ints size = c.geometry.map_size(source, sizes(c.weight));
      map.height = static_cast<int32_t>(size[0]);
      map.width = static_cast<int32_t>(size[1]);
    }
    map_extents_.push_back(map);
  }
}

template <typename Make>
const Buffer& Buffers::made(const char* name, int64_t id, const Make& make) {
  const std::pair<std::string, int64_t> key{name, id};
  const auto found = buffers_.find(key);
  return found != buffers_.end() ? found->second : buffers_.emplace(key, make()).first->second;
}

template <typename Make, typename Fill>
const Buffer& Buffers::loaded(const char* name, int64_t id, const Make& make, const Fill& fill) {
  return made(name, id, [&] {
    const Buffer buffer = make();
    loaders_.push_back([buffer, fill](const Relaxation& r) { return fill(r, buffer); });
    return buffer;
  });
}

const Buffer& Buffers::given(const char* name, int64_t id, Type type,
                             std::function<const Tensor&(const Relaxation&)> of) {
  return loaded(
      name, id,
      [&] {
        const Tensor& tensor = of(*r_);
        return new_map(tensor.size(0), extent_of(sizes(tensor)), type, like_);
      },
      [of](const Relaxation& r, const Buffer& to) { return fill_map(of(r), to); });
}

const Buffer& Buffers::bias(int64_t i) {
  return loaded(
      "bias", i, [&] { return new_buffer({1, 1, 1, padded(extents_[i].channels)}, Type::kFloat, like_); },
      [i](const Relaxation& r, const Buffer& to) { return fill_vector(r.nodes[i].bias, to); });
}

const Buffer& Buffers::free(int64_t i) {
  return given("free", i, Type::kFloat, [i](const Relaxation& r) -> const Tensor& { return r.nodes[i].free; });
}

const Buffer& Buffers::preactivation(int64_t i) {
  return given("preactivation", i, Type::kFloat,
               [i](const Relaxation& r) -> const Tensor& { return r.nodes[i].preactivation; });
}

const Buffer& Buffers::extra(int64_t i) {
  return given("extra", i, Type::kFloat, [i](const Relaxation& r) -> const Tensor& { return r.nodes[i].extra; });
}

const Buffer& Buffers::given_drive(int64_t c) {
  return given("given drive", c, Type::kFloat,
               [c](const Relaxation& r) -> const Tensor& { return r.connections[c].drive; });
}

const Buffer& Buffers::given_winners(int64_t c) {
  return given("given winners", c, Type::kByte,
               [c](const Relaxation& r) -> const Tensor& { return r.connections[c].winners; });
}

const Buffer& Buffers::target(int64_t h) {
  return given("target", h, Type::kFloat, [h](const Relaxation& r) -> const Tensor& { return r.heads[h].target; });
}

const Buffer& Buffers::drive_matrix(int64_t c) {
  const Connection& conn = r_->connections[c];
  const Extent source = extents_[conn.src];
  return loaded(
      "drive matrix", c, [&] { return new_drive_matrix(conn.weight, source, operand_, like_); },
      [c, source](const Relaxation& r, const Buffer& to) {
        return fill_drive_matrix(r.connections[c].weight, source, to);
      });
}

const Buffer& Buffers::feedback_matrix(int64_t c) {
  const Connection& conn = r_->connections[c];
  const Extent source = extents_[conn.src];
  return loaded(
      "feedback matrix", c, [&] { return new_feedback_matrix(conn.feedback_weight(), source, operand_, like_); },
      [c, source](const Relaxation& r, const Buffer& to) {
        return fill_feedback_matrix(r.connections[c].feedback_weight(), source, to);
      });
}

const Buffer& Buffers::head_map(int64_t h, const Extent& feature) {
  return loaded(
      "head map", h, [&] { return new_drive_matrix(r_->heads[h].map, feature, Type::kFloat, like_); },
      [h, feature](const Relaxation& r, const Buffer& to) { return fill_drive_matrix(r.heads[h].map, feature, to); });
}

const Buffer& Buffers::head_adjoint(int64_t h, const Extent& feature) {
  return loaded(
      "head adjoint", h, [&] { return new_feedback_matrix(r_->heads[h].map, feature, Type::kFloat, like_); },
      [h, feature](const Relaxation& r, const Buffer& to) {
        return fill_feedback_matrix(r.heads[h].map, feature, to);
      });
}

const Buffer& Buffers::head_bias(int64_t h) {
  return loaded(
      "head bias", h, [&] { return new_buffer({1, 1, 1, padded(r_->heads[h].bias.size(0))}, Type::kFloat, like_); },
      [h](const Relaxation& r, const Buffer& to) { return fill_vector(r.heads[h].bias, to); });
}

const Buffer& Buffers::state(int64_t i, int slot) {
  const auto make = [&] { return new_map(batch_, extents_[i], storage_, like_); };
  if (slot == 1 || !present(r_->nodes[i].state)) return made(kStates[slot], i, make);
  return loaded(kStates[0], i, make,
                [i](const Relaxation& r, const Buffer& to) { return fill_map(r.nodes[i].state, to); });
}

const Buffer& Buffers::operand(int64_t i, int slot) {
  if (i == 0) {  // the clamped input is never stored
    return given("input", 0, operand_, [](const Relaxation& r) -> const Tensor& { return r.nodes[0].state; });
  }
  if (operand_ == storage_) return state(i, slot);
  return made(kOperands[slot], i, [&] {
    const Buffer buffer = new_map(batch_, extents_[i], operand_, like_);
    if (slot == 0 && present(r_->nodes[i].state)) start_.push_back(between(state(i, 0), buffer));
    return buffer;
  });
}

const Buffer& Buffers::unpooled(int64_t c) {
  return made("unpooled", c, [&] { return new_map(batch_, map_extents_[c], operand_, like_); });
}

const Buffer& Buffers::drive(int64_t c) { return node_map("drive", c, r_->connections[c].dst); }

const Buffer& Buffers::winners(int64_t c) {
  return made("winners", c, [&] { return new_map(batch_, extents_[r_->connections[c].dst], Type::kByte, like_); });
}

const Buffer& Buffers::first_winners(int64_t c) {
  return made("first winners", c, [&] { return new_map(1, extents_[r_->connections[c].dst], Type::kByte, like_); });
}

const Buffer& Buffers::pre(int64_t i) { return node_map("pre", i, i); }

const Buffer& Buffers::nudge(int64_t i) { return node_map("nudge", i, i); }

const Buffer& Buffers::node_map(const char* name, int64_t id, int64_t i) {
  return made(name, id, [&] { return new_map(batch_, extents_[i], Type::kFloat, like_); });
}

const Buffer& Buffers::scratch(const char* name, int64_t id, const Ints& size) {
  return made(name, id, [&] { return new_buffer(size, Type::kFloat, like_); });
}

std::vector<Copy> Buffers::load(const Relaxation& r) const {
  std::vector<Copy> copies;
  for (const Loader& loader : loaders_) copies.push_back(loader(r));
  return copies;
}

}  // namespace ep::cuda
