#include "relaxation.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace ep {
namespace {

constexpr const char* kOp = "relax";

void check_count(const char* argument, size_t got, size_t expected) {
  EP_CHECK(got == expected, kOp, argument, expected << " entries", got);
}

void check_counts(const RelaxArguments& a) {
  const size_t nodes = a.states.size(), count = a.weights.size();
  const bool delta = a.form != 0;
  check_count("biases", a.biases.size(), nodes);
  check_count("extra", a.extra.size(), nodes);
  check_count("feedback_weights", a.feedback_weights.size(), a.feedback_weights.empty() ? 0 : count);
  check_count("shapes", a.shapes.size(), 3 * nodes);
  check_count("nudge_gains", a.nudge_gains.size(), nodes);
  check_count("scales", a.scales.size(), nodes);
  check_count("free", a.free.size(), delta ? nodes : 0);
  check_count("preactivations", a.preactivations.size(), delta ? nodes : 0);
  check_count("connections", a.connections.size(), 7 * count);
  check_count("drives", a.drives.size(), count);
  check_count("winners", a.winners.size(), count);
  check_count("drive_gains", a.drive_gains.size(), count);
  check_count("feedback_gains", a.feedback_gains.size(), count);
  check_count("head_spec", a.head_spec.size(), 4 * (a.heads.size() / 3));
  check_count("heads", a.heads.size(), 3 * (a.head_spec.size() / 4));
  check_count("head_scalars", a.head_scalars.size(), a.head_spec.size() / 2);
}

void check_numbers(const Rules& rules, const RelaxArguments& a) {
  EP_CHECK(a.states.size() >= 2, kOp, "states", "the input and at least one node", a.states.size());
  EP_CHECK(a.weights.size() >= 1, kOp, "weights", "at least one", a.weights.size());
  EP_CHECK(a.batch >= 0, kOp, "batch", "an integer >= 0", a.batch);
  const int64_t most = (int64_t{1} << 30) / std::max<int64_t>(a.batch, 1);
  EP_CHECK(a.steps >= 1 && a.steps <= most, kOp, "steps", "1 to " << most << " (a residual is kept for each)", a.steps);
  EP_CHECK(std::isfinite(a.tol) && a.tol >= 0, kOp, "tol", "a finite number >= 0", a.tol);
  check_dynamics(kOp, a.damping, a.slope, a.lo, a.hi, a.form, a.phases, a.batch);
  check_operands(kOp, a.operands);
  EP_CHECK(a.storage >= 0 && a.storage < rules.storages, kOp, "storage", rules.storage, a.storage);
  check_counts(a);
  check_finite(kOp, "drive_gains", a.drive_gains);
  check_finite(kOp, "feedback_gains", a.feedback_gains);
  check_finite(kOp, "nudge_gains", a.nudge_gains);
  check_finite(kOp, "head_scalars", a.head_scalars);
  for (double s : a.scales) EP_CHECK(std::isfinite(s) && s > 0, kOp, "scales", "finite numbers > 0", s);
}

// States and free states come in the parameters' dtype or in that of the storage.
void check_stored(const char* argument, const Tensor& tensor, const Ints& shape, int64_t storage, const Tensor& like) {
  if (storage == 0 || tensor.scalar_type() != ScalarType::Half) return check_like(kOp, argument, tensor, shape, like);
  check_shape(kOp, argument, sizes(tensor), shape);
  check_device(kOp, argument, tensor, like);
}

Node node_of(const RelaxArguments& a, size_t i, const Tensor& like) {
  const int64_t* size = a.shapes.data() + 3 * i;
  const bool map = size[1] != 0 || size[2] != 0;
  const int64_t most = map ? int64_t{1} << 20 : int64_t{1} << 31;  // products of three stay within 64 bits
  EP_CHECK(size[0] > 0 && size[0] < most && (!map || (size[1] > 0 && size[2] > 0 && size[1] < most && size[2] < most)),
           kOp, "shapes", "C, H, W or F, 0, 0 for node " << i, size[0] << ", " << size[1] << ", " << size[2]);
  Node node{{a.batch, size[0]}, a.states[i],      a.biases[i], a.extra[i], absent(like),
            absent(like),       a.nudge_gains[i], a.scales[i], a.lo,       a.hi};
  if (map) node.shape.insert(node.shape.end(), {size[1], size[2]});
  const Ints free_shape = with_batch(node.shape, a.batch / a.phases);
  if (present(node.state)) check_stored("states", node.state, node.shape, a.storage, like);
  if (present(node.bias)) check_like(kOp, "biases", node.bias, {node.shape[1]}, like);
  if (present(node.extra)) check_like(kOp, "extra", node.extra, free_shape, like);
  if (a.form != 0 && i > 0) {
    check_stored("free", a.free[i], free_shape, a.storage, like);
    check_like(kOp, "preactivations", a.preactivations[i], free_shape, like);
    node.free = a.free[i];
    node.preactivation = a.preactivations[i];
  }
  return node;
}

Connection connection_of(const Rules& rules, const RelaxArguments& a, size_t c, const std::vector<Node>& nodes,
                         const Tensor& like) {
  const int64_t* flat = a.connections.data() + 7 * c;
  EP_CHECK(flat[0] >= 0 && flat[0] < flat[1] && flat[1] < static_cast<int64_t>(nodes.size()), kOp, "connections",
           "0 <= src < dst < " << nodes.size() << " (connection " << c << ")", flat[0] << ", " << flat[1]);
  const std::string where = std::string(kOp) + " (connection " + std::to_string(c) + ")";
  const Tensor& weight = a.weights[c];
  const Geometry g = geometry_of(where.c_str(), weight.dim(), {flat[2], flat[3]}, {flat[4], flat[5]}, flat[6]);
  const Ints& source = nodes[flat[0]].shape;
  check_connection(where.c_str(), rules, source, weight, g, like);
  const Ints driven = g.drive_shape(source, sizes(weight));
  EP_CHECK(driven == nodes[flat[1]].shape, where, "shapes", list(driven) << " for node " << flat[1],
           list(nodes[flat[1]].shape));
  const Tensor feedback_weight = a.feedback_weights.empty() ? absent(like) : a.feedback_weights[c];
  if (present(feedback_weight)) check_like(where.c_str(), "feedback_weights", feedback_weight, sizes(weight), like);
  const Tensor &drive = a.drives[c], &winners = a.winners[c];
  if (present(drive)) {
    const int64_t samples = a.batch / a.phases;
    const bool free = drive.dim() > 0 && drive.size(0) == samples;
    check_like(kOp, "drives", drive, free ? with_batch(driven, samples) : driven, like);
  }
  if (present(winners)) check_winners(kOp, winners, driven, a.batch, like);
  return {flat[0], flat[1], g, weight, feedback_weight, drive, winners, a.drive_gains[c], a.feedback_gains[c]};
}

}  // namespace

