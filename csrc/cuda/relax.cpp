// torch.ops.ep_kernels.relax: a whole plan as one CUDA graph for each signature.
#include <algorithm>
#include <list>
#include <memory>
#include <mutex>

#include "ops.h"
#include "program.h"
#include "signature.h"

namespace ep::cuda {

namespace {

constexpr size_t kMostPrograms = 16;  // signatures kept: phases x batch sizes x settings in use at a time

// A program, made by its first user; its users wait for each other here, their work on the device in Turn.
struct Kept {
  std::mutex mutex;
  std::unique_ptr<Program> program;
};

// The last used programs, by signature. What goes waits for its last run, once nobody holds it.
class Programs {
 public:
  std::shared_ptr<Kept> get(const std::string& key) {
    std::list<Entry> gone;  // destroyed after the lock is released
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find_if(kept_.begin(), kept_.end(), [&](const Entry& e) { return e.first == key; });
    if (found != kept_.end()) {
      kept_.splice(kept_.begin(), kept_, found);
    } else {
      kept_.emplace_front(key, std::make_shared<Kept>());
    }
    if (kept_.size() > kMostPrograms) gone.splice(gone.begin(), kept_, std::prev(kept_.end()));
    return kept_.front().second;
  }

  // Returns how many there were.
  int64_t clear() {
    std::list<Entry> gone;
    const std::lock_guard<std::mutex> lock(mutex_);
    gone.swap(kept_);
    return static_cast<int64_t>(gone.size());
  }

 private:
  using Entry = std::pair<std::string, std::shared_ptr<Kept>>;

  std::mutex mutex_;
  std::list<Entry> kept_;  // the last used first
};

// Never destroyed: at exit the CUDA runtime may be gone before this library.
Programs& programs() {
  static Programs* const all = new Programs;
  return *all;
}

}  // namespace

int64_t release() { return programs().clear(); }

Outputs relax(const Tensors& states, const Tensors& weights, const Tensors& feedback_weights, const Tensors& biases,
              const Tensors& drives, const Tensors& winners, const Tensors& free, const Tensors& preactivations,
              const Tensors& heads, const Tensors& extra, const Ints& shapes, const Ints& connections,
              const Ints& head_spec, const Ints& program, const Ints& linear_nodes, const Floats& drive_gains,
              const Floats& feedback_gains, const Floats& nudge_gains, const Floats& scales, const Floats& head_scalars,
              int64_t batch, int64_t phases, int64_t steps, int64_t form, bool frozen, bool deferred, int64_t operands,
              int64_t storage, bool keep, double damping, double slope, double lo, double hi, double tol) {
  // clang-format off
  const RelaxArguments arguments{
      states, weights, feedback_weights, biases, drives, winners, free, preactivations, heads, extra,
      shapes, connections, head_spec, program, linear_nodes,
      drive_gains, feedback_gains, nudge_gains, scales, head_scalars,
      batch, phases, steps, form, frozen, deferred, operands, storage, keep,
      damping, slope, lo, hi, tol};
  // clang-format on
  const Relaxation r = read_relaxation(kRelaxRules, arguments);
  const Place place(r.like);
  if (capturing(place.stream())) return Program(r).run_captured(r, place);
  const std::shared_ptr<Kept> kept = programs().get(signature(arguments) + (place.device().warpgroups ? "wgmma" : ""));
  const std::lock_guard<std::mutex> lock(kept->mutex);
  if (!kept->program) kept->program = std::make_unique<Program>(r);
  return kept->program->run(r, place);
}

}  // namespace ep::cuda
