"""Every error of the app as OpenAI's error object."""

from __future__ import annotations

import json
import uuid

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from paddlemix_qwenvl_plugin.serve.errors import ApiError, as_api_error
from paddlemix_qwenvl_plugin.serve.invalid_body import invalid_body
from paddlemix_qwenvl_plugin.util.errors import QwenVLError


def install_error_handlers(app: FastAPI) -> None:
    """Answer errors of routes, and unknown routes, in OpenAI's form."""

    @app.exception_handler(QwenVLError)
    async def of_ours(request: Request, error: QwenVLError) -> Response:
        return error_response(as_api_error(error))

    @app.exception_handler(RequestValidationError)
    async def of_a_body(request: Request, error: RequestValidationError) -> Response:
        return error_response(invalid_body(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def of_a_route(request: Request, error: HTTPException) -> Response:
        asked = f"{request.method} {request.url.path[:100]}"
        if error.status_code == 404:
            found = ApiError(404, f"There is no {asked}.", code="unknown_url")
        elif error.status_code == 405:
            found = ApiError(405, f"There is no {asked}; see the header Allow.", code="method_not_allowed")
        else:
            found = ApiError(error.status_code, str(error.detail))
        found.headers.update(error.headers or {})
        return error_response(found)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        # Starlette raises the error again after this, so that it is logged.
        request_id = getattr(request.state, "request_id", None) or uuid.uuid4().hex
        message = f"The server failed where it should not; its log has more about request {request_id}."
        return error_response(
            ApiError(
                500, message, "server_error", code="internal_error", headers={"X-Request-ID": request_id}
            )
        )


def error_response(error: ApiError) -> Response:
    """The response that is an error."""
    # In ASCII, for a message may repeat half a surrogate pair of the request.
    return Response(
        json.dumps(error.body()).encode(), error.status, headers=error.headers, media_type="application/json"
    )