Relaxation read_relaxation(const Rules& rules, const RelaxArguments& a) {
  check_numbers(rules, a);
  const Tensor& like = a.weights[0];
  check_floating(kOp, rules, "weights", like);
  Relaxation r;
  r.batch = a.batch;
  r.phases = a.phases;
  r.steps = a.steps;
  r.frozen = a.frozen;
  r.deferred = a.deferred;
  r.keep = a.keep;
  r.operands = a.operands;
  r.storage = a.storage;
  r.dynamics = {static_cast<Form>(a.form), a.damping, a.slope, a.lo, a.hi, 1.0};
  r.tol = a.tol;
  r.like = like;
  const int64_t nodes = static_cast<int64_t>(a.states.size());
  for (int64_t i = 0; i < nodes; ++i) r.nodes.push_back(node_of(a, i, like));
  for (int64_t i : a.linear_nodes) {
    EP_CHECK(i >= 1 && i < nodes, kOp, "linear_nodes", "nodes from 1 to " << nodes - 1, i);
    r.nodes[i].lo = -std::numeric_limits<double>::infinity();
    r.nodes[i].hi = std::numeric_limits<double>::infinity();
  }
  Ints ends;
  for (size_t c = 0; c < a.weights.size(); ++c) {
    r.connections.push_back(connection_of(rules, a, c, r.nodes, like));
    ends.insert(ends.end(), {r.connections[c].src, r.connections[c].dst});
  }
  r.program = decode(a.program, nodes, ends);
  for (size_t h = 0; h < a.head_spec.size() / 4; ++h) {
    const int64_t node = a.head_spec[4 * h];
    EP_CHECK(node >= 1 && node < nodes, kOp, "head_spec", "a node from 1 to " << nodes - 1, node);
    r.heads.push_back(head_of(kOp, a.head_spec.data() + 4 * h, a.head_scalars.data() + 2 * h, a.heads.data() + 3 * h,
                              r.nodes[node].shape, r.samples(), like));
  }
  return r;
}

}  // namespace ep
