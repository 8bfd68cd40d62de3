// torch.ops.ep_kernels.relax_step
#include <algorithm>

#include "../common/arguments.h"
#include "loops.h"
#include "ops.h"
#include "place.h"

namespace ep::cuda {
namespace {

// The buffers and launches before a step's own.
class Preparation {
 public:
  Preparation(const Tensor& state, const Place& place)
      : like_(state), place_(place), type_(type_of(state.scalar_type())), shape_(sizes(state)) {}

  // A copy of a tensor as a map.
  Buffer map(const Tensor& tensor, Type type) {
    const Buffer buffer = new_map(tensor.size(0), extent_of(sizes(tensor)), type, like_, Start::kAny);
    copies_.push_back(fill_map(tensor, buffer));
    return keep(buffer);
  }

  Buffer vector(const Tensor& tensor) {
    const Buffer buffer = new_map(1, {1, 1, static_cast<int32_t>(tensor.size(0))}, Type::kFloat, like_, Start::kAny);
    copies_.push_back(fill_vector(tensor, buffer));
    return keep(buffer);
  }

  void drive(const Tensor& tensor, double gain) { add(map(tensor, Type::kFloat), gain); }

  void below(const Tensor& source, const Tensor& weight, const Geometry& g, double gain) {
    const Extent extent = extent_of(sizes(source));
    const Buffer matrix = keep(new_drive_matrix(weight, extent, type_, like_, Start::kAny));
    copies_.push_back(fill_drive_matrix(weight, extent, matrix));
    const Loop loop = drive_loop(g, map(source, type_), matrix);
    if (g.pool == Pool::kNone && source.size(0) == shape_[0]) {
      loops_.push_back({loop, gain});
    } else {
      const Buffer out = keep(new_map(source.size(0), extent_of(shape_), Type::kFloat, like_, Start::kAny));
      launches_.push_back(alone(loop, 1.0, out, nullptr));
      launches_.back().pool = g.pool;
      add(out, gain);
    }
  }

  void above(const Tensor& top, const Tensor& weight, const Tensor& winners, const Geometry& g, double gain) {
    const Extent extent = extent_of(shape_);
    const Buffer matrix = keep(new_feedback_matrix(weight, extent, type_, like_, Start::kAny));
    copies_.push_back(fill_feedback_matrix(weight, extent, matrix));
    Buffer source = map(top, type_);
    if (g.pool != Pool::kNone) source = unpooled(source, winners, g, sizes(weight));
    const Loop loop = feedback_loop(g, source, matrix);
    if (fuses_feedback(g, extent)) {
      loops_.push_back({loop, gain});
    } else {
      const Buffer out = state_map();
      Drive flat = alone(loop, 1.0, out, nullptr);
      flat.height = flat.width = 1;
      flat.channels = static_cast<int32_t>(out.sample());
      launches_.push_back(flat);
      add(out, gain);
    }
  }

  // Runs what comes before the step, and gives it its loops and addends.
  void finish(Step& step) {
    const cudaStream_t stream = place_.stream();
    for (const Gained& g : chain(loops_, step)) {
      const Buffer out = state_map();
      launches_.push_back(alone(g.loop, 1.0, out, nullptr));
      add(out, g.gain);
    }
    launch(copies_, stream);
    for (const UnpoolState& u : unpools_) launch(u, stream);
    for (const Drive& d : launches_) launch(d, products_of(type_), place_.device(), stream);
    const size_t before = addends_.size() > kMaxFinished ? addends_.size() - kMaxFinished + 1 : 0;
    if (before > 0) {
      const Buffer sum = state_map();
      for (size_t i = 0; i < before; ++i) {
        const Finished& f = addends_[i];
        launch(Accumulate{f.tensor, Type::kFloat, f.samples, f.gain, sum.floats(), sum.size[0], sum.sample(), i > 0,
                          nullptr},
               stream);
      }
      addends_[before - 1] = {sum.floats(), sum.size[0], 1.0f};
      addends_.erase(addends_.begin(), addends_.begin() + static_cast<std::ptrdiff_t>(before - 1));
    }
    step.finished_count = static_cast<int32_t>(addends_.size());
    std::copy(addends_.begin(), addends_.end(), step.finished);
  }

 private:
  Buffer keep(const Buffer& buffer) {
    kept_.push_back(buffer);
    return buffer;
  }

  Buffer state_map() { return keep(new_map(shape_[0], extent_of(shape_), Type::kFloat, like_, Start::kAny)); }

  void add(const Buffer& buffer, double gain) {
    addends_.push_back({buffer.floats(), buffer.size[0], static_cast<float>(gain)});
  }

