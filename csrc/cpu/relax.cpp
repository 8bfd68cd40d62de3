// torch.ops.ep_kernels.relax: executes a compiled plan for a number of sweeps, with no Python between launches.
#include <algorithm>

#include "../common/relaxation.h"
#include "connection.h"
#include "head.h"
#include "ops.h"
#include "parallel.h"
#include "step.h"

namespace ep::cpu {

namespace {

constexpr const char* kOp = "relax";

// dtype of the products' operands (tf32 is the tensors' own here).
ScalarType operands_of(const Relaxation& r) {
  return r.operands == 2 ? ScalarType::Half : r.operands == 3 ? ScalarType::BFloat16 : r.like.scalar_type();
}

// Absent tensors, none sharing its memory with another: they are returned.
Tensors absent_each(size_t count, const Tensor& like, ScalarType dtype) {
  Tensors out;
  for (size_t i = 0; i < count; ++i) out.push_back(absent(like, dtype));
  return out;
}

class Run {
 public:
  explicit Run(const Relaxation& r)
      : p_(r),
        like_(r.like),
        pre_(absent_each(r.nodes.size(), like_, like_.scalar_type())),
        own_drives_(absent_each(r.connections.size(), like_, like_.scalar_type())),
        own_winners_(absent_each(r.connections.size(), like_, ScalarType::Byte)),
        nudges_(r.nodes.size(), absent(like_)),
        owned_(r.nodes.size(), false),
        spare_(r.nodes.size(), absent(like_)) {
    for (const Node& node : r.nodes) states_.push_back(node.state);
    for (const Connection& c : r.connections) {
      drives_.push_back(c.drive);
      winners_.push_back(c.winners);
    }
  }

  // Returns the residual of every sweep; rows of sweeps left out by an early stop are -1.
  Floats run() {
    Floats trace(p_.steps * p_.batch, -1.0);
    launch_all(p_.program.prologue, nullptr);
    for (int64_t t = 0; t < p_.steps; ++t) {
      double* residual = trace.data() + t * p_.batch;
      std::fill_n(residual, p_.batch, 0.0);
      const size_t sweep = std::min<size_t>(t, p_.program.sweeps.size() - 1);
      keep_pre_ = p_.keep && (t + 1 == p_.steps || p_.tol > 0);
      damping_ = t == 0 ? std::min(p_.dynamics.damping, 1.0) : p_.dynamics.damping;
      launch_all(p_.program.sweeps[sweep], residual);
      if (p_.deferred) commit();
      const bool still = std::all_of(residual, residual + p_.batch, [&](double r) { return r <= p_.tol; });
      if (p_.tol > 0 && t > 0 && still) break;
    }
    if (p_.keep) launch_all(p_.program.refresh, nullptr);
    return trace;
  }

  Tensor state(size_t node) const {
    if (owned_[node]) return states_[node];
    // nothing reached it (zero), or nothing moved it (the input's copy: ops do not return their arguments)
    if (present(states_[node])) return torch::stable::clone(states_[node]);
    Tensor zero = empty(p_.nodes[node].shape, like_);
    return torch::stable::zero_(zero);
  }
  const Tensor& preactivation(size_t node) const { return pre_[node]; }
  const Tensor& drive(size_t c) const { return own_drives_[c]; }
  const Tensor& winners(size_t c) const { return own_winners_[c]; }

 private:
  void launch_all(const Launches& launches, double* residual) {
    for (const Launch& launch : launches) {
      switch (launch.op) {
        case Op::kDrive:
          own_drives_[launch.index] = drives_[launch.index] = convolve(launch.index);
          break;
        case Op::kNudge:
          nudge(launch.index);
          break;
        case Op::kStep:
          update(launch, residual);
          break;
      }
    }
  }

  Tensor convolve(int64_t c) {
    const Connection& conn = p_.connections[c];
    const bool max = conn.geometry.pool == Pool::kMax;
    const Tensor* given = nullptr;
    if (max && p_.frozen) {
      EP_CHECK(present(winners_[c]), kOp, "winners", "those of connection " << c << " (frozen)", "none");
      given = &winners_[c];
    }
    Tensor won;
    EP_CHECK(present(states_[conn.src]), kOp, "states", "a state of node " << conn.src << " (the plan convolves it)",
             "none");
    Tensor pooled = pooled_drive(states_[conn.src], conn.weight, conn.geometry, given, &won, operands_of(p_));
    if (max && !given) own_winners_[c] = winners_[c] = won;
    return pooled;
  }

