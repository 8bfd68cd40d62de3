// torch.ops.ep_kernels.relax: executes a compiled plan for a number of sweeps, with no Python between launches.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ep/check.h"
#include "head.h"
#include "ops.h"
#include "parallel.h"
#include "program.h"
#include "step.h"

namespace ep::cpu {

namespace {

constexpr const char* kOp = "relax";

struct Connection {
  int64_t src, dst;
  Geometry geometry;
  Tensor weight;
  double drive_gain, feedback_gain;
};

struct Node {
  Ints shape;  // [batch, ...]
  Tensor bias, free, preactivation, extra;
  double nudge_gain, scale;
  bool absent_bias() const { return !present(bias); }
};

// Everything a run reads; the run itself is below.
struct Problem {
  std::vector<Connection> connections;
  std::vector<Node> nodes;
  std::vector<Head> heads;
  Program program;
  int64_t batch, phases, steps;
  bool frozen, deferred, keep;
  ScalarType dtype, operands;
  Dynamics dynamics;
  double tol;
};

// Absent tensors, none sharing its memory with another: they are returned.
Tensors absent_each(size_t count, const Tensor& like, ScalarType dtype) {
  Tensors out;
  for (size_t i = 0; i < count; ++i) out.push_back(empty({0}, like, dtype));
  return out;
}

class Run {
 public:
  Run(const Problem& problem, const Tensors& states, const Tensors& drives, const Tensors& winners, const Tensor& like)
      : p_(problem),
        like_(like),
        states_(states),
        pre_(absent_each(states.size(), like, like.scalar_type())),
        drives_(drives),
        winners_(winners),
        own_drives_(absent_each(drives.size(), like, like.scalar_type())),
        own_winners_(absent_each(drives.size(), like, ScalarType::Byte)),
        nudges_(states.size(), absent(like)),
        owned_(states.size(), false),
        spare_(states.size(), absent(like)) {}

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
    Tensor pooled = pooled_drive(states_[conn.src], conn.weight, conn.geometry, given, &won, p_.operands);
    if (max && !given) own_winners_[c] = winners_[c] = won;
    return pooled;
  }

