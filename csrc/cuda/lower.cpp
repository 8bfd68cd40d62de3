#include "lower.h"

#include <algorithm>
#include <iterator>
#include <tuple>

#include "bind.h"
#include "ep/check.h"
#include "heads.h"
#include "lookahead.h"

namespace ep::cuda {
namespace {

constexpr const char* kOp = "relax";
constexpr int64_t kBlock = 16;  // sweeps

class Lowering {
 public:
  Lowering(const Relaxation& r, Buffers& buffers)
      : r_(r),
        buffers_(buffers),
        bind_(r, buffers),
        stops_(r.tol > 0),
        first_(r.nodes.size(), -1),
        stepped_(r.nodes.size(), false),
        skipped_(r.nodes.size(), false),
        unpooled_(r.connections.size(), false),
        nudged_(r.nodes.size(), false) {
    for (const Node& node : r.nodes) slots_.push_back(present(node.state) ? 0 : -1);
    out_.pre.assign(r.nodes.size(), nullptr);
    out_.drives.assign(r.connections.size(), nullptr);
    out_.winners.assign(r.connections.size(), nullptr);
  }

  Lowered run() {
    section(r_.program.prologue, -1);
    sweeps();
    if (stops_ && r_.deferred && r_.steps > 2) settle();
    stops_ = false;  // what follows the sweeps always runs
    if (r_.keep) section(r_.program.refresh, r_.steps);
    out_.states.push_back(nullptr);
    for (size_t i = 1; i < r_.nodes.size(); ++i) {
      out_.states.push_back(slots_[i] < 0 ? nullptr : &buffers_.state(i, slots_[i]));
    }
    return std::move(out_);
  }

 private:
  // Every sweep. Of a long run those of the steady state are lowered once, as a block that is repeated: an even number
  // of sweeps, after which deferred states are back in the slots where they were.
  void sweeps() {
    const int64_t settled = static_cast<int64_t>(r_.program.sweeps.size()) + kLookahead;
    int64_t t = 0;
    while (t < r_.steps) {
      const int64_t rest = r_.steps - kLookahead - t;  // sweeps that do not know of the end
      if (tasks_ != &out_.head || t < settled || rest < 2 * kBlock) {
        sweep(t++);
        continue;
      }
      const State before = state();
      tasks_ = &out_.block;
      for (const int64_t end = t + kBlock; t < end; ++t) sweep(t);
      if (before == state()) {
        out_.repeats = rest / kBlock;
        t += (out_.repeats - 1) * kBlock;
        tasks_ = &out_.tail;
      } else {
        tasks_ = &out_.head;
        std::move(out_.block.begin(), out_.block.end(), std::back_inserter(out_.head));
        out_.block.clear();
      }
    }
  }

  // All that the launches of a sweep depend on.
  using State = std::tuple<std::vector<int>, std::vector<bool>, std::vector<bool>, std::vector<const Buffer*>,
                           std::vector<const Buffer*>, std::vector<const Buffer*>>;
  State state() const { return {slots_, unpooled_, nudged_, out_.pre, out_.drives, out_.winners}; }

  void section(const Launches& launches, int64_t t) {
    for (size_t at = 0; at < launches.size(); ++at) {
      const Launch& launch = launches[at];
      if (launch.op == Op::kDrive) {
        drive(launch.index, t, at);
      } else if (launch.op == Op::kNudge) {
        const int64_t i = launch.index;
        const bool moved = slot(i) >= 0 && r_.dynamics.form != Form::kTangent;  // else at the free state itself
        nudged_[i] = lower_nudge(r_, buffers_, i, moved ? &buffers_.state(i, slot(i)) : nullptr, *tasks_);
      } else {
        step(launch, t, at);
      }
    }
  }

  void sweep(int64_t t) {
    last_step_ = -1;
    stepped_.assign(r_.nodes.size(), false);
    section(launches_of(r_, t), t);
    for (const auto& [node, fresh, fused] : pending_) reached(node, fresh, fused);
    pending_.clear();
    for (size_t i = 0; i < r_.nodes.size(); ++i) skipped_[i] = skipped_[i] || (first_[i] >= 0 && !stepped_[i]);
    if (last_step_ < 0) {  // a sweep that moves nothing is counted too, and its residual is zero
      last_step_ = static_cast<int64_t>(tasks_->size());
      push(bind_.idle(stops_), "sweep", t, bind_.idle_map());
    }
    std::get<Step>((*tasks_)[last_step_].work).finish = true;
  }

  // ---- drives -------------------------------------------------------------------------------------------------------

  void drive(int64_t c, int64_t t, size_t at) {
    const Buffer& out = buffers_.drive(c);
    const bool live = max_pooled(c) && !r_.frozen;
    const int above = slot(r_.connections[c].dst);
    const bool in_sweep = t >= 0 && t < r_.steps;
    const bool unpools = live && in_sweep && above >= 0 && read_later(r_, c, t, at, false);
    convolve(c, out, t, unpools ? above : -1);
    if (!out_.drives[c]) late(out, t);
    out_.drives[c] = &out;
  }