  Tensor feed_back(int64_t c) {
    const Connection& conn = p_.connections[c];
    EP_CHECK(present(states_[conn.dst]), kOp, "states", "a state of node " << conn.dst << " (the plan reads it)",
             "none");
    Ints shape = p_.nodes[conn.src].shape;
    const Tensor* won = present(winners_[c]) ? &winners_[c] : nullptr;
    return feedback(states_[conn.dst], conn.feedback_weight(), conn.geometry, shape, won, operands_of(p_));
  }

  void nudge(int64_t i) {
    const Node& node = p_.nodes[i];
    const Tensor at = nudged_state(i);
    Tensor total = present(node.extra) ? node.extra : absent(like_);
    for (const Head& head : p_.heads) {
      if (head.node != i) continue;
      const Tensor gradient = head_gradient(head, at);
      if (!present(total)) {
        total = gradient;
        continue;
      }
      add(gradient, total);
      total = gradient;
    }
    nudges_[i] = total;
  }

  // The state that the nudge is evaluated at: s, or s_free + d; the tangent is taken at s_free itself.
  Tensor nudged_state(int64_t i) {
    const Node& node = p_.nodes[i];
    const bool delta = p_.dynamics.form != Form::kStates;
    const bool moved = present(states_[i]) && p_.dynamics.form != Form::kTangent;
    if (!delta && moved) return states_[i];
    Tensor at = empty(node.shape, like_);
    torch::stable::zero_(at);
    if (delta) add(at, node.free);
    if (delta && moved) add(at, states_[i], 1.0 / node.scale);
    return at;
  }

  // to += gain * from, read modulo its batch.
  void add(const Tensor& to, const Tensor& from, double gain = 1.0) const {
    if (to.numel() == 0) return;
    dispatch(like_.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      T* out = mutable_data<T>(to);
      const T* in = data<T>(from);
      const int64_t batch = to.size(0), given = from.size(0), size = to.numel() / batch;
      const T factor = static_cast<T>(gain);
      for_each_row(batch, 1, size, [&](int64_t n, int64_t, int64_t) {
        const T* row = in + (n % given) * size;
        for (int64_t i = 0; i < size; ++i) out[n * size + i] += factor * row[i];
      });
      return 0;
    });
  }

  void update(const Launch& launch, double* residual) {
    const int64_t i = launch.index;
    const Node& node = p_.nodes[i];
    std::vector<Summand> summands;
    for (int64_t c : launch.finished) {
      EP_CHECK(present(drives_[c]), kOp, "drives", "that of connection " << c << " (the plan reads it)", "none");
      summands.push_back({drives_[c], p_.connections[c].drive_gain, p_.connections[c].drive_gain});
    }
    for (int64_t c : launch.below) {
      summands.push_back({convolve(c), p_.connections[c].drive_gain, p_.connections[c].drive_gain});
    }
    for (int64_t c : launch.above) {
      summands.push_back({feed_back(c), p_.connections[c].feedback_gain, p_.connections[c].feedback_gain});
    }
    if (launch.nudged) {
      EP_CHECK(present(nudges_[i]), kOp, "program", "a nudge of node " << i << " before its step", "none");
      summands.push_back({nudges_[i], node.nudge_gain, -node.nudge_gain});
    }
    // in place once the buffer is ours; a deferred step leaves the old state readable until the sweep's end
    const bool in_place = owned_[i] && !p_.deferred;
    Tensor out = in_place ? states_[i] : present(spare_[i]) ? spare_[i] : empty(node.shape, like_);
    if (keep_pre_ && !present(pre_[i])) pre_[i] = empty(node.shape, like_);
    Dynamics<double> dynamics = p_.dynamics;
    dynamics.scale = node.scale;
    dynamics.lo = node.lo;
    dynamics.hi = node.hi;
    dynamics.damping = damping_;
    const bool states = dynamics.form == Form::kStates;
    step(summands, states && present(node.bias) ? &node.bias : nullptr, present(states_[i]) ? &states_[i] : nullptr,
         states ? nullptr : &node.preactivation, p_.phases, dynamics, out, keep_pre_ ? &pre_[i] : nullptr, residual);
    if (p_.deferred) {
      pending_.push_back({i, out});
    } else {
      states_[i] = out;
      owned_[i] = true;
    }
  }

