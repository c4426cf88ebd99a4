#include "base/bus_error.h"

#if !defined(_WIN32)
#include <csignal>
#include <cstring>
#include <unistd.h>
#endif

namespace bezel {

#if defined(_WIN32)

void explain_bus_errors(const char*) noexcept {}

#else

namespace {

const char* message_ = nullptr;

// Nothing but what a signal handler may call.
void explain(int) {
  if (write(STDERR_FILENO, message_, std::strlen(message_)) < 0) _exit(2);
  _exit(1);
}

}  // namespace

void explain_bus_errors(const char* message) noexcept {
  message_ = message;
  struct sigaction action {};
  action.sa_handler = explain;
  sigaction(SIGBUS, &action, nullptr);
}

#endif

}  // namespace bezel
