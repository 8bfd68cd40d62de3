#include "loops.h"

#include <cmath>

namespace ep::cuda {
namespace {

// Of `kernel_h` x `kernel_w` taps over a map of `height` x `width` positions.
Loop loop_of(const Buffer& map, const Buffer& matrix, bool flat) {
  Loop loop{};
  loop.map = map.data;
  loop.matrix = matrix.data;
  loop.height = flat ? 1 : map.size[1];
  loop.width = flat ? 1 : map.size[2];
  loop.channels = flat ? static_cast<int32_t>(map.sample()) : map.size[3];
  loop.kernel_h = flat ? 1 : matrix.size[1];
  loop.kernel_w = flat ? 1 : matrix.size[2];
  loop.mul_h = loop.mul_w = loop.div_h = loop.div_w = 1;
  loop.after = 1.0f;
  return loop;
}

}  // namespace

// Tap r of an output row h reads row h stride + r - padding.
Loop drive_loop(const Geometry& g, const Buffer& source, const Buffer& matrix) {
  Loop loop = loop_of(source, matrix, g.linear);
  if (g.linear) return loop;
  loop.mul_h = static_cast<int32_t>(g.stride[0]);
  loop.mul_w = static_cast<int32_t>(g.stride[1]);
  loop.off_h = static_cast<int32_t>(-g.padding[0]);
  loop.off_w = static_cast<int32_t>(-g.padding[1]);
  return loop;
}

// The adjoint: tap r reads row (h + padding - r) / stride; with the taps in reverse, (h + padding - (k - 1) + r) /
// stride.
Loop feedback_loop(const Geometry& g, const Buffer& above, const Buffer& matrix) {
  Loop loop = loop_of(above, matrix, g.linear);
  if (g.linear) return loop;
  loop.div_h = static_cast<int32_t>(g.stride[0]);
  loop.div_w = static_cast<int32_t>(g.stride[1]);
  loop.off_h = static_cast<int32_t>(g.padding[0]) - loop.kernel_h + 1;
  loop.off_w = static_cast<int32_t>(g.padding[1]) - loop.kernel_w + 1;
  loop.flip = 1;
  return loop;
}

bool fuses_feedback(const Geometry& g, const Extent& destination) {
  return !g.linear || destination.height * destination.width == 1;
}

std::vector<Gained> chain(const std::vector<Gained>& loops, Step& step) {
  std::vector<Gained> left;
  step.loop_count = 0;
  double last = 0;
  for (const Gained& g : loops) {
    if (g.gain == 0) continue;
    const double ratio = step.loop_count ? last / g.gain : 1.0;
    // far from 1, products that were small in the sum of all would overflow, or vanish, before they are scaled back
    const bool near = std::abs(std::log2(std::abs(ratio))) <= 40 && std::isnormal(static_cast<float>(g.gain));
    const bool fits = step.loop_count < kMaxLoops && near;
    if (!fits) {
      left.push_back(g);
      continue;
    }
    if (step.loop_count) step.loops[step.loop_count - 1].after = static_cast<float>(ratio);
    step.loops[step.loop_count] = g.loop;
    step.loops[step.loop_count].after = static_cast<float>(g.gain);
    step.loop_count += 1;
    last = g.gain;
  }
  return left;
}

Drive alone(const Loop& loop, double gain, const Buffer& out, Control* control) {
  Drive d{};
  d.loop = loop;
  d.gain = static_cast<float>(gain);
  d.drive = out.floats();
  d.control = control;
  d.n = out.size[0];
  d.height = out.size[1];
  d.width = out.size[2];
  d.channels = out.size[3];
  return d;
}

}  // namespace ep::cuda
