#include "heads.h"

#include "loops.h"

namespace ep::cuda {
namespace {

// The launches of one head; `add`: to the nudge as it is.
class LoweredHead {
 public:
  LoweredHead(const Relaxation& r, Buffers& buffers, int64_t h, Tasks& tasks)
      : r_(r),
        buffers_(buffers),
        tasks_(tasks),
        h_(h),
        head_(r.heads[h]),
        node_(buffers.extent(r.heads[h].node)),
        control_(r.tol > 0 ? buffers.control() : nullptr) {
    const auto side = static_cast<int32_t>(head_.pool);
    grid_ = side > 0 ? Extent{side, side, node_.channels} : node_;
    flat_ = present(head_.map) && !head_.pointwise;
  }

  void lower(const Buffer* state, bool add) {
    const Buffer& feature = read(state);
    const Buffer& outputs = present(head_.map) ? forward(feature) : feature;
    differentiate(outputs);
    spread(present(head_.map) ? backward(outputs, feature) : outputs, add);
  }

 private:
  // Averages of the state: [N, rows, columns, C].
  const Buffer& read(const Buffer* state) {
    const bool delta = r_.dynamics.form != Form::kStates;
    const Buffer& out = buffers_.scratch("feature", h_, {r_.batch, grid_.height, grid_.width, padded(grid_.channels)});
    HeadFeature f{};
    f.state = state ? state->data : nullptr;
    f.state_type = buffers_.storage();
    f.inverse_scale = 1.0f;
    if (delta) {
      const Buffer& free = buffers_.free(head_.node);
      f.free = free.floats();
      f.free_samples = free.size[0];
      f.inverse_scale = static_cast<float>(1.0 / r_.nodes[head_.node].scale);
    }
    f.feature = out.floats();
    f.n = out.size[0];
    f.height = node_.height;
    f.width = node_.width;
    f.channels = out.size[3];
    f.rows = grid_.height;
    f.columns = grid_.width;
    f.control = control_;
    push(f, "features of head", out);
    return out;
  }

  // z = V feature: one position per sample, or every position of a pointwise map.
  const Buffer& forward(const Buffer& feature) {
    const int32_t outputs = padded(head_.map.size(0));
    const Buffer& matrix = buffers_.head_map(h_, grid_);
    const Buffer& out =
        buffers_.scratch("outputs", h_, {r_.batch, flat_ ? 1 : feature.size[1], flat_ ? 1 : feature.size[2], outputs});
    multiply(drive_loop(geometry(), feature, matrix), out, "outputs of head");
    return out;
  }

  // z becomes dL/dz.
  void differentiate(const Buffer& outputs) {
    const Buffer& target = buffers_.target(h_);
    HeadError e{};
    e.outputs = outputs.floats();
    e.bias = present(head_.bias) ? buffers_.head_bias(h_).floats() : nullptr;
    e.target = target.floats();
    e.target_samples = target.size[0];
    e.n = outputs.size[0];
    e.positions = outputs.size[1] * outputs.size[2];
    e.channels = outputs.size[3];
    e.real_channels = present(head_.map) ? static_cast<int32_t>(head_.map.size(0)) : grid_.channels;
    e.loss = head_.loss;
    e.factor = static_cast<float>(head_.weight * (e.loss == Loss::kCrossEntropy ? head_.temperature : 1.0));
    e.temperature = static_cast<float>(head_.temperature);
    e.control = control_;
    push(e, "error of head", outputs);
  }

  // V^T dL/dz, of the features' shape.
  const Buffer& backward(const Buffer& errors, const Buffer& feature) {
    const Buffer& matrix = buffers_.head_adjoint(h_, grid_);
    const Ints shape = flat_ ? Ints{feature.size[0], 1, 1, feature.sample()}
                             : Ints{feature.size[0], feature.size[1], feature.size[2], feature.size[3]};
    const Buffer& out = buffers_.scratch("gradient", h_, shape);
    multiply(feedback_loop(geometry(), errors, matrix), out, "gradient of head");
    return out;
  }

  void spread(const Buffer& gradient, bool add) {
    const Buffer& total = buffers_.nudge(head_.node);
    HeadSpread s{};
    s.feature = gradient.floats();
    s.total = total.floats();
    s.n = total.size[0];
    s.height = total.size[1];
    s.width = total.size[2];
    s.channels = total.size[3];
    s.rows = grid_.height;
    s.columns = grid_.width;
    s.add = add;
    s.control = control_;
    push(s, "nudge of head", total);
  }

  Geometry geometry() const {
    Geometry g;  // of a 1x1 convolution
    g.linear = flat_;
    return g;
  }

  void multiply(const Loop& loop, const Buffer& out, const char* what) {
    Drive d = alone(loop, 1.0, out, buffers_.control());
    d.stop = control_ != nullptr;
    push(d, what, out);
  }

  template <typename Work>
  void push(const Work& work, const char* what, const Buffer& out) {
    tasks_.push_back({work, Products::kFloat, what, h_, map_of(out)});
  }

  const Relaxation& r_;
  Buffers& buffers_;
  Tasks& tasks_;
  const int64_t h_;
  const Head& head_;
  const Extent node_;
  const Control* const control_;
  Extent grid_;  // of the features
  bool flat_;    // all of a sample's features enter each output
};

}  // namespace

bool lower_nudge(const Relaxation& r, Buffers& buffers, int64_t node, const Buffer* state, Tasks& tasks) {
  bool add = false;
  for (size_t h = 0; h < r.heads.size(); ++h) {
    if (r.heads[h].node != node) continue;
    LoweredHead(r, buffers, static_cast<int64_t>(h), tasks).lower(state, add);
    add = true;
  }
  if (present(r.nodes[node].extra)) {
    const Buffer &extra = buffers.extra(node), &total = buffers.nudge(node);
    const Control* control = r.tol > 0 ? buffers.control() : nullptr;
    const Accumulate sum{extra.data,    extra.type,     extra.size[0], 1.0f,   total.floats(),
                         total.size[0], total.sample(), add,           control};
    tasks.push_back({sum, Products::kFloat, "extra nudge of node", node, map_of(total)});
    add = true;
  }
  return add;
}

}  // namespace ep::cuda