  Buffer unpooled(const Buffer& pooled, const Tensor& winners, const Geometry& g, const Ints& weight) {
    const Ints size = g.map_size(shape_, weight);
    const Buffer out = keep(new_buffer({pooled.size[0], size[0], size[1], pooled.size[3]}, type_, like_));
    Unpool unpool{out.data, type_, out.size[1], out.size[2], g.pool, nullptr, 0};
    if (g.pool == Pool::kMax) {
      const Buffer won = map(winners, Type::kByte);
      unpool.winners = won.winners();
      unpool.winners_samples = won.size[0];
    }
    unpools_.push_back(
        {pooled.data, type_, unpool, pooled.size[0], pooled.size[1], pooled.size[2], pooled.size[3], nullptr});
    return out;
  }

  const Tensor& like_;
  const Place& place_;
  const Type type_;
  const Ints shape_;
  std::vector<Buffer> kept_;
  std::vector<Copy> copies_;
  std::vector<UnpoolState> unpools_;
  std::vector<Drive> launches_;
  std::vector<Gained> loops_;
  std::vector<Finished> addends_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> relax_step(
    const Tensor& state, const std::optional<Tensor>& bias, const Tensors& drives, const Floats& drive_gains,
    const Tensors& below, const Tensors& below_weights, const Ints& below_geometry, const Floats& below_gains,
    const Tensors& above, const Tensors& above_weights, const Tensors& above_winners, const Ints& above_geometry,
    const Floats& above_gains, const std::optional<Tensor>& nudge, double nudge_gain,
    const std::optional<Tensor>& preactivation, int64_t form, int64_t phases, double damping, double slope, double lo,
    double hi, double scale, bool keep) {
  const StepGeometry geometry = check_relax_step(
      kRules, {state,       bias,          drives,        drive_gains,   below,          below_weights, below_geometry,
               below_gains, above,         above_weights, above_winners, above_geometry, above_gains,   nudge,
               nudge_gain,  preactivation, form,          phases,        damping,        slope,         lo,
               hi,          scale});
  const Ints shape = sizes(state);
  const Tensor out = empty(shape, state), change = empty({shape[0]}, state);
  const Tensor pre_out = keep ? empty(shape, state) : absent(state);
  if (state.numel() == 0) {
    Tensor none = change;
    torch::stable::zero_(none);
    return {out, change, pre_out};
  }
  const Place place(state);
  const Type type = type_of(state.scalar_type());
  const Extent extent = extent_of(shape);
  const int64_t batch = shape[0];
  Preparation before(state, place);
  for (size_t i = 0; i < drives.size(); ++i) before.drive(drives[i], drive_gains[i]);
  for (size_t i = 0; i < below.size(); ++i) before.below(below[i], below_weights[i], geometry.below[i], below_gains[i]);
  for (size_t i = 0; i < above.size(); ++i) {
    before.above(above[i], above_weights[i], above_winners[i], geometry.above[i], above_gains[i]);
  }

  Step step{};
  const Buffer old = before.map(state, type), fresh = new_map(batch, extent, type, state, Start::kAny);
  const Buffer residual = new_buffer({1, 1, 1, batch}, Type::kFloat, state);
  const Buffer control = new_buffer({1, 1, 1, 4}, Type::kFloat, state);
  if (form == 0 && bias) step.bias = before.vector(*bias).floats();
  if (nudge) {
    const Buffer map = before.map(*nudge, Type::kFloat);
    step.nudge = map.floats();
    step.nudge_samples = map.size[0];
    step.nudge_gain = static_cast<float>(nudge_gain);
  }
  if (form != 0) {
    const Buffer map = before.map(*preactivation, Type::kFloat);
    step.pre = map.floats();
    step.pre_samples = map.size[0];
  }
  std::optional<Buffer> pre;
  if (keep) pre = new_map(batch, extent, Type::kFloat, state, Start::kAny);
  step.pre_out = pre ? pre->floats() : nullptr;
  step.old = old.data;
  step.fresh = fresh.data;
  step.state_type = type;
  step.residual = static_cast<int32_t*>(residual.data);
  step.control = static_cast<Control*>(control.data);
  step.n = static_cast<int32_t>(batch);
  step.height = extent.height;
  step.width = extent.width;
  step.channels = fresh.size[3];
  step.real_channels = extent.channels;
  step.second = static_cast<int32_t>(batch / phases);
  step.form = static_cast<Form>(form);
  step.damping = static_cast<float>(damping);
  step.slope = static_cast<float>(slope);
  step.lo = static_cast<float>(lo);
  step.hi = static_cast<float>(hi);
  step.scale = static_cast<float>(scale);
  before.finish(step);
  launch(step, products_of(type), place.device(), place.stream());
  const Buffer changes{change, change.mutable_data_ptr(), type, {1, 1, 1, static_cast<int32_t>(batch)}};
  std::vector<Copy> results{take_map(fresh, out), between(residual, changes)};
  if (keep) results.push_back(take_map(*pre, pre_out));
  launch(results, place.stream());
  return {out, change, pre_out};
}

}  // namespace ep::cuda
