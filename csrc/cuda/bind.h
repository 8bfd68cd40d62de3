// Fills in the kernels' parameters from buffers and constants.
#pragma once

#include "loops.h"
#include "tasks.h"

namespace ep::cuda {

class Binding {
 public:
  Binding(const Relaxation& r, Buffers& buffers) : r_(r), buffers_(buffers) {}

  // Of connection c, from its source's state.
  Loop drive_loop_of(int64_t c, int slot);
  // Of connection c, from the state above it, unpooled where it pools.
  Loop feedback_loop_of(int64_t c, const Buffer& above);

  // `loop` alone, into the map `out`.
  Drive drive(const Loop& loop, const Buffer& out, bool stops);
  // P^-1 of connection c at `winners` (null: average, or the launch's own).
  Unpool unpool(int64_t c, const Buffer* winners);

  // Whether steps of sweep t keep their pre-activations: of the last one, which it may be where the run may stop.
  bool keeps(int64_t t) const { return r_.keep && (t + 1 == r_.steps || r_.tol > 0); }
  // The step of node i in sweep t without its summands.
  Step step(int64_t i, int old, int fresh, int64_t t, bool stops);
  // A step that leaves a residual of zero and nothing else.
  Step idle(bool stops);
  const Buffer& idle_map() { return buffers_.scratch("idle", 0, {r_.batch, 1, 1, kPad}); }
  void nudge(int64_t i, Step& s);
  // The K loops; those that do not fit are launched before the step, and join `finished`.
  void loops(int64_t i, const std::vector<Gained>& loops, std::vector<Finished>& finished, Step& s, bool stops,
             Tasks& tasks);
  // Finished tensors; those beyond kMaxFinished are added up before the step.
  void finished(int64_t i, const std::vector<Finished>& finished, Step& s, bool stops, Tasks& tasks);

 private:
  void shape(const Buffer& map, Step& s);

  const Relaxation& r_;
  Buffers& buffers_;
};

}  // namespace ep::cuda