  // P(W * s) of a connection into `out`; unpools: the slot of the destination's state to unpool with the winners, or
  // -1.
  void convolve(int64_t c, const Buffer& out, int64_t t, int unpools) {
    const Connection& conn = r_.connections[c];
    const bool live = max_pooled(c) && !r_.frozen;
    EP_CHECK(!max_pooled(c) || live || present(conn.winners), kOp, "winners",
             "those of connection " << c << " (frozen)", "none");
    check_state(conn.src, "the plan convolves it");
    Drive d = bind_.drive(bind_.drive_loop_of(c, slot(conn.src)), out, stops_);
    d.pool = conn.geometry.pool;
    if (live) {
      const Buffer& winners = buffers_.winners(c);
      d.winners_out = winners.winners();
      if (!out_.winners[c]) late(winners, t);
      out_.winners[c] = &winners;
      winners_changed(c);
    } else if (max_pooled(c)) {
      const Buffer& winners = buffers_.given_winners(c);
      d.winners = winners.winners();
      d.winners_samples = winners.size[0];
    }
    if (unpools >= 0) {
      d.state = buffers_.state(conn.dst, unpools).data;
      d.state_type = buffers_.storage();
      d.unpool = bind_.unpool(c, nullptr);
      unpooled_[c] = true;
    }
    push(d, "drive of connection", c, out);
  }

  void winners_changed(int64_t c) {
    unpooled_[c] = false;
    for (Pending& p : pending_) p.fused.erase(std::remove(p.fused.begin(), p.fused.end(), c), p.fused.end());
  }

  // ---- steps --------------------------------------------------------------------------------------------------------

  void step(const Launch& launch, int64_t t, size_t at) {
    const int64_t i = launch.index;
    const int old = slot(i), fresh = r_.deferred && old >= 0 ? 1 - old : 0;
    Step s = bind_.step(i, old, fresh, t, stops_);
    gather(launch, t, s);
    if (bind_.keeps(t) && !out_.pre[i]) {
      out_.pre[i] = &buffers_.pre(i);
      late(*out_.pre[i], t);
    }
    if (first_[i] < 0) {
      first_[i] = t;
      if (stops_ && t >= 2) late_state(i, old);
    }
    stepped_[i] = true;

    Ints fused;  // connections whose P^-1 of the new state is written now
    for (size_t c = 0; c < r_.connections.size(); ++c) {
      const bool pooled = r_.connections[c].dst == i && r_.connections[c].geometry.pool != Pool::kNone;
      if (pooled && read_later(r_, c, t, at, true)) fused.push_back(static_cast<int64_t>(c));
    }
    if (!fused.empty()) s.unpool = bind_.unpool(fused[0], winners_now(fused[0]));
    last_step_ = static_cast<int64_t>(tasks_->size());
    push(s, "step of node", i, buffers_.state(i, fresh));
    for (size_t k = 1; k < fused.size(); ++k) unpool(fused[k], fresh);
    if (r_.deferred) {
      pending_.push_back({i, fresh, fused});
    } else {
      reached(i, fresh, fused);
    }
  }

  // The state of a node is now in `fresh`, unpooled for the connections of `fused` only.
  void reached(int64_t i, int fresh, const Ints& fused) {
    slots_[i] = fresh;
    for (size_t c = 0; c < r_.connections.size(); ++c) {
      if (r_.connections[c].dst == i)
        unpooled_[c] = std::count(fused.begin(), fused.end(), static_cast<int64_t>(c)) > 0;
    }
  }

  // Everything that a step adds up: finished tensors and convolutions still to be done.
  void gather(const Launch& launch, int64_t t, Step& s) {
    const int64_t i = launch.index;
    std::vector<Finished> finished;
    std::vector<Gained> loops;
    const auto add = [&](const Buffer& b, double gain) {
      finished.push_back({b.floats(), b.size[0], static_cast<float>(gain)});
    };
    for (int64_t c : launch.finished) {
      const Connection& conn = r_.connections[c];
      EP_CHECK(out_.drives[c] || present(conn.drive), kOp, "drives",
               "that of connection " << c << " (the plan reads it)", "none");
      add(out_.drives[c] ? *out_.drives[c] : buffers_.given_drive(c), conn.drive_gain);
    }
    for (int64_t c : launch.below) {
      const Connection& conn = r_.connections[c];
      check_state(conn.src, "the plan convolves it");
      if (conn.geometry.pool == Pool::kNone) {
        loops.push_back({bind_.drive_loop_of(c, slot(conn.src)), conn.drive_gain});
        continue;
      }
      const Buffer& out = buffers_.node_map("below", c, i);
      convolve(c, out, t, -1);
      add(out, conn.drive_gain);
    }
    for (int64_t c : launch.above) {
      const Connection& conn = r_.connections[c];
      check_state(conn.dst, "the plan reads it");
      const Loop loop = feedback_of(c);
      if (fuses_feedback(conn.geometry, buffers_.extent(i))) {
        loops.push_back({loop, conn.feedback_gain});
        continue;
      }
      const Buffer& out = buffers_.node_map("feedback", c, i);
      Drive d = bind_.drive(loop, out, stops_);  // one position of H W C channels: each has weights of its own
      d.channels = static_cast<int32_t>(out.sample());
      d.height = d.width = 1;
      push(d, "feedback of connection", c, out);
      add(out, conn.feedback_gain);
    }
    EP_CHECK(!launch.nudged || nudged_[i], kOp, "program", "a nudge of node " << i << " before its step", "none");
    if (launch.nudged) bind_.nudge(i, s);
    bind_.loops(i, loops, finished, s, stops_, *tasks_);
    bind_.finished(i, finished, s, stops_, *tasks_);
  }

