"""Operations endpoints: health checks and metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from paddlemix_qwenvl_plugin.serve.service import Service

HEALTH_PATHS = ("/health/live", "/health/ready")

_RETRY_SECONDS = 1


def router(service: Service) -> APIRouter:
    """Create the routes GET /health/live, /health/ready and /metrics."""
    routes = APIRouter(tags=["operations"])

    @routes.get("/health/live", summary="Whether the server runs, also while it loads the model.")
    async def live() -> JSONResponse:
        return JSONResponse({"status": "live"})

    @routes.get(
        "/health/ready",
        summary="Whether the server is ready for requests.",
        responses={
            503: {"description": "The model is loading or reloading, or the server is shutting down."}
        },
    )
    async def ready() -> JSONResponse:
        if service.engine.ready and not service.draining:
            return JSONResponse({"status": "ready", "model": service.model_name})
        status = "draining" if service.draining else "loading"
        return JSONResponse({"status": status}, 503, {"Retry-After": str(_RETRY_SECONDS)})

    @routes.get("/metrics", summary="Counters, gauges and histograms for Prometheus.")
    async def metrics(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        if service.cluster_metrics is None:  # not on a Ray cluster
            body, content_type = service.metrics.render(accept)
        else:
            body, content_type = await service.cluster_metrics(accept)
        return Response(body, headers={"Content-Type": content_type})

    return routes
