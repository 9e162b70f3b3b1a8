# Links the uvm allocator into an existing target: PyTorch's c10_cuda, or a library of the plug-in.
#
#     include(<torch-uvm>/cmake/TorchUvm.cmake)
#     torch_uvm_link(c10_cuda)
#
# Builds the Rust library with cargo (in the build directory, with the target's C++ ABI and standard), adds the adapter
# in cpp/ to the target's sources, and links both without exporting a symbol of either but the functions of c_api.h.
# `torch_uvm_link(TARGET PLUGIN)` adds what only the plug-in needs (cpp/plugin) in place of what only a patched PyTorch
# does (cpp/patched). What may be set beforehand:
#
#   TORCH_UVM_TORCH_VERSION  major * 100 + minor of this PyTorch; else read from version.txt at the top of the source
#   TORCH_UVM_CXX11_ABI      libstdc++'s ABI flag, 0 or 1; else found by compiling with CMAKE_CXX_FLAGS
#   TORCH_UVM_CARGO          cargo; else found in PATH and in ~/.cargo/bin
#   TORCH_UVM_CARGO_DIR      where cargo builds; else torch_uvm in the build directory
#   TORCH_UVM_CARGO_TARGET   the machine to build for, as Rust calls it; else this one. CMAKE_CXX_COMPILER compiles for it

get_filename_component(TORCH_UVM_ROOT "${CMAKE_CURRENT_LIST_DIR}" DIRECTORY)

function(torch_uvm_link target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "PLUGIN" "" "")
  _torch_uvm_torch_version(torch_version)
  _torch_uvm_cxx11_abi(cxx11_abi)
  _torch_uvm_cxx_standard(${target} cxx_standard)
  message(STATUS
      "uvm allocator: ${TORCH_UVM_ROOT}, PyTorch ${torch_version}, C++${cxx_standard}, CXX11_ABI=${cxx11_abi}")
  set(bridge_standard "${cxx_standard}")
  if(arg_PLUGIN)
    set(bridge_standard 17) # the oldest of its libraries': all of one ABI share the Rust library
  endif()
  _torch_uvm_rust(${cxx11_abi} ${bridge_standard} rust_target library header_dir)
  add_dependencies(${target} ${rust_target})

  file(GLOB sources CONFIGURE_DEPENDS "${TORCH_UVM_ROOT}/cpp/*.cpp")
  if(arg_PLUGIN)
    file(GLOB more CONFIGURE_DEPENDS "${TORCH_UVM_ROOT}/cpp/plugin/*.cpp")
    target_compile_definitions(${target} PRIVATE TORCH_UVM_PLUGIN)
  else()
    file(GLOB more CONFIGURE_DEPENDS "${TORCH_UVM_ROOT}/cpp/patched/*.cpp")
    target_compile_definitions(${target} PRIVATE USE_RUST_UVM)
  endif()
  list(APPEND sources ${more})
  target_sources(${target} PRIVATE ${sources})
  target_include_directories(${target} PRIVATE "${TORCH_UVM_ROOT}/cpp" "${header_dir}")
  target_compile_definitions(${target} PRIVATE TORCH_UVM_TORCH_VERSION=${torch_version})
  # Exported, the symbols of the Rust standard library would meet those of other Rust extensions in the same process.
  # Of a name of ours nothing is to be seen from outside either: cpp/ is compiled with hidden visibility.
  set_property(TARGET ${target} APPEND_STRING PROPERTY LINK_FLAGS " -Wl,--exclude-libs,libtorch_uvm.a")
  if(NOT arg_PLUGIN) # there the whole target is, and options of single files would keep them out of its unity build
    set_source_files_properties(${sources} PROPERTIES COMPILE_OPTIONS "-fvisibility=hidden;-fvisibility-inlines-hidden")
  endif()
  # c10_cuda's own calls of target_link_libraries decide whether the keyword is allowed.
  target_link_libraries(${target} PRIVATE "${library}")
  if(NOT arg_PLUGIN) # which chooses its system libraries itself
    target_link_libraries(${target} PRIVATE pthread dl m)
  endif()
endfunction()

