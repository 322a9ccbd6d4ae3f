// Which instruction-set unit serves: the best that processor, operating system and build all have, or the one named.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace safr {

// Names of the levels that this machine can run, best first.
std::vector<std::string> available_isas();

// The level of that name; null or "" is the best. Throws std::invalid_argument for a name that is no level and
// std::runtime_error for a level that this machine or build lacks.
const Kernels& select_isa(const char* name);

// select_isa of the environment variable SAFR_FAST_CPU_ISA, read at each call (while Python's lock is held, since
// os.environ writes the same memory).
const Kernels& kernels();

}  // namespace safr
