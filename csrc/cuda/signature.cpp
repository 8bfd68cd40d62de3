#include "signature.h"

#include <type_traits>

namespace ep::cuda {
namespace {

class Writer {
 public:
  template <typename... Values>
  Writer& operator()(const Values&... values) {
    (write(values), ...);
    return *this;
  }
  std::string bytes;

 private:
  template <typename T, std::enable_if_t<std::is_arithmetic_v<T>, int> = 0>
  void write(T value) {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void write(const Tensor& t) {
    write(static_cast<int32_t>(t.scalar_type()));
    write(sizes(t));
  }
  template <typename T>
  void write(const std::vector<T>& values) {
    write(values.size());
    for (const T& value : values) write(value);
  }
};

}  // namespace

std::string signature(const RelaxArguments& a) {
  Writer write;
  write(a.states, a.weights, a.feedback_weights, a.biases, a.drives, a.winners, a.free, a.preactivations, a.heads,
        a.extra);
  write(a.shapes, a.connections, a.head_spec, a.program, a.linear_nodes);
  write(a.drive_gains, a.feedback_gains, a.nudge_gains, a.scales, a.head_scalars);
  write(a.batch, a.phases, a.steps, a.form, a.frozen, a.deferred, a.operands, a.storage, a.keep);
  write(a.damping, a.slope, a.lo, a.hi, a.tol, a.weights[0].get_device_index());
  return std::move(write.bytes);
}

}  // namespace ep::cuda
