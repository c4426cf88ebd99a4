// What a program says when a file that it has mapped is cut short by another.
#pragma once

namespace bezel {

// From now on such an error ends the process with `message`, which stays where it is, and the exit status 1.
void explain_bus_errors(const char* message) noexcept;

}  // namespace bezel