  Loop feedback_of(int64_t c) {
    const Connection& conn = r_.connections[c];
    const int above = slot(conn.dst);
    if (conn.geometry.pool == Pool::kNone) return bind_.feedback_loop_of(c, buffers_.operand(conn.dst, above));
    if (!unpooled_[c]) unpool(c, above);
    unpooled_[c] = true;
    return bind_.feedback_loop_of(c, buffers_.unpooled(c));
  }

  // ---- unpooling ----------------------------------------------------------------------------------------------------

  void unpool(int64_t c, int slot) {
    const Buffer& state = buffers_.state(r_.connections[c].dst, slot);
    const Control* control = stops_ ? buffers_.control() : nullptr;
    const UnpoolState u{state.data,    state.type,    bind_.unpool(c, winners_now(c)),
                        state.size[0], state.size[1], state.size[2],
                        state.size[3], control};
    push(u, "unpooled state of connection", c, buffers_.unpooled(c));
  }

  // Winners that a feedback of c reads now; null with average pooling. Before there are any, every tie goes to the
  // first.
  const Buffer* winners_now(int64_t c) {
    if (!max_pooled(c)) return nullptr;
    if (out_.winners[c]) return out_.winners[c];
    return present(r_.connections[c].winners) ? &buffers_.given_winners(c) : &buffers_.first_winners(c);
  }

  // ---- early stops --------------------------------------------------------------------------------------------------

  // A result first written in sweep t, before which the run may have stopped: zero until then.
  void late(const Buffer& result, int64_t t) {
    if (stops_ && t >= 2 && t < r_.steps) buffers_.add_start(zeros(result));
  }

  // The same for a state: zero, or as it was given, in both slots.
  void late_state(int64_t i, int old) {
    if (old < 0) {
      buffers_.add_start(zeros(buffers_.state(i, 0)));
    } else if (r_.deferred) {
      buffers_.add_start(between(buffers_.state(i, 0), buffers_.state(i, 1)));
    }
    if (old < 0 && r_.deferred) buffers_.add_start(zeros(buffers_.state(i, 1)));
  }

  // A deferred run that stopped early may have its states in the other of their slots.
  void settle() {
    for (size_t i = 1; i < r_.nodes.size(); ++i) {
      if (first_[i] < 0) continue;
      EP_CHECK(!skipped_[i], kOp, "program",
               "with tol > 0 and deferred steps, a step of node " << i << " in every sweep from its first",
               "none in some");
      settle(buffers_.state(i, 1 - slots_[i]), buffers_.state(i, slots_[i]), i);
      if (buffers_.operand_type() == buffers_.storage() || !r_.keep) continue;
      settle(buffers_.operand(i, 1 - slots_[i]), buffers_.operand(i, slots_[i]), i);
    }
  }

  void settle(const Buffer& from, const Buffer& to, int64_t i) {
    const Settle s{from.data, to.data, to.bytes(), static_cast<int32_t>(r_.steps % 2), buffers_.control()};
    push(s, "settled state of node", i, to);
  }

  // ---- helpers ------------------------------------------------------------------------------------------------------

  struct Pending {
    int64_t node;
    int fresh;
    Ints fused;
  };

  int slot(int64_t i) const { return slots_[i]; }
  bool max_pooled(int64_t c) const { return r_.connections[c].geometry.pool == Pool::kMax; }

  void check_state(int64_t i, const char* why) const {
    EP_CHECK(slot(i) >= 0, kOp, "states", "a state of node " << i << " (" << why << ")", "none");
  }

  template <typename Work>
  void push(const Work& work, const char* what, int64_t index, const Buffer& out) {
    tasks_->push_back({work, static_cast<Products>(r_.operands), what, index, map_of(out)});
  }

  const Relaxation& r_;
  Buffers& buffers_;
  Binding bind_;
  bool stops_;
  Lowered out_;
  Tasks* tasks_ = &out_.head;            // to which launches are appended
  std::vector<int> slots_;               // of each node's state as launches read it now; -1: it is zero
  Ints first_;                           // of each node: the sweep of its first step, or -1
  std::vector<bool> stepped_, skipped_;  // nodes that this sweep steps; that one since their first step did not
  std::vector<bool> unpooled_;  // the buffer of a connection holds its destination's state at its winners, as of now
  std::vector<bool> nudged_;
  std::vector<Pending> pending_;  // steps of a deferred sweep
  int64_t last_step_ = -1;        // of this sweep, in the tasks
};

}  // namespace

Lowered lower(const Relaxation& r, Buffers& buffers) { return Lowering(r, buffers).run(); }

}  // namespace ep::cuda