# Makes the target that builds the Rust library, one for each ABI.
function(_torch_uvm_rust cxx11_abi cxx_standard target_result library_result header_dir_result)
  find_program(
      TORCH_UVM_CARGO cargo
      HINTS $ENV{CARGO_HOME}/bin $ENV{HOME}/.cargo/bin
      DOC "Builds the uvm allocator")
  if(NOT TORCH_UVM_CARGO)
    message(FATAL_ERROR
        "The uvm allocator needs Rust, and cargo is not in PATH: install it (https://rustup.rs) or set TORCH_UVM_CARGO")
  endif()
  set(target "torch_uvm_rust_abi${cxx11_abi}")
  if(NOT DEFINED TORCH_UVM_CARGO_DIR)
    set(TORCH_UVM_CARGO_DIR "${CMAKE_BINARY_DIR}/torch_uvm")
  endif()
  set(cargo_dir "${TORCH_UVM_CARGO_DIR}/abi${cxx11_abi}")
  set(header_dir "${cargo_dir}/include")
  # What is for another machine is named by its triple: for this one run the build scripts, whose compilers stay.
  set(for_target)
  set(suffix)
  set(results "${cargo_dir}")
  if(TORCH_UVM_CARGO_TARGET)
    set(for_target --target "${TORCH_UVM_CARGO_TARGET}")
    set(suffix "_${TORCH_UVM_CARGO_TARGET}")
    set(results "${cargo_dir}/${TORCH_UVM_CARGO_TARGET}")
  endif()
  set(library "${results}/release/libtorch_uvm.a")
  # The cxx crate's own C++ is compiled by its own build script, which takes flags from CXXFLAGS only.
  set(cxx_flags "-D_GLIBCXX_USE_CXX11_ABI=${cxx11_abi} -fPIC -fvisibility=hidden")
  if(NOT TARGET ${target})
    # Always run: cargo knows best what has changed, and is quick where nothing has.
    add_custom_target(
        ${target}
        COMMAND
            ${CMAKE_COMMAND} -E env
            "TORCH_UVM_CXX11_ABI=${cxx11_abi}"
            "TORCH_UVM_CXX_STANDARD=${cxx_standard}"
            "TORCH_UVM_HEADER_DIR=${header_dir}"
            "CXX${suffix}=${CMAKE_CXX_COMPILER}"
            "CXXFLAGS${suffix}=${cxx_flags}"
            ${TORCH_UVM_CARGO} build --release --lib --locked --features bridge ${for_target}
            --manifest-path "${TORCH_UVM_ROOT}/Cargo.toml" --target-dir "${cargo_dir}"
        BYPRODUCTS "${library}" "${header_dir}/torch_uvm/bridge.rs.h" "${header_dir}/rust/cxx.h"
        COMMENT "Building the uvm allocator (Rust, CXX11_ABI=${cxx11_abi})"
        USES_TERMINAL
        VERBATIM)
  endif()
  set(${target_result} "${target}" PARENT_SCOPE)
  set(${library_result} "${library}" PARENT_SCOPE)
  set(${header_dir_result} "${header_dir}" PARENT_SCOPE)
endfunction()

function(_torch_uvm_torch_version result)
  if(DEFINED TORCH_UVM_TORCH_VERSION)
    set(${result} "${TORCH_UVM_TORCH_VERSION}" PARENT_SCOPE)
    return()
  endif()
  set(file "${CMAKE_SOURCE_DIR}/version.txt")
  if(NOT EXISTS "${file}")
    message(FATAL_ERROR
        "The uvm allocator must know the PyTorch version: ${file} is missing, set TORCH_UVM_TORCH_VERSION")
  endif()
  file(READ "${file}" text)
  if(NOT text MATCHES "^([0-9]+)\\.([0-9]+)")
    message(FATAL_ERROR "${file}: '${text}' is not a version: set TORCH_UVM_TORCH_VERSION")
  endif()
  math(EXPR number "${CMAKE_MATCH_1} * 100 + ${CMAKE_MATCH_2}")
  set(${result} "${number}" PARENT_SCOPE)
endfunction()

# PyTorch puts the flag into CMAKE_CXX_FLAGS, or nowhere where it is the compiler's default.
function(_torch_uvm_cxx11_abi result)
  if(NOT DEFINED TORCH_UVM_CXX11_ABI)
    include(CheckCXXSourceCompiles)
    check_cxx_source_compiles(
        "#include <string>
         #if !_GLIBCXX_USE_CXX11_ABI
         #error old
         #endif
         int main() {}"
        TORCH_UVM_FOUND_CXX11_ABI)
    set(TORCH_UVM_CXX11_ABI 0)
    if(TORCH_UVM_FOUND_CXX11_ABI)
      set(TORCH_UVM_CXX11_ABI 1)
    endif()
  endif()
  set(${result} "${TORCH_UVM_CXX11_ABI}" PARENT_SCOPE)
endfunction()

function(_torch_uvm_cxx_standard target result)
  get_target_property(standard ${target} CXX_STANDARD)
  if(NOT standard)
    set(standard "${CMAKE_CXX_STANDARD}")
  endif()
  if(NOT standard)
    set(standard 17)
  endif()
  set(${result} "${standard}" PARENT_SCOPE)
endfunction()
