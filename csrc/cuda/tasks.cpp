#include "tasks.h"

#include <exception>
#include <type_traits>

#include "ep/check.h"

namespace ep::cuda {
namespace {

void launch_one(const Task& task, const Device& device, cudaStream_t stream) {
  std::visit(
      [&](const auto& work) {
        using Work = std::decay_t<decltype(work)>;
        if constexpr (std::is_same_v<Work, Step> || std::is_same_v<Work, Drive>) {
          launch(work, task.products, device, stream);
        } else {
          launch(work, stream);
        }
      },
      task.work);
}

}  // namespace

void launch(const Tasks& tasks, const Device& device, cudaStream_t stream) {
  for (const Task& task : tasks) {
    try {
      launch_one(task, device, stream);
    } catch (const std::exception& error) {
      std::ostringstream message;
      message << "relax: " << task.what << ' ' << task.index << ' ' << list(task.map) << ": " << error.what();
      throw std::runtime_error(message.str());
    }
  }
}

}  // namespace ep::cuda
