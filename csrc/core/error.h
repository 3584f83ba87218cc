// Errors inside the library: thrown as Error, converted to a status and a one-line message at the C boundary.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <exception>
#include <new>

#include "qwenvl.h"

namespace qvl {

struct Error : std::exception {
  qvl_status status;
  qvl_error line;

  const char* what() const noexcept override { return line.message; }
};

// Throw an Error with a formatted message.
[[noreturn]] inline void fail(qvl_status status, const char* format, ...)
    __attribute__((format(printf, 2, 3)));
[[noreturn]] inline void fail(qvl_status status, const char* format, ...) {
  Error error;
  error.status = status;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error.line.message, sizeof error.line.message, format, arguments);
  va_end(arguments);
  throw error;
}

// fail() unless the condition holds; the message is formatted only on failure.
#define QVL_REQUIRE(condition, status, ...)             \
  do {                                                  \
    if (!(condition)) ::qvl::fail(status, __VA_ARGS__); \
  } while (0)

// Run `body`, catch all exceptions and return the status. Unless `error` is NULL, *error gets the message,
// which is empty on success.
template <typename Body>
qvl_status guarded(qvl_error* error, Body&& body) noexcept {
  qvl_error line{};
  qvl_status status = QVL_INTERNAL;
  try {
    body();
    status = QVL_OK;
  } catch (const Error& e) {
    status = e.status;
    line = e.line;
  } catch (const std::bad_alloc&) {
    status = QVL_NO_MEMORY;
    snprintf(line.message, sizeof line.message, "out of memory");
  } catch (const std::exception& e) {
    snprintf(line.message, sizeof line.message, "internal error: %s", e.what());
  } catch (...) {
    snprintf(line.message, sizeof line.message, "internal error");
  }
  if (error != nullptr) *error = line;
  return status;
}

}  // namespace qvl
