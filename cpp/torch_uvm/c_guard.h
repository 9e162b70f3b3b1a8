// For the functions of c_api.h: no exception leaves them, and what was wrong can be asked for.
#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <string>

namespace torch_uvm {

// This thread's reason of its last failed call.
std::string& last_error() noexcept;

// Keeps a text until this thread's next call.
const char* kept_text(std::string text);

template <typename Result, typename Function>
Result guarded(Result failed, Function function) noexcept {
  try {
    return function();
  } catch (const c10::Error& error) {
    last_error() = error.what_without_backtrace();
  } catch (const std::exception& error) {
    last_error() = error.what();
  } catch (...) {
    last_error() = "an exception of an unknown kind";
  }
  return failed;
}

} // namespace torch_uvm
