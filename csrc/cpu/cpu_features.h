// Which instruction sets this machine and its operating system can run.
#pragma once

namespace fastseq::cpu {

// By the names of CMakeLists.txt; an instruction set every machine of the architecture has needs no test.
bool machine_runs(const char* isa);

}  // namespace fastseq::cpu