  Tensor feed_back(int64_t c) {
    const Connection& conn = p_.connections[c];
    EP_CHECK(present(states_[conn.dst]), kOp, "states", "a state of node " << conn.dst << " (the plan reads it)",
             "none");
    Ints shape = p_.nodes[conn.src].shape;
    const Tensor* won = present(winners_[c]) ? &winners_[c] : nullptr;
    return feedback(states_[conn.dst], conn.weight, conn.geometry, shape, won, p_.operands);
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
    dispatch(p_.dtype, [&](auto zero) {
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
    Dynamics dynamics = p_.dynamics;
    dynamics.scale = node.scale;
    dynamics.damping = damping_;
    const bool states = dynamics.form == Form::kStates;
    step(summands, states && !node.absent_bias() ? &node.bias : nullptr, present(states_[i]) ? &states_[i] : nullptr,
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

  const Problem& p_;
  const Tensor like_;
  Tensors states_, pre_, drives_, winners_, own_drives_, own_winners_, nudges_;
  std::vector<bool> owned_;
  Tensors spare_;  // second buffers of deferred steps
  std::vector<std::pair<int64_t, Tensor>> pending_;
  bool keep_pre_ = false;
  double damping_ = 1.0;  // of the current sweep: the first is never over-relaxed
};

Tensors dense_all(const Tensors& tensors) {
  Tensors out;
  for (const Tensor& t : tensors) out.push_back(present(t) ? dense(t) : t);
  return out;
}

void check_count(const char* argument, size_t got, size_t expected) {
  EP_CHECK(got == expected, kOp, argument, expected << " entries", got);
}

// One head from its integers, scalars and tensors, on a node of shape [batch, ...]; targets hold `samples`.
Head head_of(const int64_t* spec, const double* scalars, const Tensor* tensors, const Ints& node, int64_t samples,
             const Tensor& like) {
  const Tensor &map = tensors[0], &bias = tensors[1], &target = tensors[2];
  EP_CHECK(spec[1] == 0 || spec[1] == 1, kOp, "head_spec", "loss 0 (cross_entropy) or 1 (mse)", spec[1]);
  EP_CHECK(spec[2] >= 0 && spec[2] < 1 << 15, kOp, "head_spec", "a pool from 0 to 32767", spec[2]);
  EP_CHECK(spec[3] == 0 || spec[3] == 1, kOp, "head_spec", "pointwise 0 or 1", spec[3]);
  EP_CHECK(scalars[1] > 0, kOp, "head_scalars", "a temperature > 0", scalars[1]);
  const int64_t pool = spec[2];
  const bool pointwise = spec[3] == 1;
  EP_CHECK(node.size() == 4 || (pool == 0 && !pointwise), kOp, "head_spec",
           "no pool and no pointwise map on a vector node", list(node));
  Ints output = node;
  output[0] = samples;
  if (pool > 0) output[2] = output[3] = pool;
  if (pointwise || present(map)) {
    const int64_t outputs = map.dim() > 0 ? map.size(0) : 0;
    check_like(kOp, "heads", map, pointwise ? Ints{outputs, node[1], 1, 1} : Ints{outputs, product(output, 1)}, like);
    EP_CHECK(outputs > 0, kOp, "heads", "at least one output", outputs);
    if (present(bias)) check_like(kOp, "heads", bias, {outputs}, like);
    output = pointwise ? Ints{samples, outputs, output[2], output[3]} : Ints{samples, outputs};
  } else {
    EP_CHECK(!present(bias), kOp, "heads", "no bias without a map", list(bias.sizes()));
  }
  check_like(kOp, "heads", target, output, like);
  return {spec[0],
          static_cast<Loss>(spec[1]),
          pool,
          pointwise,
          scalars[0],
          scalars[1],
          present(map) ? dense(map) : map,
          present(bias) ? dense(bias) : bias,
          dense(target)};
}

}  // namespace

std::tuple<Tensors, Tensors, Tensors, Tensors, Tensor> relax(
    const Tensors& states, const Tensors& weights, const Tensors& biases, const Tensors& drives, const Tensors& winners,
    const Tensors& free, const Tensors& preactivations, const Tensors& heads, const Tensors& extra, const Ints& shapes,
    const Ints& connections, const Ints& head_spec, const Ints& program, const Floats& drive_gains,
    const Floats& feedback_gains, const Floats& nudge_gains, const Floats& scales, const Floats& head_scalars,
    int64_t batch, int64_t phases, int64_t steps, int64_t form, bool frozen, bool deferred, int64_t operands,
    int64_t storage, bool keep, double damping, double slope, double lo, double hi, double tol) {
  const size_t nodes = states.size(), count = weights.size();
  EP_CHECK(nodes >= 2, kOp, "states", "the input and at least one node", nodes);
  EP_CHECK(count >= 1, kOp, "weights", "at least one", count);
  EP_CHECK(batch >= 0, kOp, "batch", "an integer >= 0", batch);
  const int64_t most = (int64_t{1} << 30) / std::max<int64_t>(batch, 1);
  EP_CHECK(steps >= 1 && steps <= most, kOp, "steps", "1 to " << most << " (a residual is kept for each)", steps);
  EP_CHECK(std::isfinite(tol) && tol >= 0, kOp, "tol", "a finite number >= 0", tol);
  check_dynamics(kOp, damping, slope, lo, hi, form, phases, batch);
  check_operands(kOp, operands);
  EP_CHECK(storage == 0, kOp, "storage", "0 (states in their own dtype: this backend stores no other)", storage);
  const bool delta = form != 0;
  const int64_t samples = batch / phases;  // of the free phase
  check_count("biases", biases.size(), nodes);
  check_count("extra", extra.size(), nodes);
  check_count("shapes", shapes.size(), 3 * nodes);
  check_count("nudge_gains", nudge_gains.size(), nodes);
  check_count("scales", scales.size(), nodes);
  check_count("free", free.size(), delta ? nodes : 0);
  check_count("preactivations", preactivations.size(), delta ? nodes : 0);
  check_count("connections", connections.size(), 7 * count);
  check_count("drives", drives.size(), count);
  check_count("winners", winners.size(), count);
  check_count("drive_gains", drive_gains.size(), count);
  check_count("feedback_gains", feedback_gains.size(), count);
  check_count("head_spec", head_spec.size(), 4 * (heads.size() / 3));
  check_count("heads", heads.size(), 3 * (head_spec.size() / 4));
  check_count("head_scalars", head_scalars.size(), head_spec.size() / 2);
  check_finite(kOp, "drive_gains", drive_gains);
  check_finite(kOp, "feedback_gains", feedback_gains);
  check_finite(kOp, "nudge_gains", nudge_gains);
  check_finite(kOp, "head_scalars", head_scalars);
  for (double s : scales) EP_CHECK(std::isfinite(s) && s > 0, kOp, "scales", "finite numbers > 0", s);

  const Tensor& like = weights[0];
  check_floating(kOp, "weights", like);
  Problem p;
  p.batch = batch;
  p.phases = phases;
  p.steps = steps;
  p.frozen = frozen;
  p.deferred = deferred;
  p.keep = keep;
  p.dtype = like.scalar_type();
  p.operands = operands == 2 ? ScalarType::Half : operands == 3 ? ScalarType::BFloat16 : p.dtype;
  p.dynamics = {damping, slope, lo, hi, 1.0, static_cast<Form>(form)};
  p.tol = tol;

  for (size_t i = 0; i < nodes; ++i) {
    Node node;
    const int64_t* size = shapes.data() + 3 * i;
    const bool map = size[1] != 0 || size[2] != 0;
    const int64_t most = map ? int64_t{1} << 20 : int64_t{1} << 31;  // products of three stay within 64 bits
    EP_CHECK(
        size[0] > 0 && size[0] < most && (!map || (size[1] > 0 && size[2] > 0 && size[1] < most && size[2] < most)),
        kOp, "shapes", "C, H, W or F, 0, 0 for node " << i, size[0] << ", " << size[1] << ", " << size[2]);
    node.shape = {batch, size[0]};
    if (map) node.shape.insert(node.shape.end(), {size[1], size[2]});
    Ints free_shape = node.shape;
    free_shape[0] = samples;
    if (present(states[i])) check_like(kOp, "states", states[i], node.shape, like);
    if (present(biases[i])) check_like(kOp, "biases", biases[i], {node.shape[1]}, like);
    if (present(extra[i])) check_like(kOp, "extra", extra[i], free_shape, like);
    node.bias = present(biases[i]) ? dense(biases[i]) : biases[i];
    node.extra = absent(like);
    if (present(extra[i])) {  // tiled to both phases, so that gradients of heads can be added to it
      node.extra = empty(node.shape, like);
      torch::stable::Tensor tiled = node.extra;
      for (int64_t phase = 0; phase < phases; ++phase) {
        Tensor part = torch::stable::narrow(tiled, 0, phase * samples, samples);
        torch::stable::copy_(part, extra[i]);
      }
    }
    if (delta && i > 0) {
      check_like(kOp, "free", free[i], free_shape, like);
      check_like(kOp, "preactivations", preactivations[i], free_shape, like);
      node.free = dense(free[i]);
      node.preactivation = dense(preactivations[i]);
    }
    node.nudge_gain = nudge_gains[i];
    node.scale = scales[i];
    p.nodes.push_back(node);
  }
  Ints ends;
  for (size_t c = 0; c < count; ++c) {
    const int64_t* flat = connections.data() + 7 * c;
    EP_CHECK(flat[0] >= 0 && flat[0] < flat[1] && flat[1] < static_cast<int64_t>(nodes), kOp, "connections",
             "0 <= src < dst < " << nodes << " (connection " << c << ")", flat[0] << ", " << flat[1]);
    const std::string where = std::string(kOp) + " (connection " + std::to_string(c) + ")";
    const Geometry g = geometry_of(where.c_str(), weights[c], {flat[2], flat[3]}, {flat[4], flat[5]}, flat[6]);
    const Ints& source = p.nodes[flat[0]].shape;
    check_connection(where.c_str(), source, weights[c], g, like);
    const Ints driven = g.drive_shape(source, sizes(weights[c]));
    EP_CHECK(driven == p.nodes[flat[1]].shape, where, "shapes", list(driven) << " for node " << flat[1],
             list(p.nodes[flat[1]].shape));
    if (present(drives[c])) {
      Ints expected = driven;
      if (drives[c].dim() > 0 && drives[c].size(0) == samples) expected[0] = samples;
      check_like(kOp, "drives", drives[c], expected, like);
    }
    if (present(winners[c])) check_winners(kOp, winners[c], driven, batch);
    ends.insert(ends.end(), {flat[0], flat[1]});
    p.connections.push_back(
        {flat[0], flat[1], g, cast(dense(weights[c]), p.operands), drive_gains[c], feedback_gains[c]});
  }
  p.program = decode(program, static_cast<int64_t>(nodes), ends);
  for (size_t h = 0; h < head_spec.size() / 4; ++h) {
    const int64_t node = head_spec[4 * h];
    EP_CHECK(node >= 1 && node < static_cast<int64_t>(nodes), kOp, "head_spec", "a node from 1 to " << nodes - 1, node);
    p.heads.push_back(head_of(head_spec.data() + 4 * h, head_scalars.data() + 2 * h, heads.data() + 3 * h,
                              p.nodes[node].shape, samples, like));
  }

  Run run(p, dense_all(states), dense_all(drives), dense_all(winners), like);
  const Floats trace = run.run();

  Tensors out_states, out_pre, out_drives, out_winners;
  for (size_t i = 1; i < nodes; ++i) out_states.push_back(run.state(i));
  for (size_t i = 1; i < nodes; ++i) out_pre.push_back(run.preactivation(i));
  for (size_t c = 0; c < count; ++c) out_drives.push_back(run.drive(c));
  for (size_t c = 0; c < count; ++c) out_winners.push_back(run.winners(c));
  const Tensor residual = empty({steps, batch}, like);
  dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (size_t i = 0; i < trace.size(); ++i) mutable_data<T>(residual)[i] = static_cast<T>(trace[i]);
    return 0;
  });
  return {out_states, out_pre, out_drives, out_winners, residual};
}

}  // namespace ep::cpu