  void commit() {
    for (auto& [i, out] : pending_) {
      spare_[i] = owned_[i] ? states_[i] : absent(like_);
      states_[i] = out;
      owned_[i] = true;
    }
    pending_.clear();
  }

  const Relaxation& p_;
  const Tensor like_;
  Tensors states_, pre_, drives_, winners_, own_drives_, own_winners_, nudges_;
  std::vector<bool> owned_;
  Tensors spare_;  // second buffers of deferred steps
  std::vector<std::pair<int64_t, Tensor>> pending_;
  bool keep_pre_ = false;
  double damping_ = 1.0;  // of the current sweep: the first is never over-relaxed
};

Tensor dense_if(const Tensor& t) { return present(t) ? dense(t) : t; }

// `extra` of both phases, so that gradients of heads can be added to it.
Tensor tiled(const Tensor& extra, const Relaxation& r, const Ints& shape) {
  Tensor out = empty(shape, r.like);
  for (int64_t phase = 0; phase < r.phases; ++phase) {
    Tensor part = torch::stable::narrow(out, 0, phase * r.samples(), r.samples());
    torch::stable::copy_(part, extra);
  }
  return out;
}

// Every tensor as the passes read it.
void prepare(Relaxation& r) {
  for (Node& node : r.nodes) {
    for (Tensor* t : {&node.state, &node.bias, &node.free, &node.preactivation}) *t = dense_if(*t);
    if (present(node.extra)) node.extra = tiled(node.extra, r, node.shape);
  }
  for (Connection& c : r.connections) {
    c.weight = cast(dense(c.weight), operands_of(r));
    if (present(c.own_feedback_weight)) c.own_feedback_weight = cast(dense(c.own_feedback_weight), operands_of(r));
    for (Tensor* t : {&c.drive, &c.winners}) *t = dense_if(*t);
  }
  for (Head& head : r.heads) {
    for (Tensor* t : {&head.map, &head.bias, &head.target}) *t = dense_if(*t);
  }
}

}  // namespace

std::tuple<Tensors, Tensors, Tensors, Tensors, Tensor> relax(
    const Tensors& states, const Tensors& weights, const Tensors& feedback_weights, const Tensors& biases,
    const Tensors& drives, const Tensors& winners, const Tensors& free, const Tensors& preactivations,
    const Tensors& heads, const Tensors& extra, const Ints& shapes, const Ints& connections, const Ints& head_spec,
    const Ints& program, const Ints& linear_nodes, const Floats& drive_gains, const Floats& feedback_gains,
    const Floats& nudge_gains, const Floats& scales, const Floats& head_scalars, int64_t batch, int64_t phases,
    int64_t steps, int64_t form, bool frozen, bool deferred, int64_t operands, int64_t storage, bool keep,
    double damping, double slope, double lo, double hi, double tol) {
  // clang-format off
  Relaxation r = read_relaxation(kRules, {
      states, weights, feedback_weights, biases, drives, winners, free, preactivations, heads, extra,
      shapes, connections, head_spec, program, linear_nodes,
      drive_gains, feedback_gains, nudge_gains, scales, head_scalars,
      batch, phases, steps, form, frozen, deferred, operands, storage, keep,
      damping, slope, lo, hi, tol});
  // clang-format on
  prepare(r);
  Run run(r);
  const Floats trace = run.run();

  Tensors out_states, out_pre, out_drives, out_winners;
  for (size_t i = 1; i < r.nodes.size(); ++i) out_states.push_back(run.state(i));
  for (size_t i = 1; i < r.nodes.size(); ++i) out_pre.push_back(run.preactivation(i));
  for (size_t c = 0; c < r.connections.size(); ++c) out_drives.push_back(run.drive(c));
  for (size_t c = 0; c < r.connections.size(); ++c) out_winners.push_back(run.winners(c));
  const Tensor residual = empty({steps, batch}, r.like);
  dispatch(r.like.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (size_t i = 0; i < trace.size(); ++i) mutable_data<T>(residual)[i] = static_cast<T>(trace[i]);
    return 0;
  });
  return {out_states, out_pre, out_drives, out_winners, residual};
}

}  // namespace ep::cpu
