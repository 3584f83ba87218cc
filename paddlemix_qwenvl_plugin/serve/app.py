"""The ASGI application: routes and middleware."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Optional

from fastapi import APIRouter, FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from paddlemix_qwenvl_plugin.serve import operations
from paddlemix_qwenvl_plugin.serve.api_keys import ApiKeys, read_api_keys
from paddlemix_qwenvl_plugin.serve.error_response import install_handlers
from paddlemix_qwenvl_plugin.serve.middleware.auth import Auth
from paddlemix_qwenvl_plugin.serve.middleware.body import BodyLimit
from paddlemix_qwenvl_plugin.serve.middleware.headers import SecurityHeaders
from paddlemix_qwenvl_plugin.serve.middleware.origins import OriginCheck
from paddlemix_qwenvl_plugin.serve.middleware.request_log import RequestLog
from paddlemix_qwenvl_plugin.serve.service import Service
from paddlemix_qwenvl_plugin.version import __version__

PAGE = Path(__file__).resolve().parent / "page"


def create_app(
    service: Service,
    router: Optional[APIRouter] = None,
    page: Path = PAGE,
    keys: Optional[ApiKeys] = None,
) -> FastAPI:
    """Create the ASGI application of a service.

    Args:
        router: routes of the API, which tests replace; default: those of the OpenAI-compatible API.
        page: folder of the web page, served at / if it contains index.html and `settings.page` is on.
        keys: API keys; default: those of `settings.api_key_file`.

    Raises:
        UsageError: the API keys cannot be read.
    """
    settings = service.settings
    keys = keys or read_api_keys(settings)
    # No documentation pages: FastAPI's load scripts from other hosts.
    app = FastAPI(title="qwenvl serve", version=__version__, docs_url=None, redoc_url=None)
    if router is None:
        from paddlemix_qwenvl_plugin.serve.openai import routes

        router = routes.router(service)
    app.include_router(router)
    app.include_router(operations.router(service))
    page_paths = _add_page(app, page) if settings.page else frozenset()
    install_handlers(app)
    paths = [*app.openapi()["paths"], *page_paths]
    app.user_middleware = _middleware(service, keys, paths, page_paths)
    if service.cluster_metrics is None:  # else other processes of the cluster have the engine and the queue
        service.metrics.watch(service.engine, service.admission)
    return app


def _middleware(
    service: Service, keys: Optional[ApiKeys], paths: list[str], page_paths: frozenset[str]
) -> list[Middleware]:
    """Middleware of the application, outermost first."""
    settings = service.settings
    middleware = [
        Middleware(SecurityHeaders, page_paths=page_paths),
        Middleware(RequestLog, service=service, paths=paths),
    ]
    if keys is None:
        # Without keys, a page of another origin could use the server through the user's browser.
        middleware.append(
            Middleware(OriginCheck, allowed=settings.cors_origins, loopback_only=not settings.no_auth)
        )
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["X-Request-Id", "Retry-After"],
            )
        )
    if keys is not None:
        # The page itself needs no key: it asks the user for the key of its API requests.
        open_paths = page_paths.union(operations.HEALTH_PATHS)
        middleware.append(Middleware(Auth, keys=keys, open_paths=open_paths))
    middleware.append(
        Middleware(
            BodyLimit,
            max_bytes=settings.max_body_bytes,
            max_held_bytes=max(settings.max_held_bytes, settings.max_body_bytes),  # at least one body fits
            timeout=settings.body_timeout,
        )
    )
    return middleware


def _add_page(app: FastAPI, folder: Path) -> frozenset[str]:
    """Serve each file of the page at its path and index.html at /; return the paths."""
    if not (folder / "index.html").is_file():
        return frozenset()
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    paths = frozenset({"/", *(f"/{name}" for name in names)})
    # Some systems map .js to text/plain, and browsers refuse modules of that type.
    mimetypes.add_type("text/javascript", ".js")
    files = StaticFiles(directory=folder, html=True)
    for path in sorted(paths):
        app.router.routes.append(Route(path, files))
    return paths
