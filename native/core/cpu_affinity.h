// Which CPUs threads run on.
#pragma once

#include <string>
#include <vector>

namespace tandem {

// Numbers of the CPUs that the calling thread may run on, ascending; empty where the system cannot tell.
std::vector<int> AllowedCpus();

// How many of them there are, or all of the machine's where the system cannot tell; at least 1.
int AllowedCpuCount();

// Has the calling thread run on these CPUs only; nothing happens for an empty list. Throws kInvalidArgument, which says which ones are allowed.
void PinThisThread(const std::vector<int>& cpus);

// "0-3,8": ranges and single numbers of an ascending list.
std::string FormatCpuList(const std::vector<int>& cpus);

}  // namespace tandem
