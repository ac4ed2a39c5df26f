# Programs that run kernels as nvcc compiles them to PTX, translated to C++: csrc/cuda/emulation/README.md.
find_package(Python3 REQUIRED COMPONENTS Interpreter)
find_program(FASTSEQ_NVCC nvcc REQUIRED)
set(fastseq_ptx csrc/cuda/emulation/ptx)

# Adds to the target, of a source of csrc/cuda, the kernels whose names match one of the expressions that follow.
function(fastseq_translate target source)
  get_filename_component(name "${source}" NAME_WE)
  set(ptx "${PROJECT_BINARY_DIR}/ptx/${name}.ptx")
  set(cpp "${PROJECT_BINARY_DIR}/ptx/${name}.cpp")
  add_custom_command(
    OUTPUT "${ptx}"
    COMMAND "${FASTSEQ_NVCC}" -ptx -arch=compute_80 "${PROJECT_SOURCE_DIR}/${source}" -o "${ptx}" -MD -MF "${ptx}.d"
            ${nvcc_flags} "-I${PROJECT_SOURCE_DIR}/csrc"
    DEPENDS "${source}"
    DEPFILE "${ptx}.d"
    COMMENT "Compiling ${source} to PTX"
    VERBATIM)
  add_custom_command(
    OUTPUT "${cpp}"
    COMMAND Python3::Interpreter "${PROJECT_SOURCE_DIR}/${fastseq_ptx}/translate.py" "${ptx}" "${cpp}" ${ARGN}
    DEPENDS "${ptx}" ${fastseq_ptx}/translate.py
    COMMENT "Translating ${name}.ptx"
    VERBATIM)
  target_sources(${target} PRIVATE "${cpp}")
  set_source_files_properties("${cpp}" PROPERTIES INCLUDE_DIRECTORIES "${PROJECT_SOURCE_DIR}/${fastseq_ptx}"
                              COMPILE_OPTIONS "-Wno-unused-but-set-variable;-Wno-unused-label")
endfunction()
file(MAKE_DIRECTORY "${PROJECT_BINARY_DIR}/ptx")

foreach(tests IN ITEMS rnn attention)
  add_executable(fastseq_cuda_ptx_${tests}_tests ${fastseq_ptx}/runtime.cpp $<TARGET_OBJECTS:fastseq_cuda_emulation>
                 $<TARGET_OBJECTS:fastseq_cuda_emulated> $<TARGET_OBJECTS:fastseq_cuda_${tests}_tests>)
endforeach()
add_executable(fastseq_cuda_ptx_probes_tests ${fastseq_ptx}/probes.cu ${fastseq_ptx}/runtime.cpp
               $<TARGET_OBJECTS:fastseq_cuda_emulation>)
set_source_files_properties(${fastseq_ptx}/probes.cu PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
list(APPEND fastseq_cuda_targets fastseq_cuda_ptx_rnn_tests fastseq_cuda_ptx_attention_tests
            fastseq_cuda_ptx_probes_tests)

# All families of kernels but that of a mask's gradients; of tiles, types and cells what tests/test_cuda_ptx.py runs. A
# compiler takes seconds for each, so there are two cells, and no heads of more than 128 numbers.
set(two_cells "step_.*<(Lstm|Gru)Cell" "persistent_.*<(Lstm|Gru)Cell, .*, 8, 16, false>")
fastseq_translate(fastseq_cuda_ptx_probes_tests ${fastseq_ptx}/probes.cu ".*")
fastseq_translate(fastseq_cuda_ptx_rnn_tests csrc/cuda/gemm.cu ".*")
fastseq_translate(fastseq_cuda_ptx_rnn_tests csrc/cuda/rnn_forward.cu ${two_cells} "copy_kernel")
fastseq_translate(fastseq_cuda_ptx_rnn_tests csrc/cuda/rnn_backward.cu ${two_cells} "add_kernel" "column_sums_kernel")
fastseq_translate(fastseq_cuda_ptx_attention_tests csrc/cuda/attention_forward.cu "attention_forward_simt<double,"
                  "attention_forward_tiles<(bfloat16|float), (64|128), false,"
                  "attention_forward_tiles<float16, 64, false,")
fastseq_translate(fastseq_cuda_ptx_attention_tests csrc/cuda/attention_few.cu "merge_splits<"
                  "attention_forward_simt<double," "attention_forward_tiles<(bfloat16|float), (64, false|128, true),")
fastseq_translate(fastseq_cuda_ptx_attention_tests csrc/cuda/attention_backward.cu "attention_delta<(float|b?float16)>"
                  "attention_.*_gradients_simt<double>" "attention_.*_gradients<(b?float16|float), 64, false>"
                  "attention_.*_gradients<(bfloat16|float), 128,")
