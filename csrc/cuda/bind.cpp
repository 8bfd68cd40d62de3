#include "bind.h"

#include <algorithm>

namespace ep::cuda {
Loop Binding::drive_loop_of(int64_t c, int slot) {
  const Connection& conn = r_.connections[c];
  return drive_loop(conn.geometry, buffers_.operand(conn.src, slot), buffers_.drive_matrix(c));
}

Loop Binding::feedback_loop_of(int64_t c, const Buffer& above) {
  return feedback_loop(r_.connections[c].geometry, above, buffers_.feedback_matrix(c));
}

Drive Binding::drive(const Loop& loop, const Buffer& out, bool stops) {
  Drive d = alone(loop, 1.0, out, buffers_.control());
  d.stop = stops;
  return d;
}

Unpool Binding::unpool(int64_t c, const Buffer* winners) {
  const Buffer& map = buffers_.unpooled(c);
  Unpool u{};
  u.map = map.data;
  u.type = map.type;
  u.height = map.size[1];
  u.width = map.size[2];
  u.pool = r_.connections[c].geometry.pool;
  if (winners) {
    u.winners = winners->winners();
    u.winners_samples = winners->size[0];
  }
  return u;
}

void Binding::shape(const Buffer& map, Step& s) {
  s.n = map.size[0];
  s.height = map.size[1];
  s.width = map.size[2];
  s.channels = map.size[3];
  s.second = static_cast<int32_t>(r_.samples());
  s.residual = static_cast<int32_t*>(buffers_.residual().data);
  s.control = buffers_.control();
  s.tol = static_cast<float>(r_.tol);
}

Step Binding::step(int64_t i, int old, int fresh, int64_t t, bool stops) {
  const Node& node = r_.nodes[i];
  const Dynamics<double>& dynamics = r_.dynamics;
  const Buffer& state = buffers_.state(i, fresh);
  Step s{};
  shape(state, s);
  s.real_channels = buffers_.extent(i).channels;
  s.old = old < 0 ? nullptr : buffers_.state(i, old).data;
  s.fresh = state.data;
  s.state_type = state.type;
  if (buffers_.operand_type() != buffers_.storage()) {
    s.operand = buffers_.operand(i, fresh).data;
    s.operand_copy = buffers_.operand_type();
  }
  s.form = dynamics.form;
  if (s.form != Form::kStates) {
    const Buffer& pre = buffers_.preactivation(i);
    s.pre = pre.floats();
    s.pre_samples = pre.size[0];
  } else if (present(node.bias)) {
    s.bias = buffers_.bias(i).floats();
  }
  if (keeps(t)) s.pre_out = buffers_.pre(i).floats();
  s.damping = static_cast<float>(t == 0 ? std::min(dynamics.damping, 1.0) : dynamics.damping);
  s.slope = static_cast<float>(dynamics.slope);
  s.lo = static_cast<float>(node.lo);
  s.hi = static_cast<float>(node.hi);
  s.scale = static_cast<float>(node.scale);
  s.stop = stops;
  return s;
}

Step Binding::idle(bool stops) {
  const Buffer& map = idle_map();
  Step s{};
  shape(map, s);
  s.real_channels = map.size[3];
  s.fresh = map.data;
  s.state_type = map.type;
  s.form = Form::kStates;
  s.damping = s.slope = s.scale = s.hi = 1.0f;  // zero stays zero
  s.stop = stops;
  return s;
}

void Binding::nudge(int64_t i, Step& s) {
  const Buffer& nudge = buffers_.nudge(i);
  s.nudge = nudge.floats();
  s.nudge_samples = nudge.size[0];
  s.nudge_gain = static_cast<float>(r_.nodes[i].nudge_gain);
}

void Binding::loops(int64_t i, const std::vector<Gained>& loops, std::vector<Finished>& finished, Step& s, bool stops,
                    Tasks& tasks) {
  int64_t k = 0;
  for (const Gained& left : chain(loops, s)) {
    const Buffer& out = buffers_.node_map("summand", i << 16 | k++, i);
    tasks.push_back(
        {drive(left.loop, out, stops), static_cast<Products>(r_.operands), "summand of node", i, map_of(out)});
    finished.push_back({out.floats(), out.size[0], static_cast<float>(left.gain)});
  }
}

void Binding::finished(int64_t i, const std::vector<Finished>& finished, Step& s, bool stops, Tasks& tasks) {
  const size_t count = finished.size();
  const size_t before = count > kMaxFinished ? count - kMaxFinished + 1 : 0;
  if (before > 0) {
    const Buffer& sum = buffers_.node_map("sum", i, i);
    for (size_t k = 0; k < before; ++k) {
      const Finished& f = finished[k];
      const Accumulate a{f.tensor,     Type::kFloat, f.samples,
                         f.gain,       sum.floats(), sum.size[0],
                         sum.sample(), k > 0,        stops ? buffers_.control() : nullptr};
      tasks.push_back({a, Products::kFloat, "summands of node", i, map_of(sum)});
    }
    s.finished[s.finished_count++] = {sum.floats(), sum.size[0], 1.0f};
  }
  for (size_t k = before; k < count; ++k) s.finished[s.finished_count++] = finished[k];
}

}  // namespace ep::cuda
