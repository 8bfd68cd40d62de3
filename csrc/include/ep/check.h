// Errors that name the op, the argument, what was expected and what came.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace ep {

// A shape for messages: [32, 3, 8, 8].
template <typename Sizes>
std::string list(const Sizes& sizes) {
  std::ostringstream out;
  out << '[';
  const char* separator = "";
  for (const auto& size : sizes) {
    out << separator << size;
    separator = ", ";
  }
  out << ']';
  return out.str();
}

}  // namespace ep

// EP_CHECK(ok, "drive", "weight", "4 dimensions", weight.dim()): the last two may be `a << b` chains.
#define EP_CHECK(condition, op, argument, expected, ...)                                                       \
  do {                                                                                                         \
    if (__builtin_expect(!(condition), 0)) {                                                                   \
      std::ostringstream ep_message;                                                                           \
      ep_message << op << ": argument '" << argument << "': expected " << expected << ", got " << __VA_ARGS__; \
      throw std::runtime_error(ep_message.str());                                                              \
    }                                                                                                          \
  } while (false)
