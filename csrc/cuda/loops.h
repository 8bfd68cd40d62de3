// K loops of connections on buffers, and how several of them share one accumulator.
#pragma once

#include "../common/geometry.h"
#include "kernels.h"
#include "layout.h"

namespace ep::cuda {

// A drive of `source`; a linear connection is a 1x1 convolution of a flat map.
Loop drive_loop(const Geometry& g, const Buffer& source, const Buffer& matrix);
// A feedback of `above` (unpooled). Of a linear connection, `matrix` has a row for each feature of the destination's
// buffer: onto a map of several positions it is a flat product of its own.
Loop feedback_loop(const Geometry& g, const Buffer& above, const Buffer& matrix);

// Whether a step can convolve this feedback: a linear one onto several positions has other weights at each.
bool fuses_feedback(const Geometry& g, const Extent& destination);

// gain * loop, to be summed with others.
struct Gained {
  Loop loop;
  double gain;
};

// Sets the factors after each loop so that the accumulator ends as the sum of gain * loop; loops of gain 0 are left
// out. Returns those that do not fit, being too many or of gains too far apart: they need a launch of their own.
std::vector<Gained> chain(const std::vector<Gained>& loops, Step& step);

// The launch of a drive or feedback alone: gain * loop into `out`, which has the loop's positions.
Drive alone(const Loop& loop, double gain, const Buffer& out, Control* control);

}  // namespace ep::cuda
