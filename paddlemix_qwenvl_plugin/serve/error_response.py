"""Error responses in OpenAI's format."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from paddlemix_qwenvl_plugin.serve.engine_api import EngineUnavailable
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.invalid_body import invalid_body
from paddlemix_qwenvl_plugin.serve.request_info import info_of
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError, line_of


async def respond(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send an error as the response to a request; for middleware, whose errors `install_handlers` does not cover."""
    await _response(error, scope)(scope, receive, send)


def api_error(error: Exception) -> ApiError:
    """Convert an exception into the ApiError that the client sees."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineUnavailable):
        return ApiError(
            503, line_of(error), "server_error", code="engine_unavailable", headers={"Retry-After": "1"}
        )
    if isinstance(error, UsageError):
        return ApiError(400, line_of(error))
    if isinstance(error, RequestValidationError):
        return invalid_body(error.errors(), error.body)
    if isinstance(error, HTTPException):
        return _of_http(error)
    if isinstance(error, QwenVLError):
        return ApiError(500, line_of(error), "server_error", code="engine_error")
    return ApiError(500, "Internal error; see the server's log", "server_error", code="internal_error")


def install_handlers(app: FastAPI) -> None:
    """Install exception handlers that respond in OpenAI's format; RequestLog responds to any other exception."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return _response(api_error(error), request.scope)

    for error_type in (QwenVLError, RequestValidationError, HTTPException):
        app.add_exception_handler(error_type, handle)


def _response(error: ApiError, scope: Scope) -> JSONResponse:
    info_of(scope).error = error.code or error.kind
    return JSONResponse(error.body(), error.status, error.headers)


def _of_http(error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError(404, "No such path", code="not_found")
    if error.status_code == 405:
        return ApiError(
            405, "Method not allowed for this path", code="method_not_allowed", headers=error.headers
        )
    # FastAPI raises 400 only if the JSON parser fails with another exception than JSONDecodeError.
    if error.status_code == 400:
        message = "The body is not valid JSON: it is not UTF-8, nested too deeply, or has a number that is too long."
        return ApiError(400, message, code="invalid_json")
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return ApiError(error.status_code, str(error.detail), kind, headers=error.headers)
